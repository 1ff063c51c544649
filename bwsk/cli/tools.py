"""Commands: tools around a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bwsk.cli.app import app
from bwsk.cli.options import JsonFile


@app.command()
def doctor(
    study: Annotated[Path | None, typer.Option(help="Study directory; this one if it has a params.yaml.")] = None,
    json_file: JsonFile = None,
) -> None:
    """What this machine has and what would run; exit status 1 if the study could not."""
    from rich.console import Console
    from rich.markup import escape

    from bwsk.doctor import as_json, examine, runs
    from bwsk.files import write_json

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
