"""A plan as a report: its operations with their verdicts, and everything about it as one mapping."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bwsk.reversible.plan import Level, Plan
from bwsk.reversible.plan_row import PlanRow, verdict
from bwsk.reversible.t5 import report as t5


def rows(plan: Plan) -> list[PlanRow]:
    """The operations of each block in forward order, and of the loss head."""
    return _checkpointed_rows(plan) if plan.context is None else t5.rows(plan, *plan.context)


def plan_dict(plan: Plan) -> dict[str, Any]:
    """The plan with its operations, ready for strict JSON."""
    return {**plan.to_dict(), "runs": dict(explanation(plan)), "operations": [asdict(row) for row in rows(plan)]}


_RUNS = {
    Level.STOCK: "the stock forward",
    Level.SAVE_CONTEXT: "the engine; saves the results of its matrix products",
    Level.SAVE_QKV: "the engine; saves q, k and v",
    Level.SAVE_INPUT: "the engine; saves its input",
    Level.CHECKPOINT_ATTENTION: "stock; scores, softmax, dropout recomputed",
    Level.CHECKPOINT_BLOCK: "stock; recomputed as a whole from its input",
}
_HEADS = {
    "exact": "one copy of the logits, bit-identical",
    "chunked": "never makes the logits; not bit-identical",
    "none": "the stock forward; there is no vocabulary projection",
}


def explanation(plan: Plan) -> list[tuple[str, str]]:
    """(module, what it runs and, for the stock forward, why) for every module of the plan in forward order."""
    found = []
    for unit, choice in zip(plan.units, plan.choices, strict=True):
        more = f" in {choice.part}" if choice.part else ""
        if choice.levels[0][1] == Level.STOCK:
            more = "; to recompute it would save nothing" if len(unit.choices) == 1 else "; more is not in this budget"
        found += [(module, _RUNS[Level(level)] + more) for module, level in choice.levels]
    # The loss of other models is replaced when the model is at hand: `Reversible.status` knows.
    return found if plan.context is None else [*found, ("loss head", _HEADS[plan.head.kind])]


def _checkpointed_rows(plan: Plan) -> list[PlanRow]:
    found = []
    for choice in plan.choices:
        ((name, level),) = choice.levels
        if level == Level.STOCK:
            found.append(PlanRow(name, "everything", "S and K", "saved (stock)", choice.saved, 0))
            continue
        if level == Level.CHECKPOINT_BLOCK:
            found.append(PlanRow(name, "whole block", "S and K", "recomputed", choice.saved, choice.flops))
            continue
        action = f"recomputed in {choice.part}" if choice.part else "recomputed"
        found += [
            PlanRow(name, "q kᵀ + mask", verdict("product"), action, 0, choice.flops // 2),
            PlanRow(name, "softmax", verdict("softmax"), action, 0, 0),
            PlanRow(name, "dropout", verdict("dropout", training=True, p=0.1), action, 0, 0),
            PlanRow(name, "P v", verdict("product"), action, 0, choice.flops - choice.flops // 2),
            PlanRow(name, "everything else", "S and K", "saved", choice.saved, 0),
        ]
    return found
