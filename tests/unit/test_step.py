"""A step: the plain loop's bits, no wait for the device, one line where a backend cannot run, graphs equal to eager."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
    masking_utils,
)
from transformers.models.t5 import modeling_t5
from transformers.utils import import_utils

from bwsk import make_reversible
from bwsk.errors import BwskError
from bwsk.study.device import configure
from bwsk.study.params import Precision, TrainParams
from bwsk.study.train_step import TrainStep, check_backend, make_optimizer, make_step

RATES = [1e-3, 2e-3, 1.5e-3, 5e-4]
FAMILY = {
    "t5": (T5Config, T5ForConditionalGeneration),
    "mt5": (MT5Config, MT5ForConditionalGeneration),
    "umt5": (UMT5Config, UMT5ForConditionalGeneration),
}
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA device")


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Training's settings on CUDA; what was there before afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    configure(torch.device("cuda"), threads=torch.get_num_threads(), deterministic=True, tf32=False)
    yield
    torch.use_deterministic_algorithms(before)


def tiny(dropout: float = 0.1, device: str = "cpu") -> T5ForConditionalGeneration:
    config = T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=120, dropout_rate=dropout,
        decoder_start_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(5)
    return T5ForConditionalGeneration(config).to(device).train()


def batches(model: torch.nn.Module, count: int = 4) -> list[dict[str, torch.Tensor]]:
    """Batches of 4, the last one of 2, as an epoch ends."""
    generator = torch.Generator().manual_seed(1)
    device = next(model.parameters()).device
    sizes = [2 if i == count - 1 else 4 for i in range(count)]
    tokens = [torch.randint(1, 120, (size, 24), generator=generator).to(device) for size in sizes]
    return [{"input_ids": t[:, :12], "labels": t[:, 12:].contiguous()} for t in tokens]


def stepped(model: torch.nn.Module, backend: str = "eager", precision: Precision = "fp32") -> TrainStep:
    train = TrainParams(precision=precision)
    scaler = torch.amp.GradScaler(next(model.parameters()).device.type, enabled=precision == "fp16")
    return make_step(backend, model, make_optimizer(model, train, 1e-3), scaler, precision, train.max_grad_norm)


def run(step: TrainStep, rates: list[float] = RATES) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(9)
    return [step(batch, lr) for batch, lr in zip(batches(step.model), rates, strict=True)]


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_eager_step_is_the_plain_loop(precision: Precision) -> None:
    model, plain = tiny(), tiny()
    results = run(stepped(model, precision=precision))
    optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0.01, fused=True)
    torch.manual_seed(9)
    for batch, lr, (loss, norm) in zip(batches(plain), RATES, results, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            expected = plain(**batch, use_cache=False).loss  # with a cache: other sums, other rounding
        expected.backward()
        assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0))
        assert torch.equal(loss, expected)
        optimizer.step()
        optimizer.zero_grad()
    assert same(model, plain)
    assert not same(model, tiny())


class _Operators(TorchDispatchMode):
    """Notes every operator that is called, with the shapes and types of the tensors that go in and come out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[torch.Size, torch.dtype]]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, torch.Tensor)]
        self.seen.append((str(function), [(tensor.shape, tensor.dtype) for tensor in tensors]))
        return result

    @property
    def synchronisations(self) -> list[str]:
        """Those that make the host wait for a device: they fetch a value, or a size that depends on one."""
        waits = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_consecutive")
        return [name for name, _ in self.seen if name.split(".")[1] in waits]


@pytest.mark.parametrize("mode", ["conventional", "reversible"])
def test_a_step_does_not_wait_for_the_device(mode: str) -> None:
    model = tiny()
    if mode == "reversible":
        make_reversible(model, "fast", batch=4, input_length=12, target_length=12)
    step = stepped(model)
    batch = batches(model)[0]
    step(batch, 1e-3)
    with _Operators() as noted:
        loss, _ = step(batch, 1e-3)
    assert noted.synchronisations == []
    with _Operators() as noted:
        loss.item()
    assert noted.synchronisations == ["aten._local_scalar_dense.default"]


