"""The engine for other architectures: regions of the stock graph are recomputed, by a plan measured on fake tensors.

A model without an engine of its own keeps the stock autograd graph. Regions of it are recomputed by PyTorch's
non-reentrant checkpoint, which leaves the order of every sum as it is. There are three levels per block:

    stock                   nothing is recomputed, for nothing in the block can be or nothing would be saved by it
    checkpoint_attention    attention from q, k, v: scores, softmax and dropout are recomputed, the products around
                            them saved
    checkpoint_block        the whole block from its input

Causal language models also get the loss head that saves one copy of the logits. Saved bytes, working memory and FLOPs
of each block are read off a training step on fake tensors, once per level. A level that saves no less in a block than a
cheaper one is none of its choices. The plan is then solved like T5's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from bwsk._compat import (
    ALL_ATTENTION_FUNCTIONS,
    LOSS_MAPPING,
    BatchNorm,
    ForCausalLMLoss,
    GradientCheckpointingLayer,
    attention_kind,
    globally_hooked,
    looks_up_attention,
    own_loss,
    routes_to_experts,
    set_loss,
    tensor_version,
    tree_leaves,
)
from bwsk.errors import BwskError
from bwsk.example_batch import example_batch
from bwsk.memory.allocation_log import Tracker
from bwsk.memory.fake_step import faked, step_loss, stock_peak
from bwsk.memory.training_loop import PLAIN, TrainingLoop
from bwsk.reversible.budget import parse_budget
from bwsk.reversible.cross_entropy import cross_entropy
from bwsk.reversible.entry import OwnStates, at_entry
from bwsk.reversible.patching import (
    Owner,
    hooked,
    patch_forward,
    require_stock_forward,
    set_state,
    state_of,
    stock_forward,
    unpatch,
    whole_model,
)
from bwsk.reversible.plan import Choice, Head, Level, Plan, Unit, require_within_budget, solve
from bwsk.reversible.status import fell_back
from bwsk.reversible.stock import altered_function, altered_functional
from bwsk.units import Precision

_KINDS = ("eager", "sdpa")
_LEVELS = (Level.STOCK, Level.CHECKPOINT_ATTENTION, Level.CHECKPOINT_BLOCK)


# The attention module whose forward runs now, if its scores are to be recomputed.
_recomputing: ContextVar[nn.Module | None] = ContextVar("bwsk_recomputing", default=None)


def _attention(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Forward of an attention module whose scores are recomputed while it trains.

    The module runs its own code, and looks up its attention function by its own config as ever. What it finds is made
    to be recomputed.
    """
    stock = stock_forward(self)
    if not self.training or not torch.is_grad_enabled():
        return stock(*args, **kwargs)
    if kwargs.get("output_attentions"):
        fell_back(self, "attentions are asked for")
        return stock(*args, **kwargs)
    if state_of(self).checkpointing:
        fell_back(self, "gradient checkpointing is on")
        return stock(*args, **kwargs)
    token = _recomputing.set(self)
    try:
        return stock(*args, **kwargs)
    finally:
        _recomputing.reset(token)


class _Lookup:
    """`ALL_ATTENTION_FUNCTIONS.get_interface`, whose answer is recomputed within `_attention` and stock elsewhere."""

    def __init__(self, stock: Callable[..., Callable[..., Any]]) -> None:
        self.stock = stock

    def __call__(self, kind: str, default: Callable[..., Any]) -> Callable[..., Any]:
        found = self.stock(kind, default)
        if torch.compiler.is_compiling():  # then it is not a training step, and a ContextVar cannot be traced
            return found
        module = _recomputing.get()
        if module is None:
            return found
        if kind not in _KINDS:
            fell_back(module, f"its attention is {kind}, which is not recomputed")
            return found
        return partial(_recomputed, found, ())


def _watch_lookups() -> None:
    """Put `_Lookup` in place, once for the process: no config is touched, so every module sees its own."""
    if not isinstance(vars(ALL_ATTENTION_FUNCTIONS).get("get_interface"), _Lookup):
        ALL_ATTENTION_FUNCTIONS.get_interface = _Lookup(ALL_ATTENTION_FUNCTIONS.get_interface)


