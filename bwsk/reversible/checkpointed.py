"""The engine for other architectures: regions of the stock graph are recomputed, by a plan measured on fake tensors.

A model without an engine of its own keeps the stock autograd graph. Regions of it are recomputed by PyTorch's
non-reentrant checkpoint, which leaves the order of every sum as it is. There are two levels per block:

    checkpoint_attention    attention from q, k, v: scores, softmax and dropout are recomputed, the products around
                            them saved
    checkpoint_block        the whole block from its input

Causal language models also get the loss head that saves one copy of the logits. Saved bytes, working memory and FLOPs
of each block are read off a training step on fake tensors, once per level; the plan is then solved like T5's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache

from bwsk._compat import (
    ALL_ATTENTION_FUNCTIONS,
    LOSS_MAPPING,
    BatchNorm,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    ForCausalLMLoss,
    GradientCheckpointingLayer,
    attention_kind,
    globally_hooked,
    looks_up_attention,
    own_loss,
    routes_to_experts,
    set_attention_kind,
    set_loss,
    tensor_version,
)
from bwsk.architecture import build
from bwsk.errors import BwskError
from bwsk.example_batch import example_batch
from bwsk.memory.allocation_log import Tracker
from bwsk.memory.fake_step import faked, step_loss, stock_peak
from bwsk.reversible.budget import parse_budget
from bwsk.reversible.cross_entropy import cross_entropy
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
from bwsk.reversible.stock import altered_function, altered_functional
from bwsk.units import Precision

_KINDS = ("eager", "sdpa")
_LEVELS = (Level.CHECKPOINT_ATTENTION, Level.CHECKPOINT_BLOCK)


# Whether the attention module whose forward runs now has its scores recomputed.
_recomputing: ContextVar[bool] = ContextVar("bwsk_recomputing", default=False)


def _attention(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Forward of an attention module whose scores are recomputed while it trains.

    The module runs its own code, and looks up its attention function by its own config as ever. What it finds is made
    to be recomputed.
    """
    stock = stock_forward(self)
    if not self.training or not torch.is_grad_enabled() or kwargs.get("output_attentions"):
        return stock(*args, **kwargs)
    if state_of(self).checkpointing:
        return stock(*args, **kwargs)
    token = _recomputing.set(True)
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
        return partial(_recomputed, found, ()) if _recomputing.get() and kind in _KINDS else found


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


def _holds_nothing(cache: Cache, layer: int) -> bool:
    """Whether a cache is of plain keys and values, and has none of this layer yet.

    Cache layers of another kind (linear attention, states of a convolution) have methods that an empty `DynamicCache`
    lacks.
    """
    if type(cache) is not DynamicCache:
        return False
    if layer < len(cache.layers) and type(cache.layers[layer]) not in (DynamicLayer, DynamicSlidingWindowLayer):
        return False
    return cache.get_seq_length(layer) == 0


