"""Never silently anything but the stock model: what the engine does not know is refused, or runs its own code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config
from transformers.loss import loss_utils
from transformers.models.t5 import modeling_t5 as t5

from bwsk import BwskError, make_reversible

Stock = transformers.T5ForConditionalGeneration
SHAPE = {"batch": 3, "input_length": 12, "target_length": 7}


def tiny(cls: type = Stock) -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
    return cls(T5Config(**sizes, decoder_start_token_id=0, attn_implementation="eager")).train()


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=96)
    ).train()


def tokens(rows: int = 3, length: int = 12) -> Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, **batch: Any) -> list[Tensor]:
    """Loss and gradients of a step with dropout."""
    model.zero_grad()
    torch.manual_seed(2)
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


class Loud(Stock):
    """A loss of its own."""

    def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        out = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        out.loss = out.loss * 2
        return out


Loud.__name__ = Loud.__qualname__ = "T5ForConditionalGeneration"


class Plain(Stock):
    """A method more, and nothing else."""

    def summary(self) -> str:
        return "T5"


def wrapped(method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: method(self, *args, **kwargs)


def test_a_subclass_is_known_by_what_it_replaces_and_not_by_its_name() -> None:
    with pytest.raises(BwskError, match=r"T5ForConditionalGeneration of .* has a forward of its own"):
        make_reversible(tiny(Loud), "fast", **SHAPE)
    stock, ours = tiny(Plain), tiny(Plain)
    make_reversible(ours, "fast", **SHAPE)
    batch = {"input_ids": tokens(), "labels": tokens(3, 7)}
    assert all(map(torch.equal, step(stock, **batch), step(ours, **batch)))
    assert type(ours.lm_head.forward).__name__ == "PatchedForward"


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (t5.T5DenseActDense, "forward"),
        (t5.T5LayerNorm, "forward"),
        (t5.T5Attention, "forward"),
        (t5.T5Attention, "compute_bias"),
        (t5.T5Block, "forward"),
        (t5.T5Stack, "forward"),
        (Stock, "forward"),
        (nn.Linear, "forward"),
        (nn.Dropout, "forward"),
        (nn.CrossEntropyLoss, "forward"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_patched_class_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    model = tiny()
    monkeypatch.setattr(owner, name, wrapped(getattr(owner, name)))
    with pytest.raises(BwskError, match=rf"{owner.__name__}.*(test_reversible_stock.py|replaced|<lambda>)"):
        make_reversible(model, "fast", **SHAPE)
    monkeypatch.undo()
    make_reversible(model, "fast", **SHAPE)


class _Loss(nn.CrossEntropyLoss):
    def forward(self, *args: Any) -> Tensor:
        return 2 * super().forward(*args)


@pytest.mark.parametrize(
    ("home", "name", "instead"),
    [
        (t5, "CrossEntropyLoss", _Loss),
        (t5, "eager_attention_forward", lambda *args, **kwargs: None),
        (nn.functional, "cross_entropy", wrapped(nn.functional.cross_entropy)),
        (nn.functional, "dropout", wrapped(nn.functional.dropout)),
    ],
    ids=["loss", "attention", "functional cross_entropy", "functional dropout"],
)
def test_a_function_that_is_looked_up_elsewhere_is_refused(
    monkeypatch: pytest.MonkeyPatch, home: Any, name: str, instead: Any
) -> None:
    monkeypatch.setattr(home, name, instead)
    with pytest.raises(BwskError, match=f"{name}.* has been replaced"):
        make_reversible(tiny(), "fast", **SHAPE)


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = loss_utils.fixed_cross_entropy
    monkeypatch.setattr(loss_utils, "fixed_cross_entropy", lambda *args, **kwargs: 2 * plain(*args, **kwargs))


def test_a_causal_loss_that_is_not_transformers_own_stays(doubled: None) -> None:
    stock, ours = llama(), llama()
    make_reversible(ours, "fast", batch=3, input_length=12)
    batch = {"input_ids": tokens(), "labels": tokens()}
    assert all(map(torch.equal, step(stock, **batch), step(ours, **batch)))


def test_stacks_that_are_not_where_the_config_says_are_refused() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    class Encoder(t5.T5Stack):
        pass

    model = tiny()
    model.encoder = Wrapper(model.encoder)
    with pytest.raises(BwskError, match="the encoder is not transformers' own T5 stack"):
        make_reversible(model, "fast", **SHAPE)
    model = tiny()
    model.encoder.__class__ = Encoder
    with pytest.raises(BwskError, match="the encoder is not transformers' own T5 stack"):
        make_reversible(model, "fast", **SHAPE)
    for change in (lambda blocks: blocks[:1], lambda blocks: nn.ModuleList([blocks[0], blocks[0]])):
        model = tiny()
        model.encoder.block = change(model.encoder.block)
        with pytest.raises(BwskError, match="has 1 blocks of its own where its config says 2"):
            make_reversible(model, "fast", **SHAPE)


@pytest.mark.parametrize("budget", ["fast", "max"])
@pytest.mark.parametrize("extra", ["none", "number", "tensor", "shifted", "both"])
def test_the_causal_loss_of_a_trainer_has_the_stock_bits_and_one_copy_of_the_logits(budget: str, extra: str) -> None:
    labels = tokens()
    labels[:, :2] = -100
    batch: dict[str, Any] = {"input_ids": tokens(), "labels": labels}
    if extra in ("number", "tensor", "both"):
        batch["num_items_in_batch"] = 17 if extra == "number" else torch.tensor(17)
    if extra in ("shifted", "both"):
        batch["shift_labels"] = tokens().roll(1, 0)
    for make in (llama, lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96)).train()):
        torch.manual_seed(0)
        stock = make()
        ours = copy.deepcopy(stock)
        make_reversible(ours, budget, batch=3, input_length=12)
        assert all(map(torch.equal, step(stock, **batch), step(ours, **batch)))
        assert ours.zero_grad() is None
        assert "CrossEntropyNode" in _nodes(ours(**batch).loss)


def _nodes(loss: Tensor) -> str:
    found, node = [], loss.grad_fn
    while node is not None:
        found.append(node.name())
        node = node.next_functions[0][0] if node.next_functions else None
    return " ".join(found)


def test_every_module_sees_its_own_config_and_its_own_attention_function() -> None:
    """A module may do other things by the name of its attention implementation, or call another eager function."""
    seen = []
    ours = llama()
    configs = [module.config for module in ours.modules() if hasattr(module, "config")]
    make_reversible(ours, "fast", batch=3, input_length=12)
    assert [module.config for module in ours.modules() if hasattr(module, "config")] == configs
    ours.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args: seen.append(module.config._attn_implementation)
    )
    ours(input_ids=tokens(), labels=tokens()).loss.backward()
    assert set(seen) == {"sdpa"}
    ours.set_attn_implementation("eager")
    stock = llama()
    stock.set_attn_implementation("eager")
    for mode in (True, False):
        ours.train(mode), stock.train(mode)
        assert torch.equal(ours(input_ids=tokens()).logits, stock(input_ids=tokens()).logits)


def test_a_replica_of_data_parallel_runs_its_own_weights() -> None:
    """As `nn.DataParallel` makes them: modules of their own with weights of their own, here twice the original's."""

    def replica(model: nn.Module) -> nn.Module:
        modules = list(model.modules())
        number = {module: i for i, module in enumerate(modules)}
        copies = [module._replicate_for_data_parallel() for module in modules]
        for module, twin in zip(modules, copies, strict=True):
            twin._modules = {k: None if c is None else copies[number[c]] for k, c in module._modules.items()}
            twin._parameters = {
                k: None if p is None else nn.Parameter(2 * p.detach()) for k, p in module._parameters.items()
            }
        return copies[0]

    batch = {"input_ids": tokens(), "labels": tokens(3, 7)}
    stock, ours = tiny(), tiny()
    make_reversible(ours, "max", **SHAPE)
    before = step(ours, **batch)
    assert all(map(torch.equal, step(replica(stock), **batch), step(replica(ours), **batch)))
    assert all(map(torch.equal, before, step(ours, **batch)))  # the original still runs the engine
