"""What is not a training step runs the very stock code: copies, files, evaluation, export, compilation, checkpointing.

And what is done to a reversible model afterwards is done as to a stock one: undo, other dtypes, other sizes.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.utils import extract_model_from_parallel
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

import bwsk
from bwsk import BwskError, Plan, make_reversible
from bwsk.reversible.handle import engine_for
from bwsk.reversible.patching import is_patched

SHAPE = {"batch": 3, "input_length": 12, "target_length": 7}
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 96}
T5_SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "vocab_size": 96}
MODELS: dict[str, Callable[[int], Any]] = {
    "t5": lambda n: T5ForConditionalGeneration(T5Config(**T5_SIZES, num_layers=n, decoder_start_token_id=0)),
    "llama": lambda n: LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=n, attention_dropout=0.1)),
    "gpt2": lambda n: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=n, n_head=4, vocab_size=96, bos_token_id=1, eos_token_id=2)
    ),
    "bert": lambda n: BertForMaskedLM(BertConfig(**SIZES, num_hidden_layers=n)),
}
each_model = pytest.mark.parametrize("name", list(MODELS))
each_budget = pytest.mark.parametrize("budget", ["fast", "max"])
BLOCK = {"t5": "encoder.block.0", "llama": "model.layers.0", "gpt2": "transformer.h.0", "bert": "bert.encoder.layer.0"}


def make(name: str, layers: int = 2) -> Any:
    torch.manual_seed(0)
    return MODELS[name](layers).train()


def encoder() -> Any:
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(**T5_SIZES, num_layers=2)).train()


_plans: dict[tuple[type, int, str], Plan] = {}


def reversible(model: Any, budget: str) -> Any:
    """The model as `make_reversible` returns it; a plan is made once for all models of a kind."""
    key = (type(model), model.config.num_hidden_layers, budget)
    if key not in _plans:
        _plans[key] = bwsk.plan(model, budget, **SHAPE)
    engine_for(model).install(model, _plans[key])
    return model


def tokens(seed: int = 1, length: int = 12) -> Tensor:
    return torch.randint(3, 90, (3, length), generator=torch.Generator().manual_seed(seed))


def batch(name: str, seed: int = 1) -> dict[str, Tensor]:
    return {"input_ids": tokens(seed), "labels": tokens(seed + 1, 7 if name == "t5" else 12)}


def inputs(name: str) -> dict[str, Any]:
    """Without labels, for evaluation."""
    given = {"input_ids": tokens()}
    return given | ({"decoder_input_ids": tokens(2, 7), "use_cache": False} if name == "t5" else {})


def step(model: nn.Module, run: Callable[..., Any] | None = None, **given: Any) -> list[Tensor]:
    """Loss and every gradient of a step with dropout; `run` is what is called, the model itself by default."""
    model.zero_grad()
    torch.manual_seed(2)
    loss = (model if run is None else run)(**given).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) > 1 and all(map(torch.equal, one, other))


def is_stock(model: nn.Module) -> bool:
    """Whether nothing of `make_reversible` is left."""
    left = [name for m in model.modules() for name in vars(m) if name in ("forward", "_bwsk", "_loss_function")]
    return not left and not any("_replicate" in name for m in model.modules() for name in vars(m))


def recomputes(model: nn.Module, **given: Any) -> bool:
    """Whether a training step saves fewer bytes than the stock model's."""
    return saved(model, **given) < saved(bwsk.undo(copy.deepcopy(model)), **given)


def saved(model: nn.Module, **given: Any) -> int:
    sizes: list[int] = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.numel() * x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(**given)
    return sum(sizes)


# --- copies ---


def unpickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_budget
@each_model
@pytest.mark.parametrize("kind", [copy.deepcopy, unpickled, loaded])
def test_a_copy_is_as_reversible_as_its_original_and_apart_from_it(name: str, budget: str, kind: Any) -> None:
    stock, ours = make(name), reversible(make(name), budget)
    given = batch(name)
    expected = step(stock, **given)
    ours(**given).loss.backward()  # as for an average of the weights, made in the middle of training
    twin, other = kind(ours), kind(ours)
    mine = {id(module) for module in twin.modules()}
    for module in twin.modules():
        for value in vars(module).values():
            assert id(getattr(value, "module", module)) in mine
            assert id(getattr(value, "model", module)) in mine
    for parameter in ours.parameters():
        parameter.data.zero_()
    assert recomputes(twin, **given)
    assert same(expected, step(twin, **given))
    assert bwsk.undo(twin) is twin
    assert is_stock(twin)
    assert bwsk.undo(twin) is twin
    assert same(expected, step(twin, **given))
    assert all(is_patched(module) for module in (ours, other))  # neither knows
    bwsk.undo(ours)
    assert is_stock(ours)
    assert recomputes(other, **given)
    assert same(expected, step(other, **given))
    assert recomputes(reversible(twin, budget), **given)
    assert same(expected, step(twin, **given))


