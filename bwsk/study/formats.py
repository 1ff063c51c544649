"""Numbers as text, the same in the model card and in the commands' tables; absent numbers are a dash."""

from __future__ import annotations

ABSENT = "—"


def number(value: float | None, digits: int = 2) -> str:
    """A number with `digits` decimals and thousands separators."""
    return ABSENT if value is None else f"{value:,.{digits}f}"


def compact(value: float | None) -> str:
    """A size or a time without its unit: one decimal below 100, where a whole number would be too coarse."""
    return number(value, 1 if value is not None and value < 100 else 0)


def percent(share: float | None) -> str:
    """A share (0 to 1) as per cent with one decimal."""
    return ABSENT if share is None else f"{100 * share:.1f}%"


def duration(seconds: float) -> str:
    """`13.7m` as published; seconds below a minute, hours from two on."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    return f"{seconds / 60:.1f}m" if seconds < 7200 else f"{seconds / 3600:.1f}h"


def per_cent(value: float | None, digits: int = 1) -> str:
    """A value in per cent, as claims have it, with a true minus."""
    return ABSENT if value is None else f"{value:,.{digits}f} %".replace("-", "−")


def added_time(value: float | None, noise: float | None) -> str:
    """Time added, in per cent, with no more digits than the noise (also in per cent) justifies."""
    if value is None:
        return ABSENT
    if noise is None:
        return f"{per_cent(value, 0)} (noise unknown)"
    known = f"±{per_cent(noise, 1 if noise < 10 else 0)}"
    return f"within noise ({known})" if abs(value) <= noise else f"{per_cent(value, 1 if noise < 1 else 0)} ({known})"


def spread(low: float, median: float, high: float) -> str:
    """A median with its quartiles in parentheses, without the unit; all with the decimals of the largest."""
    digits = 1 if max(low, median, high) < 100 else 0
    return f"{number(median, digits)} ({number(low, digits)}–{number(high, digits)})"