def _recomputed(function: Callable[..., Any], weights: Iterable[Tensor], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, recomputed in the backward; `weights`: the tensors it reads beside its arguments.

    PyTorch's checkpoint recomputes from the values at the time of the backward. Here tensors that have changed since
    the forward are an error, as in stock autograd.
    """
    read = [*weights, *(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))]
    versions = [tensor_version(tensor) for tensor in read]
    begun: list[bool] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        if begun and versions != [tensor_version(tensor) for tensor in read]:
            raise BwskError(
                "make_reversible: weights or inputs of a block were changed in place between forward and backward"
            )
        begun.append(True)
        return function(*args, **kwargs)

    return checkpoint(run, *args, use_reentrant=False, **kwargs)


def _block(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Forward of a block that is recomputed as a whole while it trains.

    A generation cache, which transformers gives it by default, is filled by the forward as usual. The recomputation
    gets one of its own, in the state in which the block found it.
    """
    stock = stock_forward(self)
    if not self.training or not torch.is_grad_enabled():
        return stock(*args, **kwargs)
    if getattr(self, "gradient_checkpointing", False):
        fell_back(self, "gradient checkpointing is on")
        return stock(*args, **kwargs)
    if globally_hooked():
        fell_back(self, "there are hooks for all modules")
        return stock(*args, **kwargs)
    if any(hooked(inner) for inner in self.modules() if inner is not self):
        fell_back(self, "a module inside has hooks")
        return stock(*args, **kwargs)
    tensors = [*self.parameters(), *self.buffers()]
    # The cache itself is held by its layers' states at entry alone, so that it goes when the caller lets it go.
    caches = {id(value): at_entry(self, value) for value in (*args, *kwargs.values()) if isinstance(value, Cache)}
    if None in caches.values():
        fell_back(self, "it is given a generation cache that is not empty, or of another kind (use_cache=False)")
        return stock(*args, **kwargs)
    begun: list[bool] = []
    states = OwnStates(self)

    def run(*args: Any, **kwargs: Any) -> Any:
        if begun and any(
            now is not then for now, then in zip((*self.parameters(), *self.buffers()), tensors, strict=True)
        ):
            raise BwskError("make_reversible: a block got other weights between forward and backward")
        taken = {id(entry): entry.take() for entry in caches.values() if entry is not None}
        given = [taken.get(id(value), value) for value in args]
        named = {key: taken.get(id(value), value) for key, value in kwargs.items()}
        with states.as_before():
            found = stock(*given, **named)
        if not begun:
            begun.append(True)
            states.left()
            for entry in caches.values():
                if entry is not None:
                    entry.left(taken[id(entry)])
        return found

    given = [caches.get(id(value), value) for value in args]
    named = {key: caches.get(id(value), value) for key, value in kwargs.items()}
    return _recomputed(run, tensors, *given, **named)


def _causal_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' causal language model loss with one copy of the logits.

    As a mean, or as a sum over a number of items, which `Trainer` gives for every model whose loss is this one.
    """
    if not torch.is_grad_enabled() or not logits.requires_grad:
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()
    shift_labels = shift_labels.view(-1).to(logits.device)
    reduction: Literal["mean", "sum"] = "mean" if num_items_in_batch is None else "sum"
    loss = cross_entropy(logits.float().view(-1, vocab_size), shift_labels, 64, ignore_index, reduction)
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch)


class CausalLoss:
    """The loss function of one model: `_causal_loss` while it trains. An object, as `PatchedForward` is one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.model.training or torch.compiler.is_compiling():
            return ForCausalLMLoss(*args, **kwargs)
        return _causal_loss(*args, **kwargs)


def _loss_is_known() -> bool:
    """Whether transformers' causal loss, and what it calls, are the functions that `_causal_loss` stands in for."""
    home = ForCausalLMLoss.__module__
    return not (altered_function(ForCausalLMLoss, home, "ForCausalLMLoss") or altered_functional())


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The model's repeated blocks by name, outermost only. Raises `BwskError` if it has none, or one not supported."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in found)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            found[name] = module
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if not found:
        raise BwskError(
            f"{kind}: its blocks are not transformers' GradientCheckpointingLayer, so there is no unit "
            "to recompute safely; not supported"
        )
    for name, module in found.items():
        for inner in module.modules():
            if isinstance(inner, (nn.RNNBase, BatchNorm)):
                raise BwskError(
                    f"{kind}: {name} holds {type(inner).__name__}, whose state a second forward would change; "
                    "not supported"
                )
            if hooked(inner):
                raise BwskError(
                    f"{kind}: a forward hook on {type(inner).__name__} inside {name} would see the recomputation too; "
                    "remove it before make_reversible"
                )
            if routes_to_experts(inner):
                raise BwskError(
                    f"{kind}: {name} routes tokens to experts; a recomputed routing can be "
                    "rounded differently; not supported"
                )
    return found


def attentions(block: nn.Module) -> list[nn.Module]:
    """The modules of a block whose scores can be recomputed: they look up an implementation that is known."""
    return [
        module
        for module in block.modules()
        if looks_up_attention(module)
        and attention_kind(module.config) in _KINDS
        and not getattr(module.config, "reorder_and_upcast_attn", False)
    ]


def attentions_in_part(block: nn.Module) -> str:
    """ "1 of 2 attentions" for a block where scores can be recomputed in some attentions only, else ""."""
    known = attentions(block)
    others, inside = 0, ""
    for name, module in block.named_modules():
        if "Attention" not in type(module).__name__ or module is block or (inside and name.startswith(inside)):
            continue
        if not any(inner in known for inner in module.modules()):
            others, inside = others + 1, f"{name}."
    return f"{len(known)} of {len(known) + others} attentions" if known and others else ""


def install(model: nn.Module, plan: Plan) -> list[nn.Module]:
    """Set up the levels of a plan and the loss head; returns the modules changed."""
    require_stock_forward("", model)
    touched = install_levels(model, plan.levels)
    patch_forward(model, whole_model, None)
    return [*(module for module in touched if module is not model), model]


def install_levels(model: nn.Module, levels: dict[str, str]) -> list[nn.Module]:
    """Set up the levels of the named blocks, others being stock, and the loss head; returns the modules changed."""
    touched: list[nn.Module] = []
    for name, block in blocks(model).items():
        level = levels.get(name, Level.STOCK)
        if level == Level.CHECKPOINT_BLOCK:
            require_stock_forward(name, block)
            patch_forward(block, _block, None)
            touched.append(block)
        elif level == Level.CHECKPOINT_ATTENTION:
            for attention in attentions(block):
                require_stock_forward(f"{name}'s attention", attention)
                _watch_lookups()
                patch_forward(attention, _attention, Owner(block))
                touched.append(attention)
    # A class that names no loss of its own, such as GPT2LMHeadModel, has this one too.
    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None), ForCausalLMLoss)
    if loss is ForCausalLMLoss and _has_projection(model) and own_loss(model) is None and _loss_is_known():
        set_loss(model, CausalLoss(model))
        set_state(model, None)
        touched.append(model)
    return touched


