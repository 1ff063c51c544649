"""Axes of the benches' figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def log_log(axes: Any, at: Sequence[float]) -> None:
    """Both axes logarithmic and labelled with plain numbers: x at the points measured, y at 1, 2, 5, 10, …"""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set(xscale="log", yscale="log")
    axes.set_xticks(at, [str(value) for value in at])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.minorticks_off()
