"""`same_gradients` and `bwsk gradcheck`: they pass what is bit-identical, and find and judge what is not."""

from __future__ import annotations

import copy
import itertools
import json
import random
import sys
import weakref
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import bwsk
from bwsk import BwskError, GradientComparison, make_reversible, same_gradients
from bwsk.cli import main
from bwsk.reversible.verification.gradient_check import shape_of, what_to_set
from bwsk.reversible.verification.random_batch import random_batch
from bwsk.reversible.verification.tensor_bits import fingerprint, identical

T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 96, "n_positions": 32, "eos_token_id": 1}
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
MODELS: dict[str, tuple[Any, Any]] = {
    "t5": (T5ForConditionalGeneration, T5Config(decoder_start_token_id=0, **T5)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(bos_token_id=1, **GPT2)),
    "bert": (BertForMaskedLM, BertConfig(vocab_size=96, max_position_embeddings=32, **SIZES)),
    "vit": (ViTForImageClassification, ViTConfig(image_size=32, patch_size=8, hidden_dropout_prob=0.1, **SIZES)),
}


def tiny(name: str = "t5", attention: str = "eager") -> Any:
    cls, config = MODELS[name]
    torch.manual_seed(0)
    return cls._from_config(copy.deepcopy(config), attn_implementation=attention)


def inputs(model: Any, seed: int = 1) -> dict[str, Any]:
    return random_batch(model, 3, 12, 7, seed=seed)


class Net(nn.Module):
    """The smallest model with dropout: (n, 8) → loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.dropout, self.outer = nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 4)

    def body(self, x: Tensor) -> Tensor:
        return self.dropout(torch.relu(self.inner(x)))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.outer(self.body(x)), labels)}


def data(**more: Any) -> dict[str, Any]:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
    return {"x": x, "labels": torch.tensor([0, 1, 2, 3, 0, 1]), **more}


def patched(forward: Callable[..., Any]) -> Callable[[nn.Module], None]:
    """A set-up that replaces the model's forward by a function of (model, **inputs)."""

    def set_up(model: nn.Module) -> None:
        model.forward = lambda **kwargs: forward(model, **kwargs)

    return set_up