def _has_projection(model: Any) -> bool:
    """Whether a transformers model projects onto its vocabulary."""
    return model.get_output_embeddings() is not None


def uninstall(modules: list[nn.Module]) -> None:
    """Remove what `install` set up."""
    for module in modules:
        unpatch(module)
        if isinstance(own_loss(module), CausalLoss):
            set_loss(module, None)


@dataclass
class _Block:
    """One block in a step on fake tensors: bytes, and the FLOPs of its forward."""

    name: str
    saved: int
    work: int
    gradients: int
    forward: int
    part: str  # of its attentions, those that can be recomputed


@dataclass
class _Measured:
    """One level's step on fake tensors: the blocks that run in it, in forward order, and bytes and FLOPs outside."""

    blocks: list[_Block]
    idle: list[str]  # blocks that do not run in this step, or whose output no gradient reaches
    flops: int
    between: int  # saved before, between and beside the blocks: embeddings, masks
    head_saved: int
    head_peak: int
    head_gradient: int
    head_forward: int
    resting: int  # the weights
    trained: int  # those of them that are not frozen
    outer: int  # gradients of the weights outside the blocks


class _Moments:
    """When a step enters and leaves its blocks, and when the gradient of a block's output arrives."""

    def __init__(self, units: list[nn.Module]) -> None:
        self.tracker = Tracker()
        self.runs: dict[int, list[tuple[int, int]]] = {}  # block -> (enter, leave) of each time that it runs
        self.forward: dict[int, int] = {}  # block -> FLOPs of its forward
        self.last_left: tuple[int, int] = (0, 0)  # moment and FLOPs
        self.back: dict[int, int] = {}
        for index, unit in enumerate(units):
            self._watch(index, unit)

    def now(self) -> int:
        """The number of allocations and releases so far."""
        return len(self.tracker.log.events)

    def _watch(self, index: int, unit: nn.Module) -> None:
        open_: list[tuple[int, int]] = []

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            open_.append((self.now(), self.tracker.flops))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if not open_:
                return
            begin, flops = open_.pop()
            self.runs.setdefault(index, []).append((begin, self.now()))
            self.forward[index] = self.forward.get(index, 0) + self.tracker.flops - flops
            self.last_left = (self.now(), self.tracker.flops)
            out = next((t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad), None)
            if out is not None:
                out.register_hook(lambda g: self.back.setdefault(index, self.now()) and None)

        unit.register_forward_pre_hook(enter, with_kwargs=True)
        unit.register_forward_hook(leave)