class _Graph:
    """Stands in for a CUDA graph: a step "recorded" into it runs on the CPU, and a replay is only counted."""

    def __init__(self) -> None:
        self.operators = _Operators()
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a `GraphStep` record on the CPU; meanwhile transformers takes the step for one that is being recorded."""

    @contextmanager
    def record(graph: _Graph, **options: object) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch, graph.operators:
            patch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
            assert import_utils.is_tracing()
            yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": _Graph,
        "graph": record,
        "graph_pool_handle": lambda: None,
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda stream: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("bwsk.study.train_step.check_backend", lambda backend, device: None)


def family(kind: str, attention: str = "eager", dropout: float = 0.1) -> torch.nn.Module:
    config_class, cls = FAMILY[kind]
    config = config_class(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=120, dropout_rate=dropout,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(5)
    return cls._from_config(config, attn_implementation=attention).train()


def ask_as_in_5_17(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.17 makes every mask of a step that it takes for traced, also without padding."""
    for name in ("_ignore_bidirectional_mask_sdpa", "_ignore_causal_mask_sdpa"):
        stock = getattr(masking_utils, name)

        def ignored(padding_mask, *args, stock=stock, **options):
            return not masking_utils.is_tracing(padding_mask) and stock(padding_mask, *args, **options)

        monkeypatch.setattr(masking_utils, name, ignored)


def eager_and_recorded(model: torch.nn.Module) -> tuple[list, list]:
    """The operators of an eager step, and of the same step being recorded."""
    twin = copy.deepcopy(model)
    batch = {name: tensor.contiguous() for name, tensor in batches(model)[0].items()}  # as those of a graph are
    step = stepped(model)
    step(batch, 1e-3)
    with _Operators() as eager:
        step(batch, 1e-3)
    step = stepped(twin, "graph")
    step(batch, 1e-3)
    (recorded,) = step.graphs.values()
    return eager.seen, recorded.graph.operators.seen


