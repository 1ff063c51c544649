"""Predict the peak memory of a training step, without a GPU and without allocating the model.

The step is run on fake tensors with CUDA's accounting (`memory_tracker`): forward, backward and clipping of the real
model and, in mode "reversible", of the real engine. The optimizer's phase is arithmetic: AdamW holds two moments per
parameter, and on top of weights, gradients and moments it needs

    fused      nothing
    foreach    one more list of all parameters (the square roots of the second moments)
    loop       two temporaries of the largest parameter

Checked against the published measurements of T5-small, batch 4, 256 + 256 tokens, float32, eager attention, AdamW
foreach: 1983 MiB conventional and 1177 MiB checkpointed were measured on one GPU; the difference, about 20 MiB on that
card, is cuBLAS workspaces, which are not predicted (they depend on the GPU: about 66 MiB on Hopper).
"""

from __future__ import annotations

import copy
import inspect
import warnings
from dataclasses import asdict, dataclass
from typing import Any

from bwsk.errors import BwskError

MODES = ("conventional", "checkpoint", "reversible")
PRECISIONS = ("fp32", "bf16", "fp16")
OPTIMIZERS = ("fused", "foreach", "loop")
MIB = 1 << 20


@dataclass(frozen=True)
class Prediction:
    """Predicted memory of one training step, in MiB.

    `phases`: peak within forward, backward and optimizer. `kinds`: what makes up the peak: weights, gradients,
    optimizer states, activations (kept by the forward for the backward) and temporaries. `flops`: of the step's matrix
    products, recomputation included.
    """

    peak_mib: float
    phases: dict[str, float]
    kinds: dict[str, float]
    flops: int
    model: str
    mode: str
    precision: str
    optimizer: str
    attention: str
    batch: int
    input_length: int
    target_length: int | None
    budget: str | None = None
    predicted: bool = True

    def to_json(self) -> dict[str, Any]:
        """As a JSON-ready mapping."""
        return asdict(self)


def predict_memory(
    model: Any,
    *,
    batch: int = 4,
    input_length: int = 256,
    target_length: int | None = None,
    mode: str = "conventional",
    precision: str = "fp32",
    budget: Any = None,
    optimizer: str | None = None,
    attention: str = "eager",
) -> Prediction:
    """Predict the peak memory of one training step of a Hugging Face model.

    `model`: a model or a config; a model is only read. Lengths are in tokens (images take theirs from the config);
    `target_length` defaults to `input_length` and counts for encoder-decoder models only. `precision`: "fp32", or
    float32 weights under autocast "bf16" or "fp16". `budget`: as for `make_reversible`, in mode "reversible" only.
    `optimizer`: AdamW "fused", "foreach" or "loop"; default is what PyTorch picks by itself on CUDA (foreach), and
    fused in mode "reversible". Raises `BwskError` on arguments or models it cannot use.
    """
    _check(batch, input_length, target_length, mode, precision, budget, optimizer, attention)
    config = getattr(model, "config", model)
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    target_length = (target_length or input_length) if encoder_decoder else None
    optimizer = optimizer or ("fused" if mode == "reversible" else "foreach")
    budget = (budget or "fast") if mode == "reversible" else None
    named = None if budget is None else str(budget)
    if isinstance(budget, float) and 0.0 < budget <= 1.0:
        stock = _step(model, config, batch, input_length, target_length, "conventional", precision, None, attention)
        budget = f"{budget * max(_summary(stock, 'fused')[0].values()):.3f}MiB"
    run = _step(model, config, batch, input_length, target_length, mode, precision, budget, attention)
    phases, kinds = _summary(run, optimizer)
    return Prediction(
        peak_mib=round(max(phases.values()), 2),
        phases={name: round(size, 2) for name, size in phases.items()},
        kinds={name: round(size, 2) for name, size in kinds.items()},
        flops=run.flops,
        model=run.name,
        mode=mode,
        precision=precision,
        optimizer=optimizer,
        attention=attention,
        batch=batch,
        input_length=input_length,
        target_length=target_length,
        budget=named,
    )


