"""Commands: classify and trace. Neither loads weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from bwsk.cli.app import MODELS, app
from bwsk.cli.options import Batch, InputLength, JsonFile, Model, TargetLength
from bwsk.units import MIB

RULES = typer.Option("published", "--rules", help="Rule set: published or strict.")
FIGURE = typer.Option(None, "--figure", metavar="FILE", help="Draw the S/K map by depth (.svg, .png or .pdf).")
STRICT = typer.Option(False, "--strict", help="Fail if anything is GRAY.")
TRAIN = typer.Option(True, "--train/--eval", help="Mode of the model, which dropout and batch norm depend on.")


@app.command(rich_help_panel=MODELS, epilog="Example: bwsk classify google-t5/t5-small --rules strict")
def classify(
    model: Model,
    rules: str = RULES,
    training: bool = TRAIN,
    json: JsonFile = None,
    figure: Path | None = FIGURE,
    strict: bool = STRICT,
) -> None:
    """Count a model's S-type and K-type modules, with reasons.

    Shows both the published and the strict rules, and where they differ.
    """
    from bwsk.architecture import load
    from bwsk.classification.census import classify as census_of
    from bwsk.classification.rules.sets import RULE_SETS, rule_set
    from bwsk.files import write_json

    rule_set(rules)  # an unknown set is refused before anything is built
    module, name = load(model)
    module.train(training)
    censuses = {r: census_of(module, r) for r in RULE_SETS}
    chosen, other = censuses[rules], next(c for r, c in censuses.items() if r != rules)
    if json:
        write_json(json, {"source": model} | chosen.beside(other))
    if figure:
        from bwsk.classification.plots import draw_module_map

        draw_module_map(censuses, figure)
    _print_census(model, name, chosen, other)
    _gray(chosen.unknown(), strict)


def _gray(unknown: list[str], strict: bool) -> None:
    """Raise an error under --strict if anything is GRAY."""
    from bwsk.errors import BwskError

    if unknown and strict:
        raise BwskError(f"{len(unknown)} GRAY: {'; '.join(unknown[:3])}{' ...' if len(unknown) > 3 else ''}; add rules")


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * ratio:.1f} %"


_COLOURS = {"S": "green", "K": "red", "GRAY": "yellow"}


def _mark(verdict: str) -> str:
    return f"[{_COLOURS[verdict]}]{verdict}[/]"


def _print_census(source: str, name: str, chosen: Any, other: Any) -> None:
    from rich.markup import escape

    from bwsk.cli.output import console, numbers, table

    out = console()
    out.print(f"[bold]{name}[/] ({escape(source)}), {chosen.total} leaf modules, {chosen.mode} mode\n")
    shown = table("rules")
    numbers(shown, "S", "K", "GRAY", "S share", "K share")
    for census in (chosen, other):
        style = "bold" if census is chosen else ""
        numbers_of = (str(census.s), str(census.k), str(census.gray))
        shown.add_row(census.rules, *numbers_of, _percent(census.s_ratio), _percent(census.k_ratio), style=style)
    out.print(shown, "")

    shown = table("", title=f"by kind, {chosen.rules} rules")
    numbers(shown, "n")
    for heading in ("kind", "classes", "residue", "reason"):
        shown.add_column(heading, overflow="fold")
    for group in chosen.by_kind():
        kind = group["kind"] if group["condition"] in (None, "always") else f"{group['kind']} ({group['condition']})"
        cells = (", ".join(group["classes"]), group["residue"] or "-", group["reason"])
        shown.add_row(_mark(group["verdict"]), str(group["count"]), kind, *cells)
    out.print(shown)

    differences = chosen.differences(other)
    if differences:
        shown = table(title=f"where the {other.rules} rules differ")
        numbers(shown, "n")
        for heading in ("kind", "verdict", "because"):
            shown.add_column(heading, overflow="fold")
        for d in differences:
            kind = d["kind"] if d["condition"] in (None, "always") else f"{d['kind']} ({d['condition']})"
            change = f"{_mark(d[chosen.rules])} → {_mark(d[other.rules])}"
            shown.add_row(str(d["count"]), kind, change, d["reason"])
        out.print("", shown)
    if chosen.unknown():
        out.print("GRAY: " + ", ".join(chosen.unknown()[:12]), style="yellow", markup=False)
    if chosen.outside:
        named = ", ".join(chosen.outside[:3]) + (" ..." if len(chosen.outside) > 3 else "")
        out.print(
            f"Not covered: {len(chosen.outside)} parameters outside of leaf modules ({named}).",
            style="dim",
            markup=False,
        )


@app.command(rich_help_panel=MODELS, epilog="Example: bwsk trace google-t5/t5-small --autocast bf16")
def trace(
    model: Model,
    batch: Batch = 4,
    input_length: InputLength = 256,
    target_length: TargetLength = None,
    autocast: str | None = typer.Option(None, "--autocast", metavar="bf16|fp16", help="Trace under autocast."),
    devices: int = typer.Option(2, "--devices", help="Cut the forward pass into this many stages."),
    rules: str = typer.Option("strict", "--rules", help="Rule set: strict or published."),
    training: bool = TRAIN,
    json: JsonFile = None,
    figure: Path | None = typer.Option(
        None, "--figure", metavar="FILE", help="Draw the bytes that cross the barriers (.svg, .png or .pdf)."
    ),
    strict: bool = STRICT,
) -> None:
    """List the operations of a training step, its phases and barriers.

    Also cuts the forward pass over devices.
    """
    from bwsk.classification.barriers import analyse, partition
    from bwsk.classification.trace import trace as trace_of
    from bwsk.errors import BwskError
    from bwsk.files import write_json

    if devices < 1:
        raise BwskError(f"--devices {devices}: must be at least 1")
    target = input_length if target_length is None else target_length
    result = trace_of(
        model, batch=batch, input_length=input_length, target_length=target, autocast=autocast,
        training=training, rules=rules,
    )  # fmt: skip
    calm = analyse(result)
    cuts = partition(result, devices, calm)
    if json:
        write_json(json, {"source": model} | result.to_dict() | {"calm": calm.to_dict(), "partition": cuts.to_dict()})
    if figure:
        from bwsk.classification.plots import draw_barriers

        draw_barriers(result, calm, figure)
    _print_trace(model, result, calm, cuts)
    _gray(result.unknown(), strict)


def _mib(size: float) -> str:
    return f"{size / MIB:,.1f}"


def _print_trace(source: str, result: Any, calm: Any, cuts: Any) -> None:
    from rich.markup import escape

    from bwsk.cli.output import console, numbers, table

    out = console()
    setting = result.setting
    shapes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in setting["inputs"].items())
    precision = f"{setting['autocast']} autocast" if setting["autocast"] else "no autocast"
    traced = f"{setting['mode']} step, {precision}, {setting['device'].upper()} operators"
    out.print(f"[bold]{result.model}[/] ({escape(source)}), {traced}")
    out.print(shapes + "\n", style="dim")
    shown = table("", title=f"forward operators, {result.rules} rules")
    shown.add_column("n", justify="right", no_wrap=True, vertical="bottom")
    for heading in ("operator", "kind"):
        shown.add_column(heading, overflow="fold", vertical="bottom")
    numbers(shown, "GFLOP", "moved\nMiB", "saved\nMiB")
    for row in result.by_operator():
        mark = _mark(row["verdict"])
        if row["published"] and row["published"] != row["strict"]:
            other = row["published"] if result.rules == "strict" else row["strict"]
            mark += f" [dim]({other})[/]"
        cells = (f"{row['flops'] / 1e9:,.2f}", _mib(row["bytes"]), _mib(row["saved_bytes"]))
        shown.add_row(mark, str(row["count"]), row["operator"].removeprefix("aten::"), row["kind"], *cells)
    out.print(shown)
    other = "published" if result.rules == "strict" else "strict"
    out.print(f"In brackets: the verdict of the {other} rules where it differs.\n", style="dim")

    shown = table("", show_header=False)
    numbers(shown, "")
    backward, bound = result.backward or {}, calm.parallelism_bound["flops"]
    lines = [
        ("S / K / GRAY operations", f"{result.s} / {result.k} / {result.gray} of {result.total}"),
        ("S share by count, FLOPs, bytes", ", ".join(_percent(calm.s_share[w]) for w in ("count", "flops", "bytes"))),
        ("saved for backward, MiB", _mib(result.saved_bytes)),
        ("backward: operators, GFLOP", f"{backward.get('operations', 0):,}, {backward.get('flops', 0) / 1e9:,.2f}"),
        ("S-phases", f"{len(calm.phases)}"),
        ("barriers (of them pointwise)", f"{len(calm.barriers)} ({sum(b.pointwise for b in calm.barriers)})"),
        ("longest chain of barriers", f"{len(calm.chain)}"),
        ("work / longest path by FLOPs", "-" if bound is None else f"{bound:.2f}"),
        (
            f"{cuts.devices} devices: balance, cut MiB",
            f"{cuts.balance:.3f}, {_mib(sum(cuts.cut_bytes))}" if cuts.balance else "-",
        ),
    ]
    for line in lines:
        shown.add_row(*line)
    out.print(shown)
    if result.unknown():
        out.print("GRAY: " + ", ".join(result.unknown()), style="yellow", markup=False)