def _measure(
    model: Any, shape: tuple[int, int, int | None], precision: Precision, level: str, attention: str, loop: TrainingLoop
) -> _Measured:
    """Run one step with every block at `level` and read off its blocks."""
    with faked(model, attention) as model:
        found = blocks(model)
        units = list(found.values())
        if level != Level.STOCK:
            install_levels(model, dict.fromkeys(found, level))
        inputs = example_batch(model, *shape)
        moments = _Moments(units)
        tracker = moments.tracker
        with tracker:
            for parameter in model.parameters():
                tracker.adopt(parameter)
            weights = sum(tracker.log.sizes.values())
            start = moments.now()
            loss = step_loss(model, inputs, precision, loop)
            begin, forward = moments.now(), tracker.flops
            torch.autograd.backward(loss)
            del loss
            tracker.stop()
        gradients = [
            sum(p.numel() * p.element_size() for p in unit.parameters() if p.grad is not None) for unit in units
        ]
        whole = sum(p.numel() * p.element_size() for p in model.parameters() if p.grad is not None)
    log = tracker.log

    def kept(first: int, last: int) -> int:
        """Bytes allocated between two moments that live on into the backward."""
        lasting = [n for n, at in log.born.items() if first <= at < last and log.died.get(n, begin) >= begin]
        return sum(log.sizes[n] for n in lasting)

    timeline = [0]
    for _, size in log.events:
        timeline.append(timeline[-1] + size)
    order = sorted(moments.back.keys() & moments.runs.keys(), key=lambda index: moments.runs[index][0])
    if not order:
        raise BwskError(
            f"{type(model).__name__}: no gradient reaches its blocks in a step of text (frozen?); nothing to save"
        )
    names, measured = list(found), []
    for place, index in enumerate(order):
        reached = moments.back[index]
        end = max(reached, moments.back[order[place - 1]] if place else len(timeline) - 1)
        measured.append(
            _Block(
                names[index],
                saved=sum(kept(enter, leave) for enter, leave in moments.runs[index]),
                work=max(0, max(timeline[reached : end + 1]) - timeline[reached]),
                gradients=gradients[index],
                forward=moments.forward[index],
                part=attentions_in_part(units[index]),
            )
        )
    left, flops = moments.last_left
    end = moments.back[order[-1]]
    return _Measured(
        measured,
        idle=[name for index, name in enumerate(names) if index not in order],
        flops=tracker.flops,
        between=kept(start, left) - sum(block.saved for block in measured),
        head_saved=kept(left, begin),
        head_peak=max(timeline[left : end + 1]) - timeline[begin],  # the loop's own loss may need most in its forward
        head_gradient=max(0, timeline[end] - timeline[left]),
        head_forward=forward - flops,
        resting=weights,
        trained=sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        outer=whole - sum(block.gradients for block in measured),
    )