@each_budget
@each_model
def test_a_copy_of_a_part_is_of_that_part_alone(name: str, budget: str) -> None:
    stock, ours = make(name), reversible(make(name), budget)
    for module in ours.modules():
        memo: dict[int, Any] = {}
        copy.deepcopy(module, memo)
        copied = {key for key, value in memo.items() if isinstance(value, nn.Parameter)}
        assert copied == {id(parameter) for parameter in module.parameters()}
    path = BLOCK[name].rpartition(".")[0].rpartition(".")[0]
    stack, twin = stock.get_submodule(path), copy.deepcopy(ours.get_submodule(path))
    given = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for model in (stack, twin, bwsk.undo(twin)):
        model.zero_grad()
        torch.manual_seed(1)
        outputs = model.train()(given) if name == "bert" else model.train()(inputs_embeds=given)
        outputs[0].square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    assert is_stock(twin)
    assert is_patched(ours)


@each_model
def test_undo_of_a_shallow_copy_is_undo_of_the_parts_that_it_shares(name: str) -> None:
    stock, ours = make(name), reversible(make(name), "max")
    twin = copy.copy(ours)
    expected = step(stock, **batch(name))
    assert same(expected, step(twin, **batch(name)))
    bwsk.undo(twin)
    assert is_stock(twin)
    assert is_stock(ours)
    assert same(expected, step(twin, **batch(name)))


def test_a_handle_takes_back_only_what_it_has_set_up() -> None:
    ours = make("t5")
    first = make_reversible(ours, "max", **SHAPE)
    bwsk.undo(ours)
    second = make_reversible(ours, "fast", **SHAPE)
    assert first.undo() is ours
    assert recomputes(ours, **batch("t5"))
    second.undo()
    assert is_stock(ours)


def test_undo_reaches_the_model_inside_a_wrapper_and_refuses_what_is_no_model() -> None:
    ours = reversible(make("llama"), "fast")
    with pytest.raises(BwskError, match=r"already is; call bwsk\.undo\(model\) first"):
        make_reversible(ours, "fast", **SHAPE)
    wrapped = torch.compile(ours, backend="eager")
    assert bwsk.undo(wrapped) is wrapped
    assert is_stock(ours)
    handle = make_reversible(ours, "fast", **SHAPE)
    with pytest.raises(BwskError, match="undo: found Reversible, not a model"):
        bwsk.undo(handle)  # type: ignore[arg-type]


def test_a_copy_made_during_a_forward_is_of_no_forward() -> None:
    """By a hook, when the tied table is on its way from the lookup to the projection."""
    stock, ours = make("t5"), reversible(make("t5"), "fast")
    copies = []
    hook = ours.encoder.register_forward_hook(lambda module, args, output: copies.append(copy.deepcopy(ours.lm_head)))
    ours(**batch("t5"))
    hook.remove()
    assert torch.equal(copies[0](torch.ones(2, 32)), stock.lm_head(torch.ones(2, 32)))


# --- evaluation, files ---


