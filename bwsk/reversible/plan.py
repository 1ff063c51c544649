"""What a training step saves for its backward and what it recomputes, and how much memory that takes over time.

A backward frees activations and fills gradients. With u = 1 … n units (blocks) in forward order, saved bytes K_u,
gradient bytes G_u and working memory T_u, and with B the memory that is always in use (weights, optimizer states, …),
the peak of a step is the largest of

    head:        B + Σ K_u + (loss head)
    unit i:      B + Σ_{u ≤ i} K_u + Σ_{u > i} G_u + (head's gradient) + T_i
    end:         B + Σ G_u + (head's gradient)

so saved memory shrinks as the backward goes on: activations of the first units count until the end, those of the last
ones only at its start. A budget is solved under that time-varying cap: while the largest of these exceeds it, the
solver takes the choice that frees most bytes per FLOP among the units whose activations are alive at that moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from bwsk.errors import BwskError
from bwsk.reversible.budget import Budget
from bwsk.units import MIB


class Level(StrEnum):
    """How one module runs in a training step, from most saved to least."""

    STOCK = "stock"  # the block runs its stock forward
    SAVE_CONTEXT = "save_context"  # T5: q, k, v and the context P·v; of a feed-forward, its hidden activations
    SAVE_QKV = "save_qkv"  # T5: q, k, v alone
    SAVE_INPUT = "save_input"  # T5: the sublayer's input and the dropout masks
    CHECKPOINT_ATTENTION = "checkpoint_attention"  # others: scores, softmax and dropout are recomputed from q, k, v
    CHECKPOINT_BLOCK = "checkpoint_block"  # the whole block is recomputed from its input


@dataclass(frozen=True)
class Choice:
    """One way to run a unit: saved bytes, recomputed FLOPs, working memory of its backward, and the levels for it."""

    saved: int
    flops: int
    work: int
    levels: tuple[tuple[str, str], ...]  # (module, level)
    part: str = ""  # of what the level holds, if not of all: "1 of 2 attentions"


@dataclass(frozen=True)
class Unit:
    """A block: its choices from most to least saved, the bytes of its gradients, the FLOPs of its forward."""

    name: str
    choices: tuple[Choice, ...]
    gradients: int
    forward: int


@dataclass(frozen=True)
class Head:
    """The loss head: bytes at the backward's start, of which its weight's gradient stays; saved during the forward."""

    kind: str
    saved: int
    peak: int
    gradient: int
    forward: int


@dataclass(repr=False)
class Plan:
    """Levels per module and the predicted memory over time; all sizes in bytes."""

    budget: Budget
    units: Sequence[Unit]
    choice_indices: list[int]
    head: Head
    base: int
    guarantee: str = "bit-identical"
    context: Any = None  # what `report` needs to list the operations of a T5's plan

    def __repr__(self) -> str:
        figures = f"{self.peak / MIB:,.0f} MiB at the peak (predicted), {self.overhead:+.1%} FLOPs"
        return f"<Plan {self.budget.name}: {figures}, {self.guarantee}>"

    @property
    def choices(self) -> list[Choice]:
        """The choice made for each unit, in forward order."""
        return [unit.choices[pick] for unit, pick in zip(self.units, self.choice_indices, strict=True)]

    @property
    def levels(self) -> dict[str, str]:
        """Module name to level."""
        return {module: level for choice in self.choices for module, level in choice.levels}

    @property
    def saved(self) -> int:
        """Bytes saved from forward to backward, the loss head's included."""
        return sum(choice.saved for choice in self.choices) + self.head.saved

    @property
    def step_flops(self) -> int:
        """FLOPs of a step that recomputes nothing: forward and twice that for the backward."""
        return 3 * (sum(unit.forward for unit in self.units) + self.head.forward)

    @property
    def extra_flops(self) -> int:
        """FLOPs recomputed in a step."""
        return sum(choice.flops for choice in self.choices)

    @property
    def overhead(self) -> float:
        """FLOPs recomputed as a fraction of the step's."""
        return self.extra_flops / self.step_flops if self.step_flops else 0.0

    def memory_timeline(self) -> list[tuple[str, int]]:
        """(moment, bytes) for each moment of the backward that can be the peak."""
        moments, saved = [], sum(choice.saved for choice in self.choices)
        gradients = self.head.gradient
        moments.append(("loss head", self.base + saved + self.head.saved + self.head.peak))
        for unit, choice in zip(reversed(self.units), reversed(self.choices), strict=True):
            moments.append((unit.name, self.base + saved + gradients + choice.work))
            saved -= choice.saved
            gradients += unit.gradients
        moments.append(("end", self.base + gradients))
        return moments

    @property
    def peak(self) -> int:
        """The largest of `memory_timeline`, bytes."""
        return max(size for _, size in self.memory_timeline())

    @property
    def peak_mib(self) -> float:
        """The predicted peak of a step, MiB."""
        return round(self.peak / MIB, 2)

    def point(self) -> dict[str, float]:
        """This plan as a point of the trade-off curve."""
        return {
            "peak_mib": self.peak_mib,
            "saved_mib": round(self.saved / MIB, 2),
            "extra_flops": self.extra_flops,
            "overhead": round(self.overhead, 5),
        }

    def to_dict(self) -> dict[str, Any]:
        """The plan as a JSON-ready mapping."""
        return {
            "budget": self.budget.name,
            "guarantee": self.guarantee,
            "predicted": True,
            **self.point(),
            "step_flops": self.step_flops,
            "levels": self.levels,
            "head": self.head.kind,
        }


