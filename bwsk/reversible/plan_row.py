"""One operation of a plan, for reports: its S/K verdict, and whether its result is saved or recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from bwsk.classification.operators import OpInfo
from bwsk.classification.rules.sets import rule_set


@dataclass(frozen=True)
class PlanRow:
    """One operation of the plan: its verdict, what happens to its result, bytes saved and FLOPs recomputed."""

    module: str
    operation: str
    verdict: str
    action: str  # "saved", "saved (stock)", "recomputed", "residue" or "passes through"
    saved: int
    flops: int


@cache
def verdict(kind: str, **facts: object) -> str:
    """The S/K verdict and residue of the strict rules for one kind of operation, such as "K: one bit per element"."""
    rule = rule_set("strict").decide(OpInfo(kind, facts))
    return "GRAY" if rule is None else f"{rule.verdict.value}: {rule.residue.value}"
