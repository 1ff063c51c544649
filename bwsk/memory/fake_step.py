"""One training step of a model on fake tensors: which storages it allocates and what its memory consists of.

The step is run with CUDA's accounting (`allocation_log`): forward, backward and clipping of a new model of the same
class. The optimizer's phase is arithmetic: AdamW holds two moments per parameter, and on top of weights, gradients and
moments it needs

    fused      nothing
    foreach    one more list of all parameters (the square roots of the second moments)
    loop       two temporaries of the size of the largest parameter
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from bwsk._compat import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    fake_tensor_log,
    set_attention_kind,
)
from bwsk.architecture import build, one_line
from bwsk.errors import BwskError
from bwsk.example_batch import example_batch, label_arguments, loss_of, own_loss_of
from bwsk.memory.allocation_log import Log, Tracker
from bwsk.memory.cuda_rules import cuda_rules
from bwsk.memory.training_loop import PLAIN, TrainingLoop
from bwsk.units import MIB, Precision, dtype_of, to_precision

# Limit on the attention scores of one head in a step; heads and bytes then stay below the largest size of a tensor.
_MOST_SCORES = 2**48


@dataclass
class FakeStep:
    """The log of one fake step, and the numbers of the storages of each kind."""

    model: str
    target_length: int | None  # None if the model is not an encoder-decoder
    log: Log
    weights: set[int]
    states: set[int]
    gradients: set[int | None]
    flops: int
    parameters: list[int]  # bytes of each

    def summary(self, optimizer: str) -> tuple[dict[str, float], dict[str, float]]:
        """The peak of each phase and what the largest consists of, MiB. `optimizer`: "fused", "foreach" or "loop"."""
        starts = {index: phase for phase, index in self.log.marks}
        backward = next(index for phase, index in self.log.marks if phase == "backward")

        def kind(number: int) -> str:
            if number in self.weights:
                return "weights"
            if number in self.states:
                return "optimizer_states"
            if number in self.gradients:
                return "gradients"
            saved = self.log.born[number] < backward <= self.log.died.get(number, len(self.log.events))
            return "activations" if saved else "temporaries"

        totals = dict.fromkeys(("weights", "gradients", "optimizer_states", "activations", "temporaries"), 0)
        phase: str | None = None
        peaks: dict[str, int] = {}
        best, found = -1, dict(totals)
        for index, (number, size) in enumerate(self.log.events):
            phase = starts.get(index, phase)
            totals[kind(number)] += size
            total = sum(totals.values())
            if phase is not None and total > peaks.get(phase, -1):
                peaks[phase] = total
                if total > best:
                    best, found = total, dict(totals)
        resting = totals["weights"] + totals["gradients"] + totals["optimizer_states"]
        extra = {"fused": 0, "foreach": sum(self.parameters), "loop": 2 * max(self.parameters, default=0)}[optimizer]
        peaks["optimizer"] = resting + extra
        if peaks["optimizer"] > best:
            found = {**totals, "activations": 0, "temporaries": extra}
        return {name: peaks[name] / MIB for name in ("forward", "backward", "optimizer")}, {
            name: size / MIB for name, size in found.items()
        }


def fake_step(
    model: Any,
    batch: int,
    input_length: int,
    target_length: int | None,
    precision: str,
    attention: str = "eager",
    prepare: Callable[[nn.Module, int | None], Any] | None = None,
    loop: TrainingLoop = PLAIN,
) -> FakeStep:
    """Run one training step of a model or config; a model is not changed.

    `target_length` defaults to `input_length` and is used for encoder-decoder models only. `prepare` gets the new model
    and the target length that is used (or None), and may change how its step runs. `loop`: what the code around the
    model adds. Raises `BwskError` for invalid
    arguments and unsupported models.
    """
    require_shape(batch, input_length, target_length)
    kind = to_precision(precision)
    require_one_of("attention", attention, ("eager", "sdpa"))
    encoder_decoder = getattr(getattr(model, "config", model), "is_encoder_decoder", False)
    target_length = (target_length or input_length) if encoder_decoder else None
    with faked(model, attention) as fake:
        if prepare is not None:
            prepare(fake, target_length)
        inputs = example_batch(fake, batch, input_length, target_length)
        parameters = [p for p in fake.parameters() if p.requires_grad]
        states = [torch.empty_like(p) for p in parameters for _ in range(2)]
        tracker = Tracker()
        with tracker:
            weights = {tracker.adopt(p) for p in fake.parameters()}
            held = {tracker.adopt(s) for s in states}
            tracker.mark("forward")
            loss = step_loss(fake, inputs, kind, loop)
            tracker.mark("backward")
            torch.autograd.backward(loss)
            del loss
            gradients = {tracker.number(p.grad) for p in parameters if p.grad is not None}
            tracker.mark("optimizer")
            tracker.stop()
        sizes = [p.numel() * p.element_size() for p in parameters]
    return FakeStep(type(fake).__name__, target_length, tracker.log, weights, held, gradients, tracker.flops, sizes)


def require_shape(batch: Any, input_length: Any, target_length: Any) -> None:
    """Raise `BwskError` unless every size is a positive integer and the batch can be counted.

    `target_length` may be None.
    """
    for name, value in (("batch", batch), ("input_length", input_length), ("target_length", target_length)):
        if (value is not None or name != "target_length") and (not isinstance(value, int) or value < 1):
            raise BwskError(f"{name}: must be a whole number of at least 1, found {value!r}")
    longest = max(input_length, target_length or 1)
    if batch * longest**2 > _MOST_SCORES:
        raise BwskError(f"batch: {batch} sequences of {longest} tokens are more than can be counted; give fewer")


def require_one_of(name: str, value: Any, allowed: Any) -> None:
    """Raise `BwskError` unless the argument is one of the allowed values."""
    if value not in allowed:
        raise BwskError(f"{name}: found {value!r}, must be one of {', '.join(allowed)}")


def stock_peak(
    model: Any,
    shape: tuple[int, int, int | None],
    precision: str,
    attention: str = "eager",
    loop: TrainingLoop = PLAIN,
) -> float:
    """Peak of a stock step with AdamW foreach, in bytes, rounded to 0.01 MiB as in `predict_memory`.

    `shape` is (batch, input tokens, target tokens).
    """
    phases, _ = fake_step(model, *shape, precision, attention, loop=loop).summary("foreach")
    return round(max(phases.values()), 2) * MIB


@contextmanager
def faked(model: Any, attention: str) -> Iterator[nn.Module]:
    """A context with a new model of the same class, in training mode on fake tensors, with CUDA's memory use.

    Raises `BwskError` if the block's computation depends on values.
    """
    fake = _structure(model, attention)
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), cuda_rules():
        warnings.simplefilter("ignore")
        _materialise(fake, None if isinstance(model, nn.Module) else torch.float32)
        log = fake_tensor_log()
        before, log.disabled = log.disabled, True  # it would log, with a traceback, what is raised here anyway
        try:
            yield fake.train()
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise BwskError(
                f"{type(fake).__name__}: what its training step computes depends on values, not on shapes alone "
                "(such as layers dropped at random), so its memory cannot be predicted; not supported"
            ) from None
        finally:
            log.disabled = before


def _structure(model: Any, attention: str) -> nn.Module:
    """The model on the meta device: a copy of a module as it is, with what was taken out, frozen or cast; or a new one.

    A model that is reversible is copied as its stock self.
    """
    config = getattr(model, "config", model)
    if not isinstance(config, PreTrainedConfig):
        raise BwskError(f"predict_memory: needs a transformers model or config, found {type(model).__name__}")
    if not isinstance(model, nn.Module):
        return build(config, attn_implementation=attention)
    memo: dict[int, Any] = {}
    untrained = not any(p.requires_grad for p in model.parameters())  # until adapters are added, say
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad or untrained)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    try:
        fake = copy.deepcopy(model, memo)
    except Exception as error:  # a lock or a file among its attributes, say
        raise BwskError(
            f"{type(model).__name__}: cannot be copied to be run on fake tensors: {one_line(error)}"
        ) from None
    for module in fake.modules():
        # What makes a module reversible lies on it: its forward, its loss, and their states.
        for name, value in list(vars(module).items()):
            if name == "_bwsk" or type(value).__module__.startswith("bwsk."):
                del vars(module)[name]
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            hooks.clear()
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            set_attention_kind(module.config, attention)
    return fake


def _materialise(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Give a meta-device model fake CPU tensors, weights of `dtype` or their own; shared parameters stay shared."""
    seen: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                if id(value) not in seen:
                    seen[id(value)] = nn.Parameter(
                        torch.empty(value.shape, dtype=dtype or value.dtype), requires_grad=value.requires_grad
                    )
                module._parameters[name] = seen[id(value)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def step_loss(model: nn.Module, inputs: dict[str, Any], precision: Precision, loop: TrainingLoop = PLAIN) -> Tensor:
    """The loss of a step: the model's own or the loop's, for a model without a head the mean of its first output.

    Raises `BwskError` if the model does not accept these inputs, such as their lengths or kind of labels, computes no
    loss from them though it takes labels, or returns nothing to take a gradient of.
    """
    inputs = dict(inputs)
    labels = loop.take_labels(model, inputs)
    try:
        with torch.autocast("cpu", dtype=dtype_of(precision), enabled=precision != "fp32"):
            outputs = model(**inputs)
            if labels is None:
                loss = loss_of(outputs)
        outputs = loop.received(outputs)
        if labels is not None:
            loss = loop.loss(model, outputs, labels)
    except (BwskError, DataDependentOutputException, DynamicOutputShapeException):
        raise
    except Exception as error:  # models refuse inputs in as many ways as there are models
        raise BwskError(
            f"{type(model).__name__}: its training step does not run on {_shapes(inputs)}: {one_line(error)}"
        ) from error
    if labels is None and own_loss_of(outputs) is None and (wanted := label_arguments(model)):
        more = [name for name in wanted if name not in inputs]
        raise BwskError(
            f"{type(model).__name__}: computes no loss from {_shapes(inputs)}"
            f"{'; it also takes ' + ', '.join(more) if more else ''}; not supported"
        )
    if loss is None:
        raise BwskError(f"{type(model).__name__}: its outputs hold no floating-point tensor to train on; not supported")
    return loss


def _shapes(inputs: dict[str, Any]) -> str:
    return ", ".join(f"{key} {tuple(v.shape)}" for key, v in inputs.items() if isinstance(v, Tensor))
