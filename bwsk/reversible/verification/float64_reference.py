"""Gradients of one step in float64, to tell which of two others is more exact.

Dropout masks must be those of the step that is judged. On the CPU they are, for the same random state gives the same
masks in each dtype; on CUDA they need not be. The gradients, taken as one vector, tell: rounding leaves them a tenth or
less of `NEAR` apart, other masks 0.4 or more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bwsk.architecture import one_line
from bwsk.reversible.verification.tensor_bits import dense, distance, norm, ratio

# How far a step may be from the same step in float64, relative: its loss, and its gradients as one vector.
NEAR = {torch.float64: 0.02, torch.float32: 0.02}
NEAR_IN_HALF_PRECISION = 0.2


class Float64Reference:
    """The gradients of a model's float64 copy, or in `missing` why there are none, and the order of its modules."""

    def __init__(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        """`model`: a copy that is nobody else's, which becomes float64; `weights`: the values of its parameters."""
        self.model: nn.Module | None = model
        self.missing, self.loss = "", math.nan
        self.gradients: dict[str, Tensor | None] = {}
        self._order: dict[str, int] = {}
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._note(name))
        parameters = dict(model.named_parameters())
        if parameters.keys() != weights.keys():
            self.missing = "a has other parameters than the model"
            return
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
        model.double()

    def _note(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._order.setdefault(name, len(self._order))

        return hook

    def run(
        self,
        inputs: dict[str, Any],
        leaves: dict[str, Tensor],
        scale: float,
        loss_in: Callable[[Any], Tensor | None],
    ) -> None:
        """Forward, and backward of `scale` times the loss; `leaves`: inputs whose gradient is asked for."""
        if self.missing or self.model is None:
            return
        try:
            loss = loss_in(self.model(**inputs))
            if loss is None:
                raise ValueError("it returns no loss")
            (loss * scale).backward()
        except Exception as error:  # models refuse float64 in as many ways as there are models
            self.missing = f"the model does not run in float64 ({one_line(error)})"
            return
        self.loss = loss.item()
        self.gradients = {name: p.grad for name, p in (*self.model.named_parameters(), *leaves.items())}

    def forget(self) -> None:
        """Free the copy and its gradients, for which there is no further use."""
        self.model, self.gradients = None, {}

    def place(self, module: str) -> int:
        """Where a module runs in the forward pass; one that is not called stands where the one around it does."""
        if module == "inputs":
            return -1
        while module not in self._order and module:
            module = module.rpartition(".")[0]
        return self._order[module] if module in self._order else len(self._order)

    def require_near(self, *steps: tuple[float, dict[str, Tensor | None]], dtypes: set[torch.dtype]) -> None:
        """Set `missing` unless one of the steps, given as loss and gradients, differs from this one by rounding."""
        limit = max(NEAR.get(dtype, NEAR_IN_HALF_PRECISION) for dtype in dtypes)
        if self.missing or any(self._is_near(loss, gradients, limit) for loss, gradients in steps):
            return
        self.missing = (
            f"the float64 copy has another loss ({self.loss:.6g}, where a has {steps[0][0]:.6g}) or far other "
            "gradients, as with other dropout masks"
        )

    def _is_near(self, loss: float, gradients: dict[str, Tensor | None], limit: float) -> bool:
        pairs = [(g, r) for n, r in self.gradients.items() if r is not None and (g := gradients.get(n)) is not None]
        apart = math.hypot(*(distance(g, r) for g, r in pairs))
        length = math.hypot(*(norm(r) for _, r in pairs))
        return abs(loss - self.loss) <= limit * abs(self.loss) and apart <= limit * length

    def errors(self, name: str, *gradients: Tensor | None) -> list[float | None]:
        """The distance of each gradient from the one here, relative to the latter; None where there is none.

        All are None if each is further away than the exact gradient is long: then that is zero up to rounding, as the
        gradient of a key's bias is, and relative errors say nothing.
        """
        exact = self.gradients.get(name)
        if self.missing or exact is None:
            return [None for _ in gradients]
        length = norm(dense(exact))
        found = [None if g is None else ratio(distance(g, exact), length) for g in gradients]
        return found if any(error is not None and error < 1 for error in found) else [None for _ in gradients]
