"""What `same_gradients` found: whether two set-ups give the same bits, and where they do not, which is more exact."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bwsk.units import Precision

SideName = Literal["a", "b"]


@dataclass(frozen=True)
class GradientRow:
    """The gradient of one parameter (or of an input that requires one) over all steps.

    Numbers are norms of the whole tensor, from the first step in which any gradient or the loss differs. They are None
    where there is nothing to compute them from: no gradient, no reference, not finite, or a difference that began in a
    later step, when the weights differed already.
    """

    name: str
    module: str  # the module that holds the parameter
    steps: tuple[int, ...] = ()  # the steps in which it differs, counted from 1
    repeatable: bool = True  # whether two runs of set-up a give the same bits
    missing: SideName | None = None  # the side that has no gradient where the other has one
    difference: float | None = None  # ‖a − b‖ / max(‖a‖, ‖b‖)
    error_a: float | None = None  # ‖a − r‖ / ‖r‖ for the gradient r of the float64 copy
    error_b: float | None = None

    @property
    def identical(self) -> bool:
        """Whether both sides have the same bits in every step."""
        return not self.steps

    @property
    def closer(self) -> Literal["a", "b", "equal"] | None:
        """The side that is closer to the float64 copy; "equal" if it is so by less than one per cent."""
        if self.error_a is None or self.error_b is None:
            return None
        if math.isclose(self.error_a, self.error_b, rel_tol=0.01):
            return "equal"
        return "a" if self.error_a < self.error_b else "b"

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the columns of `HEADINGS`."""
        difference = f"none in {self.missing}" if self.missing else _number(self.difference)
        closer = self.closer or "-"
        numbers = (_number(self.error_a), _number(self.error_b))
        return self.name, str(self.steps[0]) if self.steps else "-", difference, *numbers, closer


HEADINGS = ("gradient", "step", "difference", "error a", "error b", "closer")


@dataclass(frozen=True, repr=False)
class GradientComparison:
    """The comparison of two set-ups. It is true exactly if the loss and every gradient are identical in every step."""

    model: str
    a: str
    b: str
    steps: int
    precision: Precision
    seed: int
    device: str
    versions: dict[str, str]
    not_repeatable: tuple[str, ...]  # "loss" and the gradients in which two runs of a differ
    advice: str  # what to set, if a is not repeatable
    losses: tuple[tuple[float | None, float | None], ...]  # of a and b per step; None if not finite
    loss_steps: tuple[int, ...]  # the steps in which the losses differ, counted from 1
    no_reference: str  # why there are no errors against float64, where something differs; else empty
    hint: str  # a known cause of a difference between these two set-ups; else empty
    rows: tuple[GradientRow, ...]  # in the order of the forward pass, if anything differs

    def __bool__(self) -> bool:
        return self.identical

    def __repr__(self) -> str:
        return f"<GradientComparison {self._answer()}>"

    def __str__(self) -> str:
        return self.report()

    @property
    def identical(self) -> bool:
        """Whether the loss and every gradient have the same bits in every step."""
        return not self.loss_steps and all(row.identical for row in self.rows)

    @property
    def repeatable(self) -> bool:
        """Whether two runs of set-up a have the same bits."""
        return not self.not_repeatable

    @property
    def differing(self) -> tuple[GradientRow, ...]:
        """The rows that differ: those of the first differing step first, then by forward order."""
        return tuple(sorted((row for row in self.rows if row.steps), key=lambda row: row.steps[0]))

    def to_dict(self) -> dict[str, Any]:
        """The comparison as a mapping for strict JSON, which has None for what is not finite."""
        rows = [{**asdict(row), "identical": row.identical, "closer": row.closer} for row in self.rows]
        return {
            "identical": self.identical,
            "repeatable": self.repeatable,
            **{name: value for name, value in vars(self).items() if name != "rows"},
            "rows": rows,
        }

    def report(self, limit: int = 10) -> str:
        """A short text: the answer, then whether a is repeatable, then at most `limit` gradients that differ."""
        head, table, notes = self.parts(limit)
        if table:
            cells = [HEADINGS, *(row.cells() for row in table)]
            widths = [max(len(line[i]) for line in cells) for i in range(len(HEADINGS))]
            lines = [
                "  ".join(
                    cell.rjust(width) if i else cell.ljust(width)
                    for i, (cell, width) in enumerate(zip(line, widths, strict=True))
                ).rstrip()
                for line in cells
            ]
            head = [*head, "", *lines]
        return "\n".join([*head, *notes])

    def parts(self, limit: int) -> tuple[list[str], list[GradientRow], list[str]]:
        """The report in three parts: sentences, at most `limit` rows that differ, and notes below them."""
        head = [self._answer() + ".", self._repeatability()]
        differing = self.differing
        if self.loss_steps:
            step = self.loss_steps[0]
            of_a, of_b = ("not finite" if loss is None else f"{loss:.9g}" for loss in self.losses[step - 1])
            head.append(f"The loss differs from step {step} on: {of_a} (a) and {of_b} (b).")
        if not differing:
            return head, [], []
        first = differing[0]
        step = first.steps[0]
        there = [row for row in differing if row.steps[0] == step]
        where = f"step {step}, where {_count(len(there), 'gradient')} differ" + "s" * (len(there) == 1)
        head.append(f"First in forward order: {first.module or first.name}, in {where}.")
        if not self.loss_steps or step < self.loss_steps[0]:
            head.append(
                f"The loss of that step is identical: only the backward pass differs, from {there[-1].name} on."
            )
        if self.hint:
            head.append(self.hint + ".")
        notes = [f"and {len(differing) - limit} more"] if len(differing) > limit else []
        if self.no_reference:
            notes.append(f"No errors against float64: {self.no_reference}.")
        return head, list(differing[:limit]), notes

    def _answer(self) -> str:
        what = f"{self.a} and {self.b}" if self.a != self.b else f"{self.a} (a) and {self.b} (b)"
        setting = f"{self.model}, {_count(self.steps, 'step')}, {self.precision}, {self.device}"
        if self.identical:
            return f"Identical: {what}, loss and {_count(len(self.rows), 'gradient')} ({setting})"
        gradients = f"{len(self.differing)} of {_count(len(self.rows), 'gradient')}"
        differ = ["the loss"] * bool(self.loss_steps) + [gradients] * bool(self.differing)
        return f"Different: {what}, {' and '.join(differ)} ({setting})"

    def _repeatability(self) -> str:
        if self.repeatable:
            return f"Repeatable: two runs of {self.a} are identical."
        named = ", ".join(self.not_repeatable[:3])
        more = f" and {len(self.not_repeatable) - 3} more" if len(self.not_repeatable) > 3 else ""
        return f"Not repeatable: two runs of {self.a} differ in {named}{more}; {self.advice}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.1e}"
