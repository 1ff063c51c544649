"""Figures of the classification: the S/K map of a network by depth, and what crosses its barriers.

matplotlib is imported when a figure is drawn. Figures have a canvas of their own, so the caller's backend and settings
stay as they are. S is green, K is vermilion, GRAY is grey (distinguishable with the common colour-vision deficiencies,
and marked by letters as well).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bwsk.errors import BwskError
from bwsk.units import MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bwsk.classification.barriers import BarrierAnalysis
    from bwsk.classification.census import Census
    from bwsk.classification.trace import Trace

COLOURS = {"S": "#009E73", "K": "#D55E00", "GRAY": "#999999"}  # Okabe and Ito's palette
_KINDS = 12  # rows beyond these are drawn as "other"
_LEAST = 0.25  # smallest share of a cell, so that its number stays legible
_FORMATS: dict[str, dict[str, Any]] = {
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
    ".png": {"Software": None},
}
# The same figure has the same bytes, and its text stays text: small and searchable.
_STYLE: dict[Any, Any] = {"svg.hashsalt": "bwsk", "svg.fonttype": "none"}


def draw_module_map(censuses: Mapping[str, Census], path: Path) -> None:
    """S/K map: one panel per rule set, a column per block of the network, a row per kind, cells counting S and K."""
    first = next(iter(censuses.values()))
    blocks = list(dict.fromkeys(block_of(row.name) for row in first.rows))
    if not blocks:
        raise BwskError(f"{first.model}: has no leaf modules to draw")
    common = [kind for kind, _ in Counter(row.kind for row in first.rows).most_common()]
    kinds = common[:_KINDS] + (["other"] if len(common) > _KINDS else [])
    width = max(6.0, 1.6 + 0.46 * len(blocks))
    figure = _figure(width, len(censuses) * (0.9 + 0.36 * len(kinds)) + 0.9)
    panels: list[Axes] = list(figure.subplots(len(censuses), 1, sharex=True, squeeze=False)[:, 0])
    for panel, census in zip(panels, censuses.values(), strict=True):
        cells: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for row in census.rows:
            cells[block_of(row.name), row.kind if row.kind in kinds else "other"][row.verdict] += 1
        for (block, kind), counts in cells.items():
            _cell(panel, blocks.index(block), kinds.index(kind), counts)
        panel.set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds], fontsize=8)
        panel.set_xlim(-0.55, len(blocks) - 0.45)
        panel.set_ylim(len(kinds) - 0.45, -0.55)
        panel.set_title(f"{census.rules} rules: {_caption(census)}", fontsize=9, loc="left")
        panel.tick_params(length=0)
        for side in panel.spines.values():
            side.set_visible(False)
    panels[-1].set_xticks(range(len(blocks)), blocks, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    figure.suptitle(f"{first.model}, leaf modules by depth ({first.mode})", fontsize=10, x=0.01, ha="left")
    _save(figure, path)


def _caption(census: Census) -> str:
    share = "" if census.s_ratio is None else f", {100 * census.s_ratio:.1f} % S"
    gray = f" / {census.gray} GRAY" if census.gray else ""
    return f"{census.s} S / {census.k} K{gray} of {census.total}{share}"


def _cell(panel: Axes, x: int, y: int, counts: Counter[str]) -> None:
    shares = {verdict: max(count / counts.total(), _LEAST) for verdict, count in counts.items() if count}
    left = x - 0.45
    for verdict, colour in COLOURS.items():
        if verdict in shares:
            size = 0.9 * shares[verdict] / sum(shares.values())
            panel.barh(y, size, 0.82, left=left, color=colour, edgecolor="white", linewidth=0.6)
            panel.text(left + size / 2, y, f"{counts[verdict]}{verdict[0]}" if size > 0.25 else f"{counts[verdict]}",
                       ha="center", va="center", color="white", fontsize=6.5)  # fmt: skip
            left += size


def block_of(name: str) -> str:
    """The repeated block that a module belongs to: its path up to the last number of the outermost stack."""
    match = re.match(r"^(?:.*?\.)?(\w+)\.(\w+)\.(\d+)(?:\.|$)", "root." + name)
    if match is None:
        parts = [part for part in name.split(".") if part not in ("model", "transformer")]
        return " ".join(parts if len(parts) < 3 else parts[:2])
    stack = match[1] if match[1] not in ("root", "model", "transformer") else match[2]
    return f"{stack} {match[3]}"


def draw_barriers(trace: Trace, calm: BarrierAnalysis, path: Path) -> None:
    """What crosses each level of barriers, and how many S and K operations each level holds."""
    figure = _figure(8, 4.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    levels = range(len(calm.crossing_bytes))
    above.step(levels, [b / MIB for b in calm.crossing_bytes], where="mid", color="#0072B2", linewidth=1.2)
    above.set_yscale("log")
    above.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    above.set_ylabel("crossing, MiB", fontsize=8)
    counts = {"S": Counter[int](), "K": Counter[int]()}
    for op in trace.data:
        counts["S" if op.verdict == "S" else "K"][calm.levels[op.index]] += 1
    every = range(len(calm.crossing_bytes) + 1)
    below.bar(every, [counts["S"][i] for i in every], 1.0, color=COLOURS["S"], label="S")
    barriers = "K or GRAY" if trace.gray else "K"
    below.bar(every, [-counts["K"][i] for i in every], 1.0, color=COLOURS["K"], label=barriers)
    below.axhline(0, color="black", linewidth=0.5)
    below.set_yscale("symlog", linthresh=1)  # a level holds up to hundreds of S operations, but few K
    highest = max(counts["S"].values(), default=1)
    below.set_yticks([-1, 0, *(t for t in (1, 10, 100) if t <= highest)])
    below.yaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}")
    below.set_ylabel("operations (log)", fontsize=8)
    below.set_xlabel("level: barriers passed before", fontsize=8)
    below.legend(fontsize=7, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.95), borderpad=0)
    for panel in (above, below):
        panel.tick_params(labelsize=7)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    found = f"{len(calm.barriers)} barriers, longest chain {len(calm.chain)}"
    above.set_title(f"{trace.model}, forward pass, {trace.rules} rules: {found}", fontsize=9, loc="left")
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise BwskError("figures need matplotlib, which is not installed; install it or leave --figure out") from None
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    from matplotlib import rc_context

    from bwsk.files import atomic_path

    if path.suffix not in _FORMATS:
        raise BwskError(f"{path}: not a figure format; name a file that ends in {', '.join(_FORMATS)}")
    with rc_context(_STYLE), atomic_path(path) as temporary:
        figure.tight_layout()
        figure.savefig(temporary, format=path.suffix[1:], dpi=130, metadata=_FORMATS[path.suffix])