@pytest.fixture(autouse=True)
def default_algorithms() -> Iterator[None]:
    """As in a new process, whatever ran before in this one."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# ------------------------------------------------------------------------------------------- what must be identical


@pytest.mark.parametrize(
    ("name", "attention", "precision"),
    [
        ("t5", "eager", "bf16"),
        ("gpt2", "sdpa", "fp32"),
        ("bert", "eager", "fp32"),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in product(("t5", "gpt2", "bert"), ("eager", "sdpa"), ("fp32", "bf16"))
            if one not in {("t5", "eager", "bf16"), ("gpt2", "sdpa", "fp32"), ("bert", "eager", "fp32")}
        ),
    ],
)
def test_what_is_bit_identical_passes(name: str, attention: str, precision: str) -> None:
    model = tiny(name, attention)
    for setup in ("fast", "max", "checkpoint"):
        assert same_gradients(model, inputs(model), b=setup, precision=precision, steps=2)


def test_other_set_ups_pass_and_the_result_says_what_was_compared() -> None:
    model = tiny()
    batches = [inputs(model, 1), inputs(model, 2)]
    found = same_gradients(model, batches, a="max", b="900 MiB", precision="float16", seed=3)
    assert found
    assert (found.identical, found.repeatable) == (True, True)
    assert (found.model, found.a, found.b) == ("T5ForConditionalGeneration", "max", "900 MiB")
    assert (found.steps, found.precision, found.seed, found.device) == (2, "fp16", 3, "cpu")
    assert {row.name for row in found.rows} == {name for name, _ in model.named_parameters()}
    assert str(found).splitlines() == [
        "Identical: max and 900 MiB, loss and 47 gradients (T5ForConditionalGeneration, 2 steps, fp16, cpu).",
        "Repeatable: two runs of max are identical.",
    ]
    assert len({loss for pair in found.losses for loss in pair}) == 2  # one a step: the weights were updated
    vit = tiny("vit").bfloat16()
    batch = inputs(vit)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    assert same_gradients(vit, batch, steps=1)


def test_the_losses_are_those_of_a_plain_loop() -> None:
    model = tiny()
    batches = [inputs(model, seed) for seed in range(3)]
    found = same_gradients(model.eval(), batches, seed=5)  # trained with dropout all the same
    torch.manual_seed(5)
    losses = []
    for batch in batches:
        model.zero_grad()
        loss = model.train()(**batch).loss
        loss.backward()
        losses.append(loss.item())
        torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert [a for a, _ in found.losses] == [b for _, b in found.losses] == pytest.approx(losses, rel=1e-6)
    assert len(set(losses)) == 3


def test_the_model_and_the_random_state_are_left_alone() -> None:
    class Counted(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(1))

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            self.steps += 1
            labels.clamp_(max=3)
            return super().forward(x + random.random() + float(np.random.rand()), labels)

    model = Counted().eval()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    batch = data(labels=torch.tensor([0, 1, 2, 3, 9, 1]), x=torch.randn(6, 8).requires_grad_())
    before = copy.deepcopy(vars(model)), copy.deepcopy(batch)
    torch.manual_seed(9), np.random.seed(9), random.seed(9)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with torch.no_grad():
        found = same_gradients(model, batch, b=lambda copied: None)
        assert not torch.is_grad_enabled()
    assert found.identical
    assert found.repeatable
    assert torch.equal(states[0], torch.get_rng_state())
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    assert not model.training
    assert model.steps.item() == 0
    assert vars(model).keys() == before[0].keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[0]["_modules"][name.split(".")[0]].get_parameter(name.split(".")[1]))
        assert torch.equal(parameter.grad, torch.full_like(parameter, 7.0))
    assert batch["x"].grad is None
    assert torch.equal(batch["labels"], before[1]["labels"])


def test_no_more_than_two_copies_are_held_at_a_time() -> None:
    alive: list[weakref.ref[nn.Module]] = []
    counts = []

    def watched(model: nn.Module) -> None:
        alive.append(weakref.ref(model))
        counts.append(sum(ref() is not None for ref in alive))

    assert same_gradients(Net(), data(), a=watched, b=watched)
    assert counts == [1, 1, 2]


def test_a_set_up_may_wrap_the_model_and_a_state_of_python_is_no_trouble() -> None:
    class Annealed(Net):
        calls = 0

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            self.calls += 1
            return {"loss": super().forward(x, labels)["loss"] * self.calls}

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **kwargs: Any) -> Any:
            return self.module(**kwargs)["loss"], None

    found = same_gradients(Annealed(), data(), b=Wrapper)
    assert found
    assert found.repeatable
    assert [row.name for row in found.rows] == ["inner.weight", "inner.bias", "outer.weight", "outer.bias"]


def test_sparse_gradients_and_gradients_of_inputs_are_compared() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4, sparse=True)

        def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
            return (self.table(ids) * scale).pow(2).mean()

    def doubled(model: Any) -> None:
        model.table.register_forward_hook(lambda module, args, out: 2 * out)

    batch = {"ids": torch.tensor([1, 2, 2, 5]), "scale": torch.ones(4, 4, requires_grad=True)}
    torch.manual_seed(0)
    model = Bag()
    assert same_gradients(model, batch, b=lambda copied: None)
    found = same_gradients(model, batch, b=doubled, steps=1)
    assert [row.name for row in found.differing] == ["inputs.scale", "table.weight"]
    assert all(row.error_b == pytest.approx(3) and row.error_a < 1e-6 and row.closer == "a" for row in found.differing)


@pytest.mark.slow
def test_compiled_code_draws_the_same_dropout_masks() -> None:
    found = same_gradients(Net(), data(), b="compiled")
    assert all(row.difference is None or row.difference < 1e-5 for row in found.rows)
    assert all(a == pytest.approx(b, rel=1e-5) for a, b in found.losses)


# ------------------------------------------------------------------------------------------------ what must be found


def forgetful(model: Any) -> None:
    """Checkpointing that does not restore the random state, so that the backward pass has other dropout masks."""
    model.train().forward = _forgetful(model)


def _forgetful(model: Any) -> Callable[..., Any]:
    def forward(x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = checkpoint(model.body, x, use_reentrant=False, preserve_rng_state=False)
        return {"loss": nn.functional.cross_entropy(model.outer(hidden), labels)}

    return forward


def test_checkpointing_with_other_dropout_masks_is_found() -> None:
    found = same_gradients(Net(), data(), b=forgetful)
    assert not found
    assert found.repeatable
    assert found.loss_steps[:1] == (2,)  # the forward pass of the first step is right
    first = [row.name for row in found.differing if row.steps[0] == 1]
    assert first[0] in ("inner.weight", "inner.bias")
    assert "outer.weight" not in first or first[-1].startswith("outer")
    assert all(row.closer == "a" and row.error_a < 1e-5 < row.error_b for row in found.differing if row.steps[0] == 1)
    report = found.report().splitlines()
    assert report[0].startswith("Different: stock and forgetful, the loss and 4 of 4 gradients")
    assert "First in forward order: inner, in step 1" in found.report()
    assert "only the backward pass differs" in found.report()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_the_framework_too_with_other_dropout_masks_is_found() -> None:
    model = tiny("bert")

    def set_up(copied: Any) -> None:
        copied.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})

    found = same_gradients(model, inputs(model), b=set_up, steps=1)
    assert not found
    assert not found.loss_steps
    assert found.differing[0].module.startswith("bert.embeddings")
    assert not [row for row in found.differing if row.name.startswith("cls.")]


def test_one_flipped_bit_of_a_dropout_mask_is_found() -> None:
    def flipped(model: Any) -> None:
        def flip(module: nn.Dropout, args: tuple[Tensor], out: Tensor) -> Tensor:
            x = args[0].reshape(-1)
            i = int(x.abs().argmax())
            flat = out.reshape(-1).clone()
            flat[i] = x[i] / (1 - module.p) if flat[i] == 0 else 0.0
            return flat.view(out.shape)

        model.encoder.block[1].layer[1].dropout.register_forward_hook(flip)

    model = tiny()
    found = same_gradients(model, inputs(model), b=flipped)
    assert not found
    assert found.loss_steps[0] == 1
    assert all(row.closer in ("a", None) for row in found.differing)
    assert found.differing[0].name == "shared.weight"


def test_one_flipped_bit_of_what_the_engine_saved_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from bwsk.reversible.t5 import attention

    first = []

    def flipped(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
        y, bits = real(x, p)
        if bits is not None and not first:
            first.append(True)
            bits[0] ^= 1
        return y, bits

    real = attention.dropout_forward
    monkeypatch.setattr(attention, "dropout_forward", flipped)
    model = tiny()
    found = same_gradients(model, inputs(model), steps=1)
    assert first
    assert not found
    assert not found.loss_steps
    assert {row.closer for row in found.differing} <= {"a", None, "equal"}
    assert found.differing[-1].module.startswith("encoder.block.0.layer.0")


def test_reentrant_checkpointing_without_gradients_is_found() -> None:
    model = tiny("vit")
    for parameter in model.vit.embeddings.parameters():
        parameter.requires_grad_(False)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        found = same_gradients(model, inputs(model), b="checkpoint-reentrant", steps=1)
    assert not found
    first = found.differing[0]
    assert first.name.startswith("vit.layers.0") or first.name.startswith("vit.encoder.layer.0")
    assert first.missing == "b"
    assert first.error_a == pytest.approx(0, abs=1e-5)
    assert (first.difference, first.error_b, first.closer) == (None, None, None)
    assert "none in b" in found.report()
    assert same_gradients(model, inputs(model), b="checkpoint", steps=1)


def test_a_gradient_of_zeros_is_not_none() -> None:
    def forward(model: Any, x: Tensor, labels: Tensor) -> Tensor:
        return model.outer(x.new_ones(6, 16)).pow(2).mean() + 0 * model.inner(x).sum()

    def shorter(model: Any, x: Tensor, labels: Tensor) -> Tensor:
        return model.outer(x.new_ones(6, 16)).pow(2).mean()

    found = same_gradients(Net(), data(), a=patched(forward), b=patched(shorter))
    assert [(row.name, row.missing) for row in found.differing] == [("inner.weight", "b"), ("inner.bias", "b")]
    assert not same_gradients(Net(), data(), a=patched(shorter), b=patched(forward))


def test_a_loss_alone_that_differs_is_found() -> None:
    def higher(model: Any) -> None:
        model.register_forward_hook(lambda module, args, out: {"loss": out["loss"] + 1.0})

    found = same_gradients(Net(), data(), b=higher)
    assert not found
    assert not found.differing
    assert found.loss_steps == (1, 2, 3)
    assert str(found).startswith("Different: stock and higher, the loss (Net, 3 steps, fp32, cpu).")


def filtered(model: Any) -> None:
    """Labels of -100 are dropped before the loss, sequence by sequence: the mean of means is not the mean."""

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        rows = zip(logits[:, :-1], labels[:, 1:], strict=True)
        means = [nn.functional.cross_entropy(row[kept != -100], kept[kept != -100]) for row, kept in rows]
        return torch.stack(means).mean()

    model.loss_function = loss


def test_a_filtered_cross_entropy_is_found() -> None:
    model = tiny("gpt2")
    batch = inputs(model)
    assert (batch["labels"] == -100).any()
    found = same_gradients(model, batch, b=filtered)
    assert not found
    assert found.loss_steps == (1, 2, 3)
    assert len(found.differing) == len(found.rows)
    assert all(row.closer in ("a", None) for row in found.rows)


def test_a_filtered_cross_entropy_of_the_same_value_is_compared_bit_by_bit() -> None:
    """Whether dropping rows changes the order of sums depends on the processor; the answer is that of a plain loop."""
    torch.manual_seed(0)
    model = nn.Module()
    model.table = nn.Parameter(torch.randn(97, 33))

    def forward(model: Any, x: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(x @ model.table.t(), labels)

    def dropped(model: Any, x: Tensor, labels: Tensor) -> Tensor:
        return forward(model, x[labels != -100], labels[labels != -100])

    batch = {"x": torch.randn(300, 33), "labels": torch.randint(0, 97, (300,))}
    batch["labels"][::3] = -100
    results = []
    for run in (forward, dropped):
        model.zero_grad()
        loss = run(model, **batch)
        loss.backward()
        results.append([loss.detach(), model.table.grad])
    found = same_gradients(model, batch, a=patched(forward), b=patched(dropped), steps=1)
    assert [not found.loss_steps, not found.differing] == list(map(torch.equal, *results))
    assert all(row.difference < 1e-5 for row in found.differing)


# ------------------------------------------------------------------------------------- float64, and what is repeatable


def test_the_more_exact_side_is_named() -> None:
    def rounded(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.register_hook(lambda g: g.bfloat16().float())

    def exact(model: Any) -> None:
        model.double()
        model.register_forward_pre_hook(
            lambda module, args, kw: (args, {**kw, "x": kw["x"].double()}), with_kwargs=True
        )

    found = same_gradients(Net(), data(), b=rounded, steps=1)
    assert {row.closer for row in found.differing} == {"a"}
    assert all(1e-4 < row.error_b < 1e-2 for row in found.differing)
    found = same_gradients(Net(), data(), b=exact, steps=1)  # also: another dtype is a difference
    assert {row.closer for row in found.rows} == {"b"}
    assert all(row.error_b < 1e-14 for row in found.rows)


def test_without_a_reference_it_says_why() -> None:
    class OwnMasks(Net):
        def body(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.inner(x))
            return hidden * (torch.rand(hidden.shape, dtype=hidden.dtype) > 0.3)

    class Narrow(Net):
        def body(self, x: Tensor) -> Tensor:
            return super().body(x.float())

    def doubled(model: Any) -> None:
        model.outer.register_forward_hook(lambda module, args, out: 2 * out)

    found = same_gradients(OwnMasks(), data(), b=doubled)
    assert "No errors against float64: the float64 copy has another loss" in found.report()
    found_narrow = same_gradients(Narrow(), data(), b=doubled)
    assert "the model does not run in float64 (mat1 and mat2 must have the same dtype" in found_narrow.report()
    for rows in (found.rows, found_narrow.rows):
        assert all(row.error_a is row.error_b is row.closer is None and row.difference > 0 for row in rows)


def test_an_exact_gradient_of_zero_has_no_relative_errors() -> None:
    """The gradient of a key's bias: softmax does not see what is added to all scores of a row."""
    model = tiny("bert")

    def scaled(copied: Any) -> None:
        copied.register_forward_hook(lambda module, args, out: {"loss": out.loss * 1.5})

    found = same_gradients(model, inputs(model), b=scaled, steps=1)
    keys = [row for row in found.differing if row.name.endswith("key.bias")]
    assert keys
    assert all(row.error_a is row.error_b is row.closer is None for row in keys)
    assert {row.closer for row in found.differing if row not in keys} == {"a"}