@pytest.mark.parametrize("release", ["installed", "5.17"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["t5", "t5 fast", "t5 max", "mt5", "umt5"])
def test_a_recorded_step_calls_the_operators_of_eager(
    kind: str, attention: str, release: str, recording: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if release == "5.17":
        ask_as_in_5_17(monkeypatch)
    kind, _, budget = kind.partition(" ")
    model = family(kind, attention)
    if budget:
        make_reversible(model, budget, batch=4, input_length=12, target_length=12)
    eager, recorded = eager_and_recorded(model)
    assert len(eager) > 500
    assert recorded == eager
    # No mask is made of a number on the host, which could not be recorded (the token that decoding starts from is).
    assert not any(tensors[0][1].is_floating_point for name, tensors in recorded if "lift_fresh" in name)
    assert import_utils.is_tracing is masking_utils.is_tracing


def test_an_operator_that_is_only_recorded_is_seen(recording: None) -> None:
    model = tiny()
    norm = model.encoder.final_layer_norm
    norm.register_forward_hook(lambda module, args, output: output.sin() if import_utils.is_tracing() else None)
    eager, recorded = ([name for name, _ in seen] for seen in eager_and_recorded(model))
    assert (eager.count("aten.sin.default"), recorded.count("aten.sin.default")) == (0, 1)


def test_padding_is_masked_in_a_recorded_step_and_has_a_graph_of_its_own(recording: None) -> None:
    """Recorded, a step reads no mask's values: it also masks where nothing is padded, which changes no bit."""
    stock = tiny()
    batch = batches(stock)[0]
    for padded in (0, 5):
        mask = torch.ones_like(batch["input_ids"])
        mask[1, 12 - padded :] = 0
        model, twin = copy.deepcopy(stock), copy.deepcopy(stock)
        eager, graph = stepped(model), stepped(twin, "graph")
        for step, calls in ((eager, 2), (graph, 1)):  # a graph's first step is followed by its recording
            torch.manual_seed(9)
            for _ in range(calls):
                step({**batch, "attention_mask": mask}, 1e-3)
        assert same(model, twin)
        (recorded,) = graph.graphs.values()
        assert recorded.graph.operators.synchronisations == []
        graph(batch, 1e-3)
        assert [recorded.graph.replays for recorded in graph.graphs.values()] == [0, 0]
        graph({**batch, "attention_mask": mask}, 1e-3)
        assert [recorded.graph.replays for recorded in graph.graphs.values()] == [1, 0]


def test_position_buckets_are_computed_once_and_generation_is_the_stock_models() -> None:
    model, stock = tiny(), tiny()
    step = stepped(model)
    calls = 0
    attention = model.encoder.block[0].layer[0].SelfAttention
    original = attention._relative_position_bucket

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    attention._relative_position_bucket = counted
    run(step, RATES)
    assert calls == 1
    stock.load_state_dict(model.state_dict())
    inputs = batches(model)[0]["input_ids"]
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    assert torch.equal(model.eval().generate(inputs, **options), stock.eval().generate(inputs, **options))


def test_the_causal_mask_is_made_once_and_is_the_stock_models(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, made = [], []
    original = modeling_t5.create_causal_mask

    def noted(**options):
        asked.append(options["attention_mask"])
        made.append(original(**options))
        return made[-1]

    monkeypatch.setattr(modeling_t5, "create_causal_mask", noted)
    model = tiny()
    run(stepped(model))
    full, *others = asked[:-1]
    assert all(other is full for other in others)
    assert asked[-1].shape[0] == 2
    tiny()(**batches(model)[0], use_cache=False)
    assert asked[-1] is None
    assert torch.equal(made[-1], full)
    model.eval()(**batches(model)[0], use_cache=False)
    assert asked[-1] is None


def test_a_graph_on_the_cpu_is_refused_in_one_line() -> None:
    with pytest.raises(BwskError, match=r"^train\.backend: found graph, which needs a CUDA device; set eager or"):
        stepped(tiny(), backend="graph")


def test_compiling_without_a_compiler_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BwskError, match=r"^train\.backend: found compile, which needs a C\+\+ compiler"):
        check_backend("compile", torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["conventional", "reversible"])
def test_a_compiled_step_computes_the_same_and_repeats_its_bits(mode: str) -> None:
    def one() -> tuple[torch.nn.Module, list]:
        model = tiny(dropout=0.0)
        if mode == "reversible":
            make_reversible(model, "fast", batch=4, input_length=12, target_length=12)
        return model, run(stepped(model, backend="compile"))

    (model, results), (again, _) = one(), one()
    assert same(model, again)
    plain = tiny(dropout=0.0)
    for (loss, norm), (expected_loss, expected_norm) in zip(results, run(stepped(plain)), strict=True):
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(norm, expected_norm, rtol=1e-4, atol=0)
    if mode == "reversible":  # its nodes run eagerly inside
        assert same(model, plain)


@CUDA
@pytest.mark.parametrize("mode", ["conventional", "fast", "max", "balanced"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_graph_has_the_bits_of_eager(mode: str, precision: Precision, deterministic: None) -> None:
    found = []
    for backend in ("eager", "graph"):
        model = tiny(device="cuda")
        if mode != "conventional":
            make_reversible(model, mode, batch=4, input_length=12, target_length=12)
        step = stepped(model, backend, precision)
        torch.manual_seed(9)
        small = batches(model)[-1]
        results = [step(batch, lr) for _ in range(3) for batch, lr in zip(batches(model), RATES, strict=True)]
        found.append((model, results, copy.deepcopy(step.optimizer.state_dict()["state"]), step.scaler.state_dict()))
        assert small["input_ids"].shape[0] == 2
    (eager, ours, state, scale), (graph, others, other_state, other_scale) = found
    assert same(eager, graph)
    assert all(torch.equal(a, b) for one, two in zip(ours, others, strict=True) for a, b in zip(one, two, strict=True))
    for index, values in state.items():
        assert all(torch.equal(value, other_state[index][key]) for key, value in values.items())
    assert scale == other_scale


@CUDA
@pytest.mark.parametrize("level", ["fast", "max"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_reversible_has_the_bits_of_conventional_on_cuda(level: str, precision: Precision, deterministic: None) -> None:
    conventional, reversible = tiny(device="cuda"), tiny(device="cuda")
    make_reversible(reversible, level, batch=4, input_length=12, target_length=12)
    ours, others = (run(stepped(model, precision=precision)) for model in (conventional, reversible))
    assert all(torch.equal(a, b) for one, two in zip(ours, others, strict=True) for a, b in zip(one, two, strict=True))
    assert same(conventional, reversible)