def _block(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Forward of a block that is recomputed as a whole while it trains.

    In transformers a generation cache is on by default, in training too, and the layout that it gives to the keys
    affects rounding. The forward fills the cache as usual; the recomputation gets an empty one of its own.
    """
    stock = stock_forward(self)
    if not self.training or not torch.is_grad_enabled() or getattr(self, "gradient_checkpointing", False):
        return stock(*args, **kwargs)
    if globally_hooked() or any(hooked(inner) for inner in self.modules() if inner is not self):
        return stock(*args, **kwargs)
    tensors = [*self.parameters(), *self.buffers()]
    caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
    if caches:
        layer = next(
            (
                index
                for m in self.modules()
                if (index := getattr(m, "layer_idx", getattr(m, "layer_id", None))) is not None
            ),
            None,
        )
        if layer is None or not _holds_nothing(caches[0], layer):
            return stock(*args, **kwargs)
    begun: list[bool] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        if not begun:
            begun.append(True)
            return stock(*args, **kwargs)
        if any(now is not then for now, then in zip((*self.parameters(), *self.buffers()), tensors, strict=True)):
            raise BwskError("make_reversible: a block got other weights between forward and backward")
        empty = DynamicCache()
        fresh = [empty if isinstance(value, Cache) else value for value in args]
        named = {key: empty if isinstance(value, Cache) else value for key, value in kwargs.items()}
        return stock(*fresh, **named)

    return _recomputed(run, tensors, *args, **kwargs)


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
    """The modules of a block that look up an attention implementation in their config."""
    return [module for module in block.modules() if looks_up_attention(module)]


def install(model: nn.Module, plan: Plan) -> list[nn.Module]:
    """Set up the levels of a plan and the loss head; returns the modules changed."""
    require_stock_forward("", model)
    touched = install_levels(model, plan.levels)
    patch_forward(model, whole_model, None)
    return [*(module for module in touched if module is not model), model]


def install_levels(model: nn.Module, levels: dict[str, str]) -> list[nn.Module]:
    """Set up the levels of the named blocks and the loss head; returns the modules changed."""
    touched: list[nn.Module] = []
    for name, block in blocks(model).items():
        if levels.get(name) == Level.CHECKPOINT_BLOCK:
            require_stock_forward(name, block)
            patch_forward(block, _block, None)
            touched.append(block)
            continue
        for attention in attentions(block):
            kind = attention_kind(attention.config)
            if kind not in _KINDS or getattr(attention.config, "reorder_and_upcast_attn", False):
                continue
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
class _Measured:
    """One level's step on fake tensors: bytes and FLOPs per block in forward order, and those outside the blocks."""

    saved: list[int]
    work: list[int]
    gradients: list[int]
    forward: list[int]
    flops: int
    head_saved: int
    head_peak: int
    head_gradient: int
    head_forward: int
    resting: int  # the weights
    outer: int  # gradients of the weights outside the blocks


def _measure(
    config: Any, shape: tuple[int, int, int | None], precision: Precision, level: str, attention: str
) -> _Measured:
    """Run one step with every block at `level`, or "stock", and read off its blocks."""
    with faked(config, attention) as model:
        units = list(blocks(model).values())
        if level != "stock":
            install_levels(model, dict.fromkeys(blocks(model), level))
        inputs = example_batch(model, *shape)
        tracker = Tracker()
        totals: dict[tuple[str, int], int] = {}
        flops: dict[tuple[str, int], int] = {}

        def note(moment: str, index: int) -> None:
            totals.setdefault((moment, index), len(tracker.log.events))
            flops.setdefault((moment, index), tracker.flops)

        def watch(index: int) -> None:
            def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
                note("enter", index)

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                note("leave", index)
                out = output if isinstance(output, Tensor) else output[0]
                out.register_hook(lambda g: note("back", index))

            units[index].register_forward_pre_hook(enter, with_kwargs=True)
            units[index].register_forward_hook(leave)

        with tracker:
            for parameter in model.parameters():
                tracker.adopt(parameter)
            weights = sum(tracker.log.sizes.values())
            for index in range(len(units)):
                watch(index)
            loss = step_loss(model, inputs, precision)
            note("loss", 0)
            torch.autograd.backward(loss)
            del loss
            note("end", 0)
            tracker.stop()
        gradients = [
            sum(p.numel() * p.element_size() for p in unit.parameters() if p.grad is not None) for unit in units
        ]
        whole = sum(p.numel() * p.element_size() for p in model.parameters() if p.grad is not None)
    timeline = [0]
    for _, size in tracker.log.events:
        timeline.append(timeline[-1] + size)
    at = {moment: timeline[index] for moment, index in totals.items()}
    last = len(units) - 1
    work = []
    for index in range(len(units)):
        begin = totals["back", index]
        end = totals["back", index - 1] if index else totals["end", 0]
        work.append(max(0, max(timeline[begin : end + 1]) - timeline[begin]))
    head_span = timeline[totals["loss", 0] : totals["back", last] + 1]
    begin, end = totals["loss", 0], totals["back", last]
    return _Measured(
        saved=[at["leave", i] - at["enter", i] for i in range(len(units))],
        work=work,
        gradients=gradients,
        forward=[flops["leave", i] - flops["enter", i] for i in range(len(units))],
        flops=tracker.flops,
        head_saved=at["loss", 0] - at["leave", last],
        head_peak=max(head_span) - timeline[begin],
        head_gradient=max(0, timeline[end] - at["leave", last]),
        head_forward=flops["loss", 0] - flops["leave", last],
        resting=weights,
        outer=whole - sum(gradients),
    )


def plan(model: Any, budget: Any, shape: tuple[int, int, int], precision: Precision = "fp32") -> Plan:
    """The plan for a model or config: `shape` is (batch, input tokens, target tokens)."""
    if isinstance(model, nn.Module):
        blocks(model)  # so that hooks are refused, which a model built from the config would not have
    config = _named(model) if isinstance(model, nn.Module) else model
    attention = attention_kind(config, None) or "eager"
    attention = attention if attention in _KINDS else "eager"
    batch, ins, outs = shape
    seq2seq = bool(getattr(config, "is_encoder_decoder", False))
    lengths = (batch, ins, outs if seq2seq else None)
    asked = parse_budget(budget, lambda: stock_peak(config, lengths, precision, attention))
    stock = _measure(config, lengths, precision, "stock", attention)
    found = {level: _measure(config, lengths, precision, level, attention) for level in _LEVELS}
    names = list(blocks(build(config)))
    units = []
    for index, name in enumerate(names):
        choices = tuple(
            Choice(one.saved[index], max(0, (one.flops - stock.flops) // len(names)), one.work[index], ((name, level),))
            for level, one in found.items()
        )
        units.append(Unit(name, choices, stock.gradients[index], stock.forward[index]))
    core = found[Level.CHECKPOINT_ATTENTION]
    head = Head("exact", core.head_saved, core.head_peak, core.head_gradient, core.head_forward)
    base = 3 * core.resting + max(0, core.outer - core.head_gradient) // 2
    found_plan = Plan(asked, units, [0] * len(units), head, base, "bit-identical (stock graph, regions recomputed)")
    return require_within_budget(solve(found_plan, asked.cap, asked.flops), 4 * core.resting)


def _named(model: Any) -> Any:
    """The model's config, naming the model's own class."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    set_attention_kind(config, attention_kind(model.config))
    return config