@pytest.fixture
def wavering() -> nn.Module:
    calls = itertools.count()

    class Wavering(Net):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            penalty = self.outer.bias.sum() * next(calls)
            return {"loss": super().forward(x, labels)["loss"] + penalty}

    return Wavering()


def test_a_model_that_is_not_repeatable_is_named_first(wavering: nn.Module) -> None:
    found = same_gradients(wavering, data(), b=lambda model: None, steps=1)
    assert not found.repeatable
    assert found.not_repeatable == ("loss", "outer.bias")
    assert [row.name for row in found.rows if not row.repeatable] == ["outer.bias"]
    line = found.report().splitlines()[1]
    assert line == (
        "Not repeatable: two runs of stock differ in loss, outer.bias; set torch.use_deterministic_algorithms(True)."
    )


def test_what_to_set_names_what_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in what_to_set(gpu)
    assert "use_deterministic_algorithms(True)" in what_to_set(gpu)
    assert "CUBLAS" not in what_to_set(cpu)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert what_to_set(gpu) == "set torch.use_deterministic_algorithms(True)"
        torch.use_deterministic_algorithms(True)
        assert "on already" in what_to_set(cpu)
        assert "eager attention" in what_to_set(gpu)
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_when_two_tensors_are_identical(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 1.0], [float("nan"), float("inf")]], dtype=dtype)
    negative = x.clone()
    negative[0, 0] = -0.0
    payload = x.clone()
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    payload.view(kind)[1, 0] += 1  # another NaN
    other = x.clone()
    other.view(kind)[0, 1] += 1  # the next number
    for y, same in (
        (x.clone(), True),
        (x.t().contiguous().t(), True),
        (negative, True),
        (payload, False),
        (other, False),
    ):
        assert identical(x, y) is same
        assert (fingerprint(x) == fingerprint(y)) is same
    assert not identical(x, None)
    assert not identical(None, x)
    assert identical(None, None)
    assert not identical(torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.bfloat16))
    assert not identical(x, x.reshape(-1))
    assert not identical(x, x.to(torch.float64 if dtype is not torch.float64 else torch.float32))


