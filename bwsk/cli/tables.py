"""What the commands plan and memory print."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from bwsk.memory import Prediction
from bwsk.reversible.plan import MIB, Plan, Row

_KINDS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer_states": "optimizer states",
    "activations": "activations",
    "temporaries": "temporaries",
}


def memory_table(source: str, found: Prediction, limit: float | None, largest: int | None) -> None:
    """Print a prediction, and the answer to "does it fit"."""
    console = Console()
    lengths = f"{found.input_length}" + (f" + {found.target_length}" if found.target_length else "")
    mode = found.mode + (f" ({found.budget})" if found.budget else "")
    console.print(f"{source}: {mode}, {found.precision}, AdamW {found.optimizer}, {found.attention} attention")
    console.print(f"batch {found.batch} x {lengths} tokens\n")
    table = Table(box=None, pad_edge=False)
    table.add_column("predicted, MiB")
    table.add_column("", justify="right")
    for name, size in found.phases.items():
        table.add_row(f"peak in {name}", f"{size:,.0f}")
    table.add_row("[bold]peak[/bold]", f"[bold]{found.peak_mib:,.0f}[/bold]")
    for kind, size in found.kinds.items():
        table.add_row(f"  {_KINDS[kind]}", f"{size:,.0f}")
    console.print(table)
    console.print("\nNot in it: the CUDA context and cuBLAS workspaces (20 to 70 MiB by GPU), fragmentation.")
    if limit is not None:
        verdict = "fits" if found.peak_mib <= limit else "does not fit"
        more = f"largest batch that fits: {largest}" if largest else "not even a batch of 1 fits"
        console.print(f"{limit:,.0f} MiB: {verdict}; {more}")


def plan_tables(
    config: Any, plan: Plan, curve: list[Plan], shape: tuple[int, int, int], precision: str, full: bool
) -> None:
    """Print a plan's operations, its totals and the trade-off curve."""
    console = Console()
    batch, ins, outs = shape
    lengths = f"{ins} + {outs}" if getattr(config, "is_encoder_decoder", False) else f"{ins}"
    console.print(f"{config.model_type}, budget {plan.budget.name}: batch {batch} x {lengths} tokens, {precision}")
    console.print(f"gradients: {plan.guarantee}\n")
    table = Table(box=None, pad_edge=False)
    table.add_column("operation", no_wrap=True, min_width=34)
    table.add_column("verdict: to invert it")
    table.add_column("here")
    table.add_column("KiB", justify="right")
    table.add_column("MFLOP", justify="right")
    for names, rows in _groups(plan.rows(), full):
        table.add_row(f"[bold]{names}[/bold]")
        for row in rows:
            flops = f"{row.flops / 1e6:,.0f}" if row.flops else ""
            kept = f"{row.kept / 1024:,.0f}" if row.kept else ""
            table.add_row(f"  {row.operation}", row.verdict, row.action, kept, flops)
    console.print(table)
    console.print(f"\nkept {plan.kept / MIB:,.0f} MiB; redone {plan.extra_flops / 1e9:,.1f} GFLOP")
    console.print(f"= {plan.overhead:+.1%} of a step; predicted peak {plan.peak / MIB:,.0f} MiB\n")
    table = Table(box=None, pad_edge=False)
    for heading in ("peak, MiB", "kept, MiB", "FLOPs"):
        table.add_column(heading, justify="right")
    table.add_column("")
    low, high = min(p.peak for p in curve), max(p.peak for p in curve)
    for point in curve:
        bar = "▇" * round(1 + 29 * (point.peak - low) / max(high - low, 1))
        table.add_row(f"{point.peak / MIB:,.0f}", f"{point.kept / MIB:,.0f}", f"{point.overhead:+.1%}", bar)
    console.print("trade-off (predicted)")
    console.print(table)


def _groups(rows: list[Row], full: bool) -> list[tuple[str, list[Row]]]:
    """Rows by module; modules with the same rows are listed once, unless `full`."""
    modules: dict[str, list[Row]] = {}
    for row in rows:
        modules.setdefault(row.module, []).append(row)
    if full:
        return list(modules.items())
    alike: dict[tuple, list[str]] = {}
    for name, found in modules.items():
        stack = name.replace(".block.", " block ").split(".layer.")
        key = (name.split(".")[0], stack[-1] if len(stack) > 1 else "", tuple((r.operation, *_facts(r)) for r in found))
        alike.setdefault(key, []).append(name)
    return [(_joined(names), modules[names[0]]) for names in alike.values()]


def _facts(row: Row) -> tuple:
    return row.verdict, row.action, row.kept, row.flops


def _joined(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