def solve(plan: Plan, cap: int | None, flops: float | None) -> Plan:
    """Lower the peak of `plan` in place until it is within `cap` bytes, or until another FLOP would exceed `flops`.

    Greedy on bytes per FLOP under the time-varying cap; with neither limit it goes as low as it can.
    """
    limit = None if flops is None else flops * plan.step_flops
    seen = {tuple(plan.choice_indices)}  # moves that leave the peak unchanged could cycle for ever
    while cap is None or plan.peak > cap:
        timeline = plan.memory_timeline()
        worst = max(range(len(timeline)), key=lambda i: timeline[i][1])
        alive = len(plan.units) if worst == 0 else len(plan.units) - (worst - 1)
        move = _best_move(plan, alive, working=worst - 1 if worst else None, limit=limit)
        if move is None:
            break
        before, (unit, pick) = plan.peak, move
        old, plan.choice_indices[unit] = plan.choice_indices[unit], pick
        if plan.peak > before or tuple(plan.choice_indices) in seen:
            plan.choice_indices[unit] = old
            break
        seen.add(tuple(plan.choice_indices))
    return plan


def _best_move(plan: Plan, alive: int, working: int | None, limit: float | None) -> tuple[int, int] | None:
    """The choice that frees most bytes per FLOP among the first `alive` units: (unit, index of the choice), or None.

    `working`: the unit whose backward is running at the peak, counted from the end; its working memory counts too.
    """
    spent, best, score = plan.extra_flops, None, 0.0
    running = None if working is None else len(plan.units) - 1 - working
    for u in range(min(alive, len(plan.units))):
        now = plan.units[u].choices[plan.choice_indices[u]]
        for pick, choice in enumerate(plan.units[u].choices):
            freed, cost = now.saved - choice.saved, choice.flops - now.flops
            if u == running:
                freed += now.work - choice.work
            if freed <= 0 or (limit is not None and spent + cost > limit):
                continue
            value = freed / max(cost, 1)
            if value > score:
                best, score = (u, pick), value
    return best


class BudgetTooSmall(BwskError):
    """No plan stays within the budget's cap."""


def require_within_budget(plan: Plan, states: int) -> Plan:
    """The plan, if it meets its budget's cap; raises `BudgetTooSmall` if not.

    `states`: bytes of weights, gradients and optimizer states.
    """
    cap = plan.budget.cap
    if cap is not None and plan.peak > cap:
        raise BudgetTooSmall(
            f"budget {plan.budget.name}: this step cannot go below {_mib(plan.peak)} (weights, gradients and "
            f"AdamW states alone are {_mib(states)}); allow more, or make the batch smaller"
        )
    return plan


def _mib(size: int) -> str:
    return f"{size / MIB:.{0 if size >= 10 * MIB else 2}f} MiB"
