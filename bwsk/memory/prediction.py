"""Predict the peak memory of a training step, without a GPU and without allocating the model.

The step is run on fake tensors (`fake_step`), in mode "reversible" with the real engine.

Checked against the published measurements of T5-small, batch 4, 256 + 256 tokens, float32, eager attention, AdamW
foreach: 1983 MiB conventional and 1177 MiB checkpointed were measured on one GPU; the difference, about 20 MiB on that
card, is cuBLAS workspaces, which are not predicted (they depend on the GPU: about 66 MiB on Hopper).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from bwsk._compat import enable_checkpointing
from bwsk.architecture import load_config
from bwsk.errors import BwskError
from bwsk.memory.fake_step import fake_step, require_one_of, stock_peak
from bwsk.memory.training_loop import TrainingLoop, precision_in
from bwsk.units import MIB


@dataclass(frozen=True)
class Prediction:
    """Predicted memory of one training step, in MiB.

    `phases`: peak within forward, backward and optimizer. `kinds`: what makes up the peak: weights, gradients,
    optimizer states, activations (saved by the forward for the backward) and temporaries. `flops`: FLOPs of the step's
    matrix products, recomputation included.
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

    def to_dict(self) -> dict[str, Any]:
        """As a JSON-ready mapping."""
        return asdict(self)


def predict_memory(
    model: Any,
    *,
    batch: int = 4,
    input_length: int = 256,
    target_length: int | None = None,
    mode: str = "conventional",
    precision: str | None = None,
    budget: Any = None,
    optimizer: str | None = None,
    attention: str = "eager",
    training_args: Any = None,
) -> Prediction:
    """Predict the peak memory of one training step of a Hugging Face model.

    `model`: a model (which is not changed), a config, a Hub id, a directory or a `config.json`. Lengths are in tokens
    (the size of images is the config's); `target_length` defaults to `input_length` and is used for encoder-decoder
    models only. `mode`: "conventional", "checkpoint" or "reversible". `precision`: "fp32", the default, or float32
    weights under autocast "bf16" or "fp16". `budget`: as for `make_reversible`, in mode "reversible" only.
    `optimizer`: AdamW "fused", "foreach" or "loop"; the default is PyTorch's own on CUDA (foreach), and fused in mode
    "reversible". `attention`: "eager" or "sdpa". `training_args`: the arguments of a Trainer, for a step of it. Raises
    `BwskError` for invalid arguments and unsupported models.
    """
    model = model if isinstance(model, nn.Module) else load_config(model)
    precision, loop = precision_in(training_args, precision), TrainingLoop.of(training_args)
    require_one_of("mode", mode, ("conventional", "checkpoint", "reversible"))
    if optimizer is not None:
        require_one_of("optimizer", optimizer, ("fused", "foreach", "loop"))
    if budget is not None and mode != "reversible":
        raise BwskError(f"budget: found {budget!r} with mode {mode!r}; a budget belongs to mode 'reversible'")
    optimizer = optimizer or ("fused" if mode == "reversible" else "foreach")
    budget = "fast" if budget is None and mode == "reversible" else budget
    named = None if budget is None else str(budget)
    step = (model, batch, input_length, target_length, precision, attention)
    if isinstance(budget, float) and 0.0 < budget <= 1.0:
        # As a size: `make_reversible` could not measure the stock peak inside the fake step.
        budget = f"{budget * stock_peak(model, step[1:4], precision, attention, loop) / MIB:.3f}MiB"

    def prepare(fake: nn.Module, targets: int | None) -> None:
        if mode == "checkpoint":
            _enable_checkpointing(fake)
        elif mode == "reversible":
            from bwsk.reversible.handle import make_reversible

            make_reversible(
                fake,
                budget,
                batch=batch,
                input_length=input_length,
                target_length=targets,
                precision=precision,
                training_args=training_args,
                verify=False,  # there are no values to compare
            )

    run = fake_step(*step, prepare, loop)
    phases, kinds = run.summary(optimizer)
    return Prediction(
        peak_mib=round(max(phases.values()), 2),
        phases={name: round(size, 2) for name, size in phases.items()},
        kinds={name: round(size, 2) for name, size in kinds.items()},
        flops=run.flops,
        model=run.model,
        mode=mode,
        precision=precision,
        optimizer=optimizer,
        attention=attention,
        batch=batch,
        input_length=input_length,
        target_length=run.target_length,
        budget=named,
    )


def largest_batch(model: Any, limit_mib: float, *, maximum: int = 4096, **step: Any) -> int:
    """The largest batch whose predicted peak is within `limit_mib`; 0 if not even one sequence fits.

    `step`: arguments of `predict_memory` without batch. If its budget is a size, a batch for which no plan meets that
    budget does not fit either. Peaks grow almost linearly with the batch, so each guess is where the line through the
    last two predictions meets the limit.
    """
    from bwsk.reversible.plan import BudgetTooSmall

    def peak(size: int) -> float:
        try:
            return predict_memory(model, batch=size, **step).peak_mib
        except BudgetTooSmall:
            if isinstance(step.get("budget"), float):  # a fraction: small batches may miss it, large ones meet it
                raise
            return math.inf

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
        if high is not None and size == math.inf:
            guess = (low + high) // 2
        if high is None and guess > 4 * low:
            guess = max(guess, low + 1)
        if high is not None and high_peak is not None:
            guess = min(guess, high - 1)
    return low


def _enable_checkpointing(model: Any) -> None:
    try:
        enable_checkpointing(model)
    except (ValueError, NotImplementedError) as error:
        raise BwskError(
            f"{type(model).__name__}: transformers cannot checkpoint it ({error}); use another mode"
        ) from None
