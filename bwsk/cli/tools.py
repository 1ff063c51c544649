"""Commands that inspect a study, this machine, or the schema of params.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bwsk.cli.app import LOOK, app
from bwsk.cli.options import JsonFile, Study

_HERE = Path()


@app.command(rich_help_panel=LOOK)
def show(study: Study = _HERE) -> None:
    """Print a study's results and the verdicts on the published claims."""
    from bwsk.cli.output import console, say
    from bwsk.cli.summary import print_results
    from bwsk.study.results import read_results

    print_results(read_results(study))
    path = study / "results" / "README.md"
    found = str(path) if path.is_file() else f"not written yet; run: bwsk card {study}"
    say(console(), f"model card: {found}")


@app.command(rich_help_panel=LOOK)
def doctor(
    study: Annotated[
        Path | None,
        typer.Argument(help="Directory of a study; by default this one, if it has a params.yaml.", show_default=False),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Show what this machine has, and whether the study would run.

    Exit status 1 if it would not.
    """
    from rich.console import Console
    from rich.markup import escape

    from bwsk.files import write_json
    from bwsk.study.doctor import as_json, examine, runs

    if study is None and Path("params.yaml").is_file():
        study = Path(".")
    findings = examine(study)
    console = Console(highlight=False, soft_wrap=True)
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for finding in findings:
        advice = f" -> {finding.advice}" if finding.advice else ""
        colour = colours[finding.status]
        line = f"[{colour}]{finding.status:<4}[/{colour}] {finding.name:<10} {escape(finding.found + advice)}"
        console.print(line)
    if json_file is not None:
        write_json(json_file, as_json(findings))
    if not runs(findings):
        raise typer.Exit(1)


@app.command(rich_help_panel=LOOK)
def schema(
    out: Annotated[Path | None, typer.Option(help="Output file; by default standard output.")] = None,
) -> None:
    """Print the JSON schema of params.yaml.

    The workflow validates with it, and editors can complete from it.
    """
    import json

    from bwsk.files import write_json
    from bwsk.study.params import json_schema

    if out is None:
        print(json.dumps(json_schema(), indent=2))
    else:
        write_json(out, json_schema())