def plan(
    model: Any, budget: Any, shape: tuple[int, int, int], precision: Precision = "fp32", loop: TrainingLoop = PLAIN
) -> Plan:
    """The plan for a model or config: `shape` is (batch, input tokens, target tokens)."""
    if isinstance(model, nn.Module):
        blocks(model)  # so that hooks are refused, which the copy on fake tensors does not have
    config = getattr(model, "config", model)
    attention = attention_kind(config, None) or "eager"
    attention = attention if attention in _KINDS else "eager"
    batch, ins, outs = shape
    seq2seq = bool(getattr(config, "is_encoder_decoder", False))
    lengths = (batch, ins, outs if seq2seq else None)
    asked = parse_budget(budget, lambda: stock_peak(model, lengths, precision, attention, loop))
    found = {level: _measure(model, lengths, precision, level, attention, loop) for level in _LEVELS}
    core = found[Level.CHECKPOINT_ATTENTION]
    head = Head("exact", core.head_saved, core.head_peak, core.head_gradient, core.head_forward)
    base = core.resting + 2 * core.trained + core.between
    # Gradients of weights outside the blocks and the head, such as the token table's, come after those of all blocks.
    units = _units(found)
    units[0] = replace(units[0], gradients=units[0].gradients + max(0, core.outer - core.head_gradient))
    found_plan = Plan(asked, units, [0] * len(units), head, base, "bit-identical (stock graph, regions recomputed)")
    return require_within_budget(solve(found_plan, asked.cap, asked.flops), core.resting + 3 * core.trained)


def _units(found: dict[Level, _Measured]) -> list[Unit]:
    """The blocks with their choices, of which each saves less than the one before it.

    Recomputed FLOPs are those of the whole step, divided among the blocks that save less, as their forwards are.
    """
    stock = found[Level.STOCK]
    if len({tuple(block.name for block in measured.blocks) for measured in found.values()}) > 1:
        raise BwskError(
            "make_reversible: which blocks run differs from step to step (layers dropped at random); not supported"
        )
    choices = [[Choice(block.saved, 0, block.work, ((block.name, Level.STOCK),))] for block in stock.blocks]
    for level in (Level.CHECKPOINT_ATTENTION, Level.CHECKPOINT_BLOCK):
        pairs = list(zip(found[level].blocks, stock.blocks, choices, strict=True))
        recomputed = sum(block.forward for one, block, _ in pairs if one.saved < block.saved)
        extra = max(0, found[level].flops - stock.flops)
        for one, block, own in pairs:
            if one.saved < own[-1].saved:
                flops = extra * block.forward // max(recomputed, 1)
                part = block.part if level == Level.CHECKPOINT_ATTENTION else ""
                own.append(Choice(one.saved, flops, one.work, ((block.name, level),), part))
    for own in choices:  # attention costs next to nothing to recompute, so where it saves, it always is
        if any(choice.levels[0][1] == Level.CHECKPOINT_ATTENTION for choice in own):
            del own[0]
    idle = [Unit(name, (Choice(0, 0, 0, ((name, Level.STOCK),)),), 0, 0) for name in stock.idle]
    return idle + [
        Unit(block.name, tuple(own), block.gradients, block.forward)
        for block, own in zip(stock.blocks, choices, strict=True)
    ]
