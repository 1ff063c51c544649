"""What every census counts: how many of its items are S-type, K-type and GRAY, and their shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol


class Judged(Protocol):
    """An item of a census; `verdict` is "S", "K" or "GRAY"."""

    @property
    def verdict(self) -> str: ...


class Counts(ABC):
    """Numbers and shares (0 to 1; None where there is nothing to count) over what `_judged` returns."""

    @abstractmethod
    def _judged(self) -> Sequence[Judged]:
        """The items that count."""

    def _count(self, verdict: str) -> int:
        return sum(item.verdict == verdict for item in self._judged())

    def _ratio(self, count: int) -> float | None:
        return count / self.total if self.total else None

    @property
    def s(self) -> int:
        return self._count("S")

    @property
    def k(self) -> int:
        return self._count("K")

    @property
    def gray(self) -> int:
        return self._count("GRAY")

    @property
    def total(self) -> int:
        return len(self._judged())

    @property
    def s_ratio(self) -> float | None:
        return self._ratio(self.s)

    @property
    def k_ratio(self) -> float | None:
        return self._ratio(self.k)

    @property
    def gray_ratio(self) -> float | None:
        return self._ratio(self.gray)

    def totals(self) -> dict[str, float | None]:
        """All numbers and shares by name, ready for strict JSON."""
        return {key: getattr(self, key) for key in ("s", "k", "gray", "total", "s_ratio", "k_ratio", "gray_ratio")}