@each_budget
@each_model
def test_evaluation_and_generation_are_stock(name: str, budget: str) -> None:
    stock, ours = make(name).eval(), reversible(make(name), budget).eval()
    assert torch.equal(stock(**inputs(name)).logits, ours(**inputs(name)).logits)
    if name != "bert":
        for options in ({}, {"num_beams": 2}):
            given = {**options, "input_ids": tokens(), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
            assert torch.equal(stock.generate(**given), ours.generate(**given))
    nodes = [_nodes(model(**batch(name)).loss) for model in (stock, ours)]
    assert nodes[0] == nodes[1]  # the very stock graph, so that second derivatives work there too
    for model in (stock, ours):
        model.train()
        model.get_submodule(BLOCK[name]).train(False)
    assert same(step(stock, **batch(name)), step(ours, **batch(name)))


def _nodes(loss: Tensor) -> list[str]:
    """The names of the nodes of a graph."""
    found, todo, seen = [], [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.append(node.name())
            todo += [following for following, _ in node.next_functions]
    return sorted(found)


@each_budget
@each_model
def test_what_is_changed_afterwards_has_the_stock_bits(name: str, budget: str, tmp_path: Any) -> None:
    def other_attention(model: Any) -> Any:
        model.set_attn_implementation("eager")
        return model

    def more_tokens(model: Any) -> Any:
        torch.manual_seed(3)
        model.resize_token_embeddings(101)
        return model

    def saved_and_loaded(model: Any) -> Any:
        path = tmp_path / ("ours" if is_patched(model) else "stock")
        assert not path.exists()
        model.save_pretrained(path)
        found = type(model).from_pretrained(path).train()
        assert is_stock(found)
        return found

    given = batch(name)
    changes = [
        other_attention,
        more_tokens,
        saved_and_loaded,
        lambda model: model.to(torch.float64),
        lambda model: model.bfloat16(),
        lambda model: model.half(),
    ]
    for change in changes:
        stock, ours = make(name), reversible(make(name), budget)
        configs = [(n, getattr(m, "config", None)) for n, m in ours.named_modules()]
        assert list(stock.state_dict()) == list(ours.state_dict())
        stock, ours = change(stock), change(ours)
        assert same(step(stock, **given), step(ours, **given)), change
        assert torch.equal(stock.eval()(**inputs(name)).logits, ours.eval()(**inputs(name)).logits), change
        if change is not saved_and_loaded:
            assert all(getattr(ours.get_submodule(n), "config", None) is c for n, c in configs)


# --- what frameworks look at ---


@each_model
def test_a_forward_looks_like_the_stock_one(name: str) -> None:
    stock, ours = make(name), reversible(make(name), "max")
    for path in ("", BLOCK[name]):
        one, other = stock.get_submodule(path).forward, ours.get_submodule(path).forward
        assert inspect.signature(one) == inspect.signature(other)
        for attribute in ("__name__", "__qualname__", "__doc__", "__module__", "__code__", "__annotations__"):
            assert getattr(one, attribute) == getattr(other, attribute), attribute
        assert getattr(one, "__wrapped__", None) == getattr(other, "__wrapped__", None)
        assert not hasattr(other, "anything_else")
    assert type(ours.forward).__name__ == "PatchedForward"


@each_model
def test_accelerate_may_wrap_the_forward_and_unwrap_it(name: str) -> None:
    """`unwrap_model(keep_fp32_wrapper=False)` binds the forward to the model once more."""
    stock, ours = make(name), reversible(make(name), "max")
    for model in (stock, ours):
        model._original_forward = model.forward
        model.forward = convert_outputs_to_fp32(model.forward)
        extract_model_from_parallel(model, keep_fp32_wrapper=False)
    assert recomputes(ours, **batch(name))
    assert same(step(make(name), **batch(name)), step(ours, **batch(name)))
    assert is_stock(bwsk.undo(ours))


# --- export and compilation ---


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.compiler.reset()


def operators(program: Any) -> list[str]:
    return [str(node.target) for node in program.graph.nodes]


@pytest.mark.parametrize(
    ("name", "budget", "strict"),
    [
        pytest.param("t5", "fast", True, marks=pytest.mark.slow),
        pytest.param("llama", "max", False, marks=pytest.mark.slow),
        ("t5", "max", False),
        ("llama", "fast", True),
    ],
)
def test_an_export_is_the_stock_one(name: str, budget: str, strict: bool, fresh_compiler: None) -> None:
    stock, ours = make(name, 1).eval(), reversible(make(name, 1), budget).eval()
    given = {**inputs(name), "use_cache": False}
    one, other = (torch.export.export(model, (), given, strict=strict) for model in (stock, ours))
    assert operators(one) == operators(other)
    assert torch.equal(one.module()(**given).logits, other.module()(**given).logits)
    if not strict:
        one, other = (torch.export.export(model.train(), (), given, strict=False) for model in (stock, ours))
        assert operators(one) == operators(other)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_traced_script_is_the_stock_one(name: str, fresh_compiler: None) -> None:
    found = []
    for model in (make(name, 1).eval(), reversible(make(name, 1), "max").eval()):
        wrapper = _Logits(model, inputs(name))
        found.append(torch.jit.trace(wrapper, (tokens(),), check_trace=False))
    kinds = [[node.kind() for node in one.inlined_graph.nodes()] for one in found]
    assert kinds[0] == kinds[1]
    assert torch.equal(found[0](tokens(5)), found[1](tokens(5)))


class _Logits(nn.Module):
    def __init__(self, model: nn.Module, given: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.given = model, given

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(**{**self.given, "input_ids": input_ids, "use_cache": False}).logits


@pytest.mark.parametrize(
    ("name", "budget"),
    [("t5", "max"), ("llama", "fast"), pytest.param("llama", "max", marks=pytest.mark.slow), ("bert", "fast")],
)
def test_compiled_models_train_eagerly_and_evaluate_compiled(name: str, budget: str, fresh_compiler: None) -> None:
    """Of a training step nothing is compiled, so that its bits are those of the eager stock model."""
    graphs: list[Any] = []

    def backend(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    stock, ours = make(name), reversible(make(name), budget)
    compiled = torch.compile(ours, backend=backend)
    expected = step(stock, **batch(name))
    assert same(expected, step(ours, compiled, **batch(name)))
    assert graphs == []
    given = {**inputs(name), **({} if name == "bert" else {"use_cache": False})}
    logits = compiled.eval()(**given).logits
    assert torch.equal(logits, stock.eval()(**given).logits)
    assert len(graphs) == 1  # the whole model, without a break
    compiled.train()
    assert same(expected, step(ours, compiled, **batch(name)))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_training_step_in_one_graph_is_refused_and_says_what_to_do(name: str, fresh_compiler: None) -> None:
    ours = reversible(make(name), "fast")
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"make_reversible: .*leave out fullgraph=True, or call bwsk\.undo\(model\)"):
        compiled(**batch(name))


def test_stock_models_compile_in_one_graph_beside_a_reversible_one(fresh_compiler: None) -> None:
    """The look-up of attention functions, which the engine watches, is shared by all models of the process."""
    reversible(make("llama"), "fast")
    stock = make("llama")
    expected = step(stock, **batch("llama"))
    assert same(expected, step(stock, torch.compile(stock, backend="eager", fullgraph=True), **batch("llama")))


# --- the framework's gradient checkpointing ---


@each_budget
@each_model
@pytest.mark.parametrize("every", [1, 2])
def test_gradient_checkpointing_takes_the_place_of_the_engine(
    name: str, budget: str, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each checkpointed block enters one checkpoint and runs its stock forward twice, its attention no third time."""
    counts: dict[str, int] = {}
    stock, ours = make(name), reversible(make(name), budget)
    model_step = batch(name)
    before = step(ours, **model_step)
    first = ours.get_submodule(BLOCK[name])
    options = {} if every == 1 else {"every_n_layers": every}
    if every == 2 and "every_n_layers" not in inspect.signature(ours._set_gradient_checkpointing).parameters:
        pytest.skip("this transformers checkpoints all layers")
    for model in (stock, ours):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}, **options)
    kinds = {type(module) for module in first.modules() if module._modules and not isinstance(module, nn.ModuleList)}
    for kind in kinds:
        _count(monkeypatch, kind, counts)
    sdpa = nn.functional.scaled_dot_product_attention

    def counting(name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counting("scores", sdpa))
    for model in (stock, ours):
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = counting("checkpoint", module._gradient_checkpointing_func)
    found = []
    for model in (stock, ours):
        counts.clear()
        found.append((step(model, **model_step), dict(counts)))
    (expected, calls), (gradients, own_calls) = found
    assert same(expected, gradients)
    if every == 1:
        assert own_calls == calls
        assert own_calls[type(first).__name__] == 2 * sum(type(module) is type(first) for module in ours.modules())
    monkeypatch.undo()
    ours.gradient_checkpointing_disable()
    assert recomputes(ours, **model_step)
    assert same(before, step(ours, **model_step))


def _count(monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module], counts: dict[str, int]) -> None:
    """Count how often a class's own forward runs, beneath the checkpoint that transformers may wrap around it."""
    outer, name = kind.forward, kind.__name__
    if "forward_with_checkpointing" in outer.__code__.co_name:
        cells = dict(zip(outer.__code__.co_freevars, outer.__closure__, strict=True))
        inner = cells["forward"].cell_contents

        def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return inner(self, *args, **kwargs)

        monkeypatch.setattr(cells["forward"], "cell_contents", counted)
        return

    def called(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        counts[name] = counts.get(name, 0) + 1
        return outer(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", called)


# --- weights with several uses ---


def amp(enabled: bool = True) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def _in_one_region(model: Any, enabled: bool) -> None:
    with amp(enabled):
        one, other = (model(input_ids=tokens(seed))[0] for seed in (1, 2))
    (one * other).sum().backward()


def _in_two_regions(model: Any, enabled: bool) -> None:
    found = []
    for seed in (1, 2):
        with amp(enabled):
            found.append(model(input_ids=tokens(seed))[0])
    (found[0] * found[1]).sum().backward()


def _with_two_backwards(model: Any, enabled: bool) -> None:
    with amp(enabled):
        one, other = (model(input_ids=tokens(seed))[0] for seed in (1, 2))
    one.sum().backward()
    other.sum().backward()


def _accumulating_within_a_region(model: Any, enabled: bool) -> None:
    with amp(enabled):
        for seed in (1, 2):
            model(input_ids=tokens(seed))[0].sum().backward()


def _without_a_cache(model: Any, enabled: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled, cache_enabled=False):
        one, other = (model(input_ids=tokens(seed))[0] for seed in (1, 2))
    (one * other).sum().backward()


def _losing_one(model: Any, enabled: bool) -> None:
    with amp(enabled):
        model(input_ids=tokens(1))
        model(input_ids=tokens(2))[0].sum().backward()


@each_budget
@pytest.mark.parametrize("enabled", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "uses",
    [
        _in_one_region,
        _in_two_regions,
        _with_two_backwards,
        _accumulating_within_a_region,
        _without_a_cache,
        _losing_one,
    ],
)
def test_a_t5_that_runs_twice_has_the_stock_bits_or_says_why_not(uses: Any, enabled: bool, budget: str) -> None:
    stock, ours = encoder(), reversible(encoder(), budget)
    found = []
    for model in (stock, ours):
        torch.manual_seed(2)
        if model is ours and enabled and uses is _in_one_region:
            with pytest.raises(BwskError, match=r"a T5Layer.* ran twice within one autocast region"):
                uses(model, enabled)
            for parameter in ours.encoder.block.parameters():
                parameter.requires_grad = False  # frozen, they get no gradient that could be another
            torch.manual_seed(2)
            uses(model, enabled)
            return
        uses(model, enabled)
        found.append([p.grad for p in model.parameters()])
    assert same(*found)


@each_budget
def test_a_use_by_the_engine_beside_a_stock_one_is_found_too(budget: str) -> None:
    ours = reversible(encoder(), budget)
    for item in ours.encoder.block:
        item.layer[1].requires_grad_(False)  # these run by the engine both times
    with amp():
        one = ours(input_ids=tokens(1))[0]
        other = ours(input_ids=tokens(2), output_attentions=True)[0]
    with pytest.raises(BwskError, match="a T5LayerSelfAttention ran twice within one autocast region"):
        (one * other).sum().backward()


def _shared_layer(model: Any) -> None:
    model.encoder.block[1].layer[1] = model.encoder.block[0].layer[1]


def _shared_part(model: Any) -> None:
    model.decoder.block[0].layer[1].EncDecAttention.q = model.decoder.block[0].layer[0].SelfAttention.q


def _shared_weight(model: Any) -> None:
    model.decoder.block[1].layer[2].DenseReluDense.wi.weight = model.encoder.block[0].layer[1].DenseReluDense.wi.weight


@pytest.mark.parametrize(
    ("share", "names"),
    [
        (_shared_layer, r"encoder\.block\.0\.layer\.1.* and encoder\.block\.1\.layer\.1"),
        (_shared_part, r"decoder\.block\.0\.layer\.0.*q\.weight and decoder\.block\.0\.layer\.1.*q\.weight"),
        (_shared_weight, r"encoder\.block\.0.*wi\.weight and decoder\.block\.1.*wi\.weight"),
    ],
)
def test_sublayers_of_a_t5_that_share_a_weight_are_refused(share: Any, names: str) -> None:
    model = make("t5")
    share(model)
    with pytest.raises(BwskError, match=names):
        make_reversible(model, "fast", **SHAPE)
    assert is_stock(model)


@each_budget
@pytest.mark.parametrize("enabled", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("uses", [_in_one_region, _in_two_regions, _with_two_backwards])
def test_other_architectures_may_share_weights_and_run_twice(uses: Any, enabled: bool, budget: str) -> None:
    """Their graph is the stock one, with stock's casts."""
    stock = make("bert")
    layers = stock.bert.encoder.layer
    layers[1].intermediate.dense.weight = layers[0].intermediate.dense.weight
    layers[1].attention.self.query = layers[0].attention.self.query
    ours = reversible(copy.deepcopy(stock), budget)
    found = []
    for model in (stock, ours):
        torch.manual_seed(2)
        uses(model, enabled)
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert same(*found)


def test_a_layer_that_is_shared_across_depth_is_refused() -> None:
    sizes = {**SIZES, "embedding_size": 16, "num_hidden_layers": 3}
    with pytest.raises(BwskError, match="albert: its blocks are not"):
        make_reversible(AlbertForMaskedLM(AlbertConfig(**sizes)).train(), "fast", **SHAPE)