# ----------------------------------------------------------------------------------------------------------- reports


def test_a_report_is_short_and_strict_json() -> None:
    model = tiny()
    found = same_gradients(model, inputs(model), b=lambda copied: copied.register_forward_hook(_nan))
    assert not found
    assert "(a) and not finite (b)" in found.report()
    value = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert value["losses"][0][1] is None
    assert value["identical"] is False
    assert value["rows"][0] == {
        "name": "shared.weight", "module": "shared", "steps": [1, 2, 3], "repeatable": True, "missing": None,
        "difference": None, "error_a": value["rows"][0]["error_a"], "error_b": None, "identical": False, "closer": None,
    }  # fmt: skip
    assert value["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    lines = found.report().splitlines()
    assert lines[-1] == "and 37 more"
    assert len(lines) < 20
    assert "and 45 more" in found.report(limit=2)
    assert "\n" not in repr(found)


def _nan(module: nn.Module, args: Any, out: Any) -> Any:
    return {"loss": out.loss * float("nan")}


def test_rows_are_in_forward_order_and_later_differences_come_later() -> None:
    class Backwards(nn.Module):
        """Runs its layers in another order than it lists them."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.last, self.first, self.scale = nn.Linear(8, 1), nn.Linear(8, 8), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x))).pow(2).mean() * self.scale.sum()

    def doubled(model: Any) -> None:
        model.first.bias.register_hook(lambda g: 2 * g)

    found = same_gradients(Backwards(), {"x": data()["x"]}, b=doubled)
    assert [row.name for row in found.rows] == ["scale", "first.weight", "first.bias", "last.weight", "last.bias"]
    assert found.differing[0].name == "first.bias"
    assert found.differing[0].steps == (1, 2, 3)
    assert {row.steps for row in found.differing[1:]} == {(2, 3)}
    assert all(row.difference is None for row in found.differing[1:])
    assert "First in forward order: first, in step 1, where 1 gradient differs." in found.report()


def test_the_cache_that_checkpointing_switches_off_is_named() -> None:
    """Whether its layout changes bits depends on the processor; if it does, the report says so."""
    model = tiny()
    batch = {name: value for name, value in inputs(model).items() if name != "use_cache"}
    found = same_gradients(model, batch, b="checkpoint", steps=1)
    hint = "give use_cache=False in the batch"
    assert hint in found.hint
    assert (hint in found.report()) is not found.identical
    assert same_gradients(model, batch | {"use_cache": False}, b="checkpoint", steps=1).hint == ""
    assert same_gradients(model, batch, steps=1).hint == ""


# ------------------------------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": "quick"}, r"b: found 'quick'; give stock, checkpoint, .* a budget \(fast, .* or a function"),
        ({"a": 3}, "a: found 3; give stock"),
        ({"a": None}, "a: found None"),
        ({"b": nn.Linear(1, 1)}, "b: found a Linear; give a function"),
        ({"b": "fast"}, "make_reversible: found Net, not a transformers model"),
        ({"b": "checkpoint"}, "checkpoint: Net has no gradient checkpointing of its own; give a function"),
        ({"b": lambda model: nn.Linear(1, 1)}, "has no parameter in common with the model"),
        ({"precision": "fp8"}, "precision: found 'fp8'"),
        ({"steps": 0}, "steps: must be a whole number of at least 1, found 0"),
        ({"batch": []}, r"batch: found \[\]; give inputs by name"),
        ({"batch": 3}, "batch: found int; give inputs by name"),
        ({"batch": iter([data()])}, "batch: found list_iterator; give inputs by name"),
        ({"batch": [data()], "steps": 2}, "batch: found 1 batches for 2 steps; give one per step"),
        ({"batch": data(mask=torch.ones(2))}, r"Net \(a: stock\): does not run on x \(6, 8\), .*unexpected keyword"),
        ({"batch": data(x=torch.full((6, 8), float("inf")))}, r"Net \(a: stock\): the loss of step 1 is nan; give a"),
        ({"model": Net}, "found type, not a model"),
        ({"model": Net().to("meta")}, r"Net has weights without values \(device meta\)"),
        ({"model": nn.ReLU()}, "ReLU has no parameters"),
        ({"model": Net().requires_grad_(False)}, "returns a loss that requires no gradient"),
        ({"a": patched(lambda model, x, labels: model.outer.weight.sum(0))}, r"returns a loss of shape \(16,\)"),
        ({"a": patched(lambda model, **kwargs: None)}, "returns no loss for x .*; give a batch with labels"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)  # fmt: skip
def test_bad_input_is_one_line(change: dict[str, Any], message: str) -> None:
    arguments = {"model": Net(), "batch": data(), "b": "stock"} | change
    with pytest.raises(BwskError, match=message) as error:
        same_gradients(**arguments)
    assert "\n" not in str(error.value)


def test_models_that_give_no_loss_or_are_refused_or_reversible() -> None:
    torch.manual_seed(0)
    encoder = T5EncoderModel(T5Config(**T5))
    ids = {"input_ids": torch.ones(2, 5, dtype=torch.long)}
    with pytest.raises(BwskError, match=r"T5EncoderModel \(a: stock\): returns no loss for input_ids \(2, 5\)"):
        same_gradients(encoder, ids)
    model = tiny()
    with pytest.raises(BwskError, match="returns no loss for"):
        same_gradients(model, {"input_ids": ids["input_ids"], "decoder_input_ids": ids["input_ids"]})
    with pytest.raises(BwskError, match="this step cannot go below"):
        same_gradients(model, inputs(model), b=0.01)
    make_reversible(model)
    with pytest.raises(BwskError, match=r"is reversible already; call undo\(\)"):
        same_gradients(model, inputs(model))


def test_a_backward_pass_that_fails_is_one_line() -> None:
    def broken(model: Any) -> None:
        model.outer.weight.register_hook(lambda g: g.no_such_thing)

    with pytest.raises(BwskError, match=r"Net \(b: broken\): its backward pass fails in step 1: .*no_such_thing"):
        same_gradients(Net(), data(), b=broken)


def test_the_plan_is_for_the_shape_of_the_batches() -> None:
    t5, gpt2, vit = tiny(), tiny("gpt2"), tiny("vit")
    assert shape_of(t5, [random_batch(t5, 3, 12, 7, seed=0), random_batch(t5, 2, 9, 8, seed=0)]) == (3, 12, 8)
    assert shape_of(gpt2, [random_batch(gpt2, 3, 12, None, seed=0)]) == (3, 12, None)
    assert shape_of(gpt2, [{"inputs_embeds": torch.zeros(2, 5, 32)}]) == (2, 5, None)
    assert shape_of(vit, [random_batch(vit, 3, 1, None, seed=0)]) == (3, 1, None)
    assert shape_of(Net(), [data()]) is None
    with pytest.raises(BwskError, match=r"found input_ids \(3, 40\)"):
        same_gradients(gpt2, {"input_ids": torch.ones(3, 40, dtype=torch.long)}, a="fast")


# ------------------------------------------------------------------------------------------------------- random batches


def test_random_batches_are_in_range_and_repeatable() -> None:
    torch.manual_seed(0)
    states = torch.get_rng_state()
    t5, vit = tiny(), tiny("vit")
    one = random_batch(t5, 8, 40, 20, seed=1)
    assert all(torch.equal(one[name], random_batch(t5, 8, 40, 20, seed=1)[name]) for name in ("input_ids", "labels"))
    assert not torch.equal(one["input_ids"], random_batch(t5, 8, 40, 20, seed=2)["input_ids"])
    assert (one["input_ids"] == 1).nonzero().tolist() == [[row, 38] for row in range(8)]  # the end, before padding
    ordinary = one["input_ids"][:, :38]
    assert (ordinary.min(), ordinary.max()) == (2, 95)  # neither padding (0) nor the end (1)
    assert one["attention_mask"].tolist() == [[1] * 39 + [0]] + [[1] * 40] * 7
    assert (one["labels"] == -100).sum() == 5
    assert len(one["labels"].unique()) > 50
    pixels = random_batch(vit, 8, 1, None, seed=1)
    assert pixels["pixel_values"].std() > 0.5
    assert set(pixels["labels"].tolist()) == {0, 1}
    classes = BertForSequenceClassification(BertConfig(vocab_size=96, num_labels=5, **SIZES))
    assert set(random_batch(classes, 64, 5, None, seed=1)["labels"].tolist()) == set(range(5))
    torch.set_rng_state(states)


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    config = copy.deepcopy(MODELS["t5"][1])
    config.architectures = ["T5ForConditionalGeneration"]
    config.save_pretrained(found)
    return found


def status(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bwsk", "gradcheck", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_the_command_says_what_is_identical_and_writes_json(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "same.json"
    words = ["--input-length", "8", "--target-length", "5", "--batch", "1", "--steps", "2", "--json", str(out)]
    assert status(monkeypatch, str(folder), *words, "--attention", "sdpa", "--precision", "bf16") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("Identical: stock and fast, loss and 47 gradients")
    assert "gradcheck: 6/6 pass (100%)" in shown.err
    value = json.loads(out.read_text())
    assert (value["model_source"], value["attention"], value["precision"]) == (str(folder), "sdpa", "bf16")
    assert value["identical"] is True
    assert len(value["rows"]) == 47


def test_the_command_shows_what_differs_in_80_columns(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bwsk.cli.tables as tables

    narrow = Console(width=80, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(tables, "console", lambda: narrow)
    assert status(monkeypatch, str(folder), "--b", "balanced", "--steps", "1") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Different: stock and balanced, ")  # the loss too, or its gradients alone
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("and ")
    assert len(lines) <= 35


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--b", "quick"], "--b: found 'quick'"),
        (["--a", "7"], "--a: found 7.0"),
        (["--attention", "flash"], "--attention: found 'flash', must be one of eager, sdpa"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--batch", "0"], "batch: must be a whole number of at least 1, found 0"),
        (["--precision", "fp8"], "precision: found 'fp8'"),
        (["--b", "0.01", "--steps", "1"], "this step cannot go below"),
        (["--nothing"], "no such option: --nothing; see: bwsk gradcheck --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_of_the_command_are_one_line_and_status_2(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    assert status(monkeypatch, str(folder), *words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    error = [line for line in shown.err.splitlines() if line.startswith("bwsk: error: ")]
    assert len(error) == 1
    assert message in error[0]


def test_the_same_seed_gives_the_same_answer(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = []
    for seed in ("1", "1", "2"):
        out = tmp_path / "out.json"
        status(monkeypatch, str(folder), "--b", "stock", "--seed", seed, "--steps", "1", "--json", str(out))
        values.append(json.loads(out.read_text()))
    assert values[0] == values[1]
    assert values[0]["losses"] != values[2]["losses"]


def test_it_is_public() -> None:
    assert bwsk.same_gradients is same_gradients
    assert isinstance(same_gradients(Net(), data(), b="stock", steps=1), GradientComparison)
