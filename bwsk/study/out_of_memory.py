"""Advice for a training step that ran out of memory: predicted need, free memory, and what would fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bwsk.errors import BwskError
from bwsk.memory.prediction import largest_batch, predict_memory

if TYPE_CHECKING:
    from bwsk.study.params import Params


def out_of_memory(params: Params, variant: str, model: Any, device: torch.device, free: float | None) -> BwskError:
    """The error with the predicted need of a step of `variant`, the free memory, and what would fit.

    `model`: a model or its config, which is only read. `free`: `free_memory` before the run began, because memory that
    a failed run has freed is not visible from within its process.
    """
    train = params.train
    reversible = variant.endswith("bwsk-reversible")
    step: dict[str, Any] = {
        **params.step,
        "mode": "reversible" if reversible else "conventional",
        "budget": train.budget if reversible else None,
        "optimizer": "fused",
    }
    predicted = predict_memory(model, batch=train.batch_size, **step).peak_mib
    text = (
        f"{variant}: out of memory on {device.type}: a step of batch {train.batch_size} is predicted to need "
        f"{predicted:,.0f} MiB"
    )
    if free is None:
        return BwskError(f"{text}; set train.batch_size lower")
    return BwskError(f"{text}, {free:,.0f} MiB were free; {_what_fits(model, train.batch_size, free, step)}")


def _what_fits(model: Any, batch: int, free: float, step: dict[str, Any]) -> str:
    fits = largest_batch(model, free, maximum=batch, **step)
    if fits >= batch:
        return "by this the step would fit: close what else uses the memory, or set train.batch_size lower"
    advice = [f"set train.batch_size to {fits} at most"] if fits else []
    for budget in ("fast", "max"):
        other = {**step, "mode": "reversible", "budget": budget}
        if step["budget"] != budget and predict_memory(model, batch=batch, **other).peak_mib <= free:
            advice.append(f"train bwsk-reversible with train.budget: {budget}, which fits")
            break
    return ", or ".join(advice) or "not even one sequence fits: use a smaller tokens.block or a larger machine"
