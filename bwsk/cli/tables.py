"""The tables that the commands plan, memory, gradcheck, evaluate and compare print."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from bwsk.cli.output import console, numbers, say, table
from bwsk.study.compare import DECIMALS, Change
from bwsk.study.formats import ABSENT, number
from bwsk.units import MIB

if TYPE_CHECKING:  # these import torch, which compare does not need
    from bwsk.memory.prediction import Prediction
    from bwsk.reversible.plan import Plan
    from bwsk.reversible.plan_row import PlanRow
    from bwsk.reversible.verification.gradient_comparison import GradientComparison

_KINDS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer_states": "optimizer states",
    "activations": "activations",
    "temporaries": "temporaries",
}


def memory_table(source: str, found: Prediction, limit: float | None, largest: int | None) -> None:
    """Print a prediction and, if there is a limit, whether the step fits."""
    out, digits = console(), _digits(found.peak_mib)
    lengths = f"{found.input_length}" + (f" + {found.target_length}" if found.target_length else "")
    mode = found.mode + (f" ({found.budget})" if found.budget else "")
    say(out, f"{source}: {mode}, {found.precision}, AdamW {found.optimizer}, {found.attention} attention")
    say(out, f"batch {found.batch} × {lengths} tokens\n")
    shown = table("predicted")
    numbers(shown, "MiB")
    for name, size in found.phases.items():
        shown.add_row(f"peak in {name}", number(size, digits))
    shown.add_row("[bold]peak[/bold]", f"[bold]{number(found.peak_mib, digits)}[/bold]")
    for kind, size in found.kinds.items():
        shown.add_row(f"  {_KINDS[kind]}", number(size, digits))
    out.print(shown)
    say(out, "\nNot included: the CUDA context, cuBLAS workspaces (20 to 70 MiB, depending on the GPU), fragmentation.")
    if limit is not None:
        verdict = "fits" if found.peak_mib <= limit else "does not fit"
        more = f"largest batch that fits: {largest}" if largest else "not even a batch of 1 fits"
        say(out, f"{limit:,.0f} MiB: {verdict}; {more}")


def plan_tables(
    config: Any, plan: Plan, curve: list[Plan], shape: tuple[int, int, int], precision: str, full: bool
) -> None:
    """Print a plan's operations, its totals and the trade-off curve."""
    from bwsk.reversible.report import rows

    out, digits = console(), _digits(plan.peak / MIB)
    batch, ins, outs = shape
    lengths = f"{ins} + {outs}" if getattr(config, "is_encoder_decoder", False) else f"{ins}"
    say(out, f"{config.model_type}, budget {plan.budget.name}: batch {batch} × {lengths} tokens, {precision}")
    say(out, f"gradients: {plan.guarantee}\n")
    shown = table()
    shown.add_column("operation", no_wrap=True, vertical="bottom")
    shown.add_column("to invert it")
    shown.add_column("here", no_wrap=True, vertical="bottom")
    numbers(shown, "saved\nKiB", "recomputed\nMFLOP")
    for names, operations in _groups(rows(plan), full):
        shown.add_row(f"[bold]{names}[/bold]")
        for row in operations:
            flops = f"{row.flops / 1e6:,.0f}" if row.flops else ""
            saved = f"{row.saved / 1024:,.0f}" if row.saved >= 512 else "<1" if row.saved else ""
            shown.add_row(f"  {row.operation}", row.verdict, row.action, saved, flops)
    out.print(shown)
    say(out, f"\nsaved {number(plan.saved / MIB, digits)} MiB, predicted peak {number(plan.peak / MIB, digits)} MiB")
    say(out, f"recomputed {plan.extra_flops / 1e9:,.1f} GFLOP, {plan.overhead:+.1%} of a step\n")
    shown = table(title="trade-off (predicted)")
    numbers(shown, "peak\nMiB", "saved\nMiB", "extra\nFLOPs")
    shown.add_column("")
    low, high = min(p.peak for p in curve), max(p.peak for p in curve)
    for point in curve:
        bar = "▇" * round(1 + 29 * (point.peak - low) / max(high - low, 1))
        sizes = (number(size / MIB, digits) for size in (point.peak, point.saved))
        shown.add_row(*sizes, f"{point.overhead:+.1%}", bar)
    out.print(shown)


def explanation_table(plan: Plan) -> None:
    """Print what each module of a plan runs."""
    from bwsk.reversible.report import explanation

    shown = table(title="\nwhat each module runs")
    shown.add_column("module", no_wrap=True)
    shown.add_column("runs")
    for module, runs in explanation(plan):
        shown.add_row(module, runs)
    console().print(shown)


def gradient_table(found: GradientComparison) -> None:
    """Print the answer of a comparison, and the gradients that differ, ten at most."""
    from bwsk.reversible.verification.gradient_comparison import HEADINGS

    out = console()
    head, rows, notes = found.parts(10)
    for line in head:
        say(out, line)
    if rows:
        shown = table()
        shown.add_column(HEADINGS[0], overflow="fold")
        numbers(shown, *HEADINGS[1:])
        for row in rows:
            shown.add_row(*map(escape, row.cells()))
        out.print("", shown)
    for line in notes:
        say(out, line)


def evaluation_table(splits: dict[str, dict[str, Any]]) -> None:
    """Print the perplexities of each split."""
    shown = table("split")
    numbers(shown, "published\nperplexity", "token\nperplexity", "bits\nper byte", "windows")
    for split, found in splits.items():
        figures = (found[key] for key in ("published_perplexity", "token_perplexity", "bits_per_byte"))
        shown.add_row(split, *(number(figure, 4) for figure in figures), f"{found['n_windows']:,}")
    console().print(shown)


def compare_table(changes: list[Change], a: str, b: str) -> None:
    """Print the differences between `a` and `b`, grouped."""
    shown = table("", "", escape(a), escape(b), "change")
    previous = None
    for change in changes:
        if previous not in (None, change.group):
            shown.add_section()
        group = change.group if change.group != previous else ""
        sides = (_side(change, value) for value in (change.a, change.b))
        relative = "" if change.relative is None else f"{100 * change.relative:+.2f} %"
        shown.add_row(*map(escape, (group, change.name, *sides)), relative)
        previous = change.group
    console().print(shown)


def _side(change: Change, value: Any) -> str:
    if value is None:
        return ABSENT
    if change.name in DECIMALS and isinstance(value, (int, float)):
        return number(value, DECIMALS[change.name])
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _digits(peak: float) -> int:
    """Number of decimals for sizes in MiB: one for small models, whose sizes would be all zeros without it."""
    return 1 if peak < 100 else 0


def _groups(rows: list[PlanRow], full: bool) -> list[tuple[str, list[PlanRow]]]:
    """Group rows by module; modules with the same rows are listed once, unless `full`."""
    modules: dict[str, list[PlanRow]] = {}
    for row in rows:
        modules.setdefault(row.module, []).append(row)
    if full:
        return list(modules.items())
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, found in modules.items():
        stack = name.replace(".block.", " block ").split(".layer.")
        key = (name.split(".")[0], stack[-1] if len(stack) > 1 else "", tuple((r.operation, *_facts(r)) for r in found))
        alike.setdefault(key, []).append(name)
    return [(_joined(names), modules[names[0]]) for names in alike.values()]


def _facts(row: PlanRow) -> tuple[Any, ...]:
    return row.verdict, row.action, row.saved, row.flops


def _joined(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} ×{len(names)}"