def largest_batch(model: Any, limit_mib: float, *, maximum: int = 4096, **step: Any) -> int:
    """The largest batch whose predicted peak is within `limit_mib`; 0 if not even one sequence fits.

    `step`: arguments of `predict_memory` without batch. Peaks grow almost in a straight line with the batch, so that
    each guess is where the line through the last two predictions meets the limit.
    """

    def peak(size: int) -> float:
        return predict_memory(model, batch=size, **step).peak_mib

    low, low_peak = 1, peak(1)
    if low_peak > limit_mib:
        return 0
    high, high_peak = None, None
    guess = 8
    while high is None or high - low > 1:
        guess = max(low + 1, min(guess, maximum if high is None else high - 1))
        size = peak(guess)
        if size <= limit_mib:
            slope = (size - low_peak) / (guess - low)
            low, low_peak = guess, size
            if low >= maximum:
                return maximum
        else:
            slope = (size - low_peak) / (guess - low)
            high, high_peak = guess, size
        guess = low + max(1, int((limit_mib - low_peak) / max(slope, 1e-9)))
        if high is None and guess > 4 * low:
            guess = max(guess, low + 1)
        if high is not None and high_peak is not None:
            guess = min(guess, high - 1)
    return low


def _check(batch, input_length, target_length, mode, precision, budget, optimizer, attention) -> None:
    for name, value in (("batch", batch), ("input_length", input_length), ("target_length", target_length)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise BwskError(f"{name}: must be a whole number of at least 1, found {value!r}")
    choices = {
        "mode": (mode, MODES),
        "precision": (precision, PRECISIONS),
        "optimizer": (optimizer, (None, *OPTIMIZERS)),
        "attention": (attention, ("eager", "sdpa")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            named = ", ".join(str(one) for one in allowed if one is not None)
            raise BwskError(f"{name}: found {value!r}, must be one of {named}")
    if budget is not None and mode != "reversible":
        raise BwskError(f"budget: found {budget!r} with mode {mode!r}; a budget belongs to mode 'reversible'")


@dataclass
class _Run:
    """The log of one fake step, and which storages turned out to be what."""

    name: str
    log: Any
    weights: set[int]
    states: set[int]
    gradients: set[int]
    flops: int
    parameters: list[int]  # bytes of each


def _step(model, config, batch, input_length, target_length, mode, precision, budget, attention) -> _Run:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from bwsk.memory_tracker import Tracker, cuda_rules

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    meta = _structure(model, config, attention)
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), cuda_rules():
        warnings.simplefilter("ignore")
        _materialise(meta)
        meta.train()
        if mode == "checkpoint":
            _enable_checkpointing(meta)
        elif mode == "reversible":
            from bwsk.reversible import make_reversible

            make_reversible(
                meta,
                budget,
                batch=batch,
                input_length=input_length,
                target_length=target_length,
                precision=precision,
            )
        inputs = example_inputs(meta, batch, input_length, target_length)
        parameters = [p for p in meta.parameters() if p.requires_grad]
        states = [torch.empty_like(p) for p in parameters for _ in range(2)]
        tracker = Tracker()
        with tracker:
            weights = {tracker.adopt(p) for p in meta.parameters()}
            held = {tracker.adopt(s) for s in states}
            tracker.mark("forward")
            with torch.autocast("cpu", dtype=dtypes[precision], enabled=precision != "fp32"):
                loss = loss_of(meta(**inputs))
            tracker.mark("backward")
            torch.autograd.backward(loss)
            del loss
            gradients = {tracker.number(p.grad) for p in parameters if p.grad is not None}
            tracker.mark("optimizer")
            tracker.stop()
        sizes = [p.numel() * p.element_size() for p in parameters]
    return _Run(type(meta).__name__, tracker.log, weights, held, gradients, tracker.flops, sizes)


def _structure(model: Any, config: Any, attention: str) -> Any:
    """A new model of the same class on the meta device."""
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

    from bwsk.architecture import build

    if not isinstance(config, PreTrainedConfig):
        raise BwskError(f"predict_memory: needs a transformers model or config, found {type(model).__name__}")
    if not isinstance(model, nn.Module):
        return build(config, attn_implementation=attention)
    with torch.device("meta"):
        return type(model)._from_config(copy.deepcopy(config), attn_implementation=attention)


def _materialise(model: Any) -> None:
    """Give a meta-device model fake CPU tensors; shared parameters stay shared."""
    import torch

    seen: dict[int, Any] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                if id(value) not in seen:
                    seen[id(value)] = torch.nn.Parameter(
                        torch.empty(value.shape, dtype=torch.float32), requires_grad=value.requires_grad
                    )
                module._parameters[name] = seen[id(value)]
        for name, value in module._buffers.items():
            if value is not None and value.is_meta:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype)


def _enable_checkpointing(model: Any) -> None:
    try:
        # Named activation_checkpointing_enable in newer transformers, which still accept this name with a warning.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except (ValueError, NotImplementedError) as error:
        raise BwskError(
            f"{type(model).__name__}: transformers cannot checkpoint it ({error}); use another mode"
        ) from None


def example_inputs(model: Any, batch: int, input_length: int, target_length: int | None, device: str = "cpu") -> dict:
    """Inputs of a training step for `model`: token ids or pixels, and labels (zeros; shapes are what matters)."""
    import torch

    config = model.config
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {}
    if "pixel_values" in accepted:
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        inputs["pixel_values"] = torch.zeros(batch, config.num_channels, height, width, device=device)
        labels = (batch,)
    elif "input_ids" in accepted:
        inputs["input_ids"] = torch.zeros(batch, input_length, dtype=torch.long, device=device)
        labels = (batch, target_length or input_length)
        if "SequenceClassification" in type(model).__name__:
            labels = (batch,)
    else:
        raise BwskError(f"{type(model).__name__}: takes neither input_ids nor pixel_values; not supported here")
    if "labels" in accepted:
        inputs["labels"] = torch.zeros(labels, dtype=torch.long, device=device)
    elif target_length is not None:
        inputs["decoder_input_ids"] = torch.zeros(batch, target_length, dtype=torch.long, device=device)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def loss_of(outputs: Any) -> Any:
    """The model's own loss, or for a model without a head the mean of its last hidden states."""
    loss = getattr(outputs, "loss", None)
    return outputs[0].float().mean() if loss is None else loss


def _summary(run: _Run, optimizer: str) -> tuple[dict[str, float], dict[str, float]]:
    """Peaks by phase and the composition of the largest, MiB."""
    starts = {index: phase for phase, index in run.log.marks}
    backward = next(index for phase, index in run.log.marks if phase == "backward")
    ends = {number: index for index, (number, size) in enumerate(run.log.events) if size < 0}
    born = {number: index for index, (number, size) in enumerate(run.log.events) if size > 0}

    def kind(number: int) -> str:
        if number in run.weights:
            return "weights"
        if number in run.states:
            return "optimizer_states"
        if number in run.gradients:
            return "gradients"
        kept = born[number] < backward <= ends.get(number, len(run.log.events))
        return "activations" if kept else "temporaries"

    totals = dict.fromkeys(("weights", "gradients", "optimizer_states", "activations", "temporaries"), 0)
    phase, peaks, best, found = None, {}, -1, dict(totals)
    for index, (number, size) in enumerate(run.log.events):
        phase = starts.get(index, phase)
        totals[kind(number)] += size
        total = sum(totals.values())
        if phase is not None and total > peaks.get(phase, -1):
            peaks[phase] = total
            if total > best:
                best, found = total, dict(totals)
    resting = totals["weights"] + totals["gradients"] + totals["optimizer_states"]
    extra = {"fused": 0, "foreach": sum(run.parameters), "loop": 2 * max(run.parameters, default=0)}[optimizer]
    peaks["optimizer"] = resting + extra
    if peaks["optimizer"] > best:
        found = {**totals, "activations": 0, "temporaries": extra}
    return {name: peaks[name] / MIB for name in ("forward", "backward", "optimizer")}, {
        name: size / MIB for name, size in found.items()
    }
