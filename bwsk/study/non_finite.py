"""Explain a training step whose numbers are not finite.

Under float16 two kinds of overflow both show as a skipped step, but need different remedies:

    backward   a gradient times the loss scale exceeds 65504. The gradient scaler skips the step and halves the scale,
               so the run recovers by itself. A few such steps at the start of a run are how the scale is found.
    forward    an activation exceeds 65504, so the loss itself is not finite. No scale changes that, so T5's output
               projection, which is known to overflow, is computed outside of float16 (`bwsk.reversible.t5.float16`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

# Steps in a row without a finite loss; steps in a row that the scaler skipped: from 2^16 the scale is then below 2^-14.
FORWARD_LIMIT = 10
SKIPPED_LIMIT = 30
# Share of a run's steps that may be lost to forward overflows in total.
FORWARD_SHARE = 0.02


def should_abort(forward: bool, in_a_row: int, forward_in_all: int, planned: int, scaled: bool) -> bool:
    """Whether a run must stop after a step that was not finite.

    `forward`: the loss was not finite. `in_a_row`: number of such steps in a row. `forward_in_all`: number of forward
    overflows in the run. `scaled`: a gradient scaler skips such steps; without one the weights are already corrupted.
    """
    if not scaled:
        return True
    if forward:
        return in_a_row >= FORWARD_LIMIT or forward_in_all > max(FORWARD_LIMIT, FORWARD_SHARE * planned)
    return in_a_row >= SKIPPED_LIMIT


def first_not_finite(model: nn.Module, loss_of_step: Callable[[], Tensor]) -> str | None:
    """Where a value that is not finite first appears in one forward and backward: `module`, or None.

    `loss_of_step` runs the forward and returns the (scaled) loss. Parameters are checked first, then modules as
    they finish, then the gradients of their outputs as they are computed.
    """
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"the weights of {name}"
    found: list[str] = []

    def note(where: str, value: Any) -> None:
        for tensor in _tensors(value):
            if not found and not bool(tensor.isfinite().all()):
                found.append(where)

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            note(f"the output of {name}", output)
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: note(f"the gradient of the output of {name}", gradient))

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        loss = loss_of_step()
        note("the loss", loss)
        if not found:
            loss.backward()
            for name, parameter in model.named_parameters():
                note(f"the gradient of {name}", parameter.grad)
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    return found[0] if found else None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (list, tuple)) else []
