"""The study's plots as PNG: loss curves, validation perplexity, and the memory and time of a training step.

The modes of a study compute the same gradients, so their curves usually coincide. Each mode therefore has its own line
width and pattern (a broad pale line, a dashed one, a thin one with rings), so that all three are visible where they
overlap. The colours are from the palette of Okabe and Ito for colour-blind readers. The same data give the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter

from bwsk.files import atomic_directory
from bwsk.study.repository import PLOTS
from bwsk.units import MIB

_INITS = {"finetune": "Fine-tune", "scratch": "From scratch"}
_MODES = {"conventional": "conventional", "bwsk-analyzed": "BWSK analyzed", "bwsk-reversible": "BWSK reversible"}
_COLOURS = {"conventional": "#56B4E9", "bwsk-analyzed": "#D55E00", "bwsk-reversible": "#004D40"}
_LINES: dict[str, dict[str, Any]] = {
    "conventional": {"linewidth": 6.0, "alpha": 0.55, "solid_capstyle": "round"},
    "bwsk-analyzed": {"linewidth": 2.2, "linestyle": (0, (3.2, 2.2))},
    "bwsk-reversible": {"linewidth": 0.8, "marker": "o", "markersize": 4.0, "markerfacecolor": "white"},
}
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.dpi": 120,
}
_RINGS = 12  # markers along a curve


def draw(results: dict[str, Any], trainings: dict[str, dict[str, Any]], out: Path) -> list[Path]:
    """Draw the `PLOTS` of a model repository into `out`; `trainings` are the training_results.json by variant."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}), atomic_directory(out) as folder:
        pictures = (
            _curves(trainings, "train_loss_steps", "train_loss_curve", "training loss (nats per token)"),
            _curves(trainings, "val_steps", "val_perplexity_curve", "validation perplexity", log=True),
            _cost(results),
        )
        for name, picture in zip(PLOTS, pictures, strict=True):
            # The version of matplotlib is left out, so that the bytes depend on the picture alone.
            picture.savefig(folder / name, metadata={"Software": None})
    return [out / name for name in PLOTS]


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side. It has a canvas of its own, so matplotlib's global backend stays as it is."""
    picture = Figure(figsize=(4.1 * count + 0.4, 3.4))
    FigureCanvasAgg(picture)
    return picture, list(picture.subplots(1, count, squeeze=False)[0])


def _curves(trainings: dict[str, dict[str, Any]], steps: str, values: str, label: str, log: bool = False) -> Figure:
    """One panel per initialisation, one line per mode."""
    inits = [init for init in _INITS if any(training["init"] == init for training in trainings.values())]
    picture, panels = _panels(len(inits))
    for axes, init in zip(panels, inits, strict=True):
        modes = [training for training in trainings.values() if training["init"] == init]
        for order, training in enumerate(modes):
            mode = training["mode"]
            rings = max(1, len(training[steps]) // _RINGS)
            axes.plot(
                training[steps],
                training[values],
                label=_MODES[mode],
                color=_COLOURS[mode],
                markevery=rings,
                zorder=2 + order,
                **_LINES[mode],
            )
        axes.set_title(_INITS[init])
        axes.set_xlabel("optimizer step")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if log:
            _log_scale(axes)
    panels[0].set_ylabel(label)
    _legend(picture, panels[0])
    return picture


def _log_scale(axes: Axes) -> None:
    """Logarithmic, with plain numbers at 1, 2 and 5 of each decade, or at a few round ones if the range is small."""
    low, high = axes.get_ylim()
    axes.set_yscale("log")
    narrow = high / max(low, 1e-9) < 8
    axes.yaxis.set_major_locator(
        MaxNLocator(6, steps=(1, 2, 5, 10)) if narrow else LogLocator(subs=(1, 2, 5), numticks=12)
    )
    axes.yaxis.set_minor_locator(NullLocator())
    plain = ScalarFormatter()
    plain.set_scientific(False)
    axes.yaxis.set_major_formatter(plain)


def _cost(results: dict[str, Any]) -> Figure:
    """Peak memory (measured, else predicted, else no panel) and step time with its quartiles, a bar per variant."""
    variants = results["variants"]
    key, kind = next(
        (
            (key, kind)
            for key, kind in (("peak_memory_mb", "measured"), ("predicted_peak_memory_mb", "predicted"))
            if all(figures[key] is not None for figures in variants.values())
        ),
        (None, None),
    )
    picture, panels = _panels(1 if key is None else 2)
    time = panels[-1]
    if key is not None:
        memory = panels[0]
        memory.set_title(f"Peak memory of a training step ({kind})")
        small = max(figures[key] for figures in variants.values()) < 100
        text = "{:,.1f}" if small else "{:,.0f}"
        _bars(memory, variants, key, "MiB", text)
        # float32 weights, their gradients and AdamW's two moments: saving fewer activations cannot get below.
        floor = 4 * 4 * results["base"]["parameters"] / MIB
        outline = [withStroke(linewidth=2.6, foreground="white")]
        memory.axhline(floor, color="#333333", linewidth=1.0, linestyle=(0, (4, 3)), path_effects=outline)
        memory.set_xlabel(f"dashed: weights, gradients and optimizer alone ({text.format(floor)} MiB)", fontsize=8)
    time.set_title("Time of a training step (median, quartiles)")
    _bars(time, variants, "step_time_ms", "ms", "{:,.1f}", whiskers=("step_time_q1_ms", "step_time_q3_ms"))
    _legend(picture, time)
    return picture


def _bars(
    axes: Axes,
    variants: dict[str, dict[str, Any]],
    key: str,
    unit: str,
    text: str,
    whiskers: tuple[str, str] | None = None,
) -> None:
    """Bars by initialisation and mode, labelled by `text`; `whiskers` names the lower and upper end of error bars."""
    inits = [init for init in _INITS if any(figures["init"] == init for figures in variants.values())]
    modes = [mode for mode in _MODES if any(figures["mode"] == mode for figures in variants.values())]
    width = 0.8 / len(modes)
    for index, mode in enumerate(modes):
        found = [(place, variants.get(f"{init}-{mode}")) for place, init in enumerate(inits)]
        places = [place + (index - (len(modes) - 1) / 2) * width for place, figures in found if figures]
        heights = [figures[key] for _, figures in found if figures]
        ends = whiskers and [[abs(figures[end] - figures[key]) for _, figures in found if figures] for end in whiskers]
        bars = axes.bar(
            *(places, heights, width * 0.92),
            label=_MODES[mode],
            color=_COLOURS[mode],
            yerr=ends,
            error_kw={"elinewidth": 1.0, "capsize": 2.5, "ecolor": "#333333"},
        )
        axes.bar_label(bars, labels=[text.format(height) for height in heights], fontsize=7, padding=2, color="#333333")
    axes.set_xticks(range(len(inits)), [_INITS[init] for init in inits])
    axes.tick_params(axis="x", length=0)
    axes.grid(False, axis="x")
    axes.margins(y=0.14)
    axes.set_ylabel(unit)


def _legend(picture: Figure, axes: Axes) -> None:
    """One legend for all panels, above them."""
    handles, labels = axes.get_legend_handles_labels()
    picture.legend(handles, labels, loc="upper center", ncols=len(labels), handlelength=3.4)
    picture.tight_layout(rect=(0, 0, 1, 0.92), w_pad=2.0)
