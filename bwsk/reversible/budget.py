"""Budgets of a reversible training step: by name, as a fraction of the stock peak, or as a size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bwsk.errors import BwskError
from bwsk.units import size_in_bytes


@dataclass(frozen=True)
class Budget:
    """A cap in bytes, or a cap on recomputed FLOPs as a fraction of a step; `head` is "exact" or "chunked"."""

    name: str
    cap: int | None = None
    flops: float | None = None
    head: str = "exact"


NAMED = {
    "fast": Budget("fast", flops=0.02),
    "balanced": Budget("balanced", flops=0.03, head="chunked"),
    "max": Budget("max"),
}


def parse_budget(budget: str | float | None, stock_peak: Callable[[], float]) -> Budget:
    """The budget for a name, a fraction or a size; `stock_peak()` gives the stock step's peak in bytes, for fractions.

    Raises `BwskError` for anything else.
    """
    if isinstance(budget, str) and budget in NAMED:
        return NAMED[budget]
    if isinstance(budget, str):
        text = budget.strip()
        try:
            budget = float(text)
        except ValueError:
            try:
                return Budget(text, cap=size_in_bytes(text))
            except BwskError:
                raise BwskError(
                    f"budget: found {text!r}; give fast, balanced, max, a fraction such as 0.6 or a size such as 900MiB"
                ) from None
    if isinstance(budget, (int, float)) and not isinstance(budget, bool) and 0.0 < budget <= 1.0:
        return Budget(f"{budget:g} of the stock peak", cap=int(budget * stock_peak()))
    raise BwskError(f"budget: found {budget!r}; a number must be a fraction in (0, 1], a size needs a unit (900MiB)")
