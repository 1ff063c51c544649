"""What every census counts: how many of its items are S-type, K-type and GRAY, and their shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """Numbers of S-type, K-type and GRAY items, and their shares (0 to 1, None where there is nothing to count)."""

    s: int
    k: int
    gray: int

    @staticmethod
    def of(verdicts: Iterable[str]) -> Counts:
        """Count verdicts, each of them "S", "K" or "GRAY"."""
        found = Counter(verdicts)
        return Counts(found["S"], found["K"], found["GRAY"])

    @property
    def total(self) -> int:
        return self.s + self.k + self.gray

    @property
    def s_ratio(self) -> float | None:
        return self.s / self.total if self.total else None

    @property
    def k_ratio(self) -> float | None:
        return self.k / self.total if self.total else None

    @property
    def gray_ratio(self) -> float | None:
        return self.gray / self.total if self.total else None

    def totals(self) -> dict[str, float | None]:
        """All numbers and shares by name, ready for strict JSON."""
        return {key: getattr(self, key) for key in ("s", "k", "gray", "total", "s_ratio", "k_ratio", "gray_ratio")}
