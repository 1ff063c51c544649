"""Commands for the versions of a study: DVC's stages, recording, restoring and comparing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bwsk.cli.app import VERSIONS, app
from bwsk.cli.options import Study

_HERE = Path()


@app.command(rich_help_panel=VERSIONS)
def stages(
    study: Study = _HERE,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if dvc.yaml is out of date.")] = False,
) -> None:
    """Write dvc.yaml, the stages of a study.

    Each stage asks Snakemake for one artifact.
    """
    from bwsk.study import dvc_stages as graph

    if check:
        graph.check(study)
    else:
        typer.echo(f"wrote {graph.write(study)}")


@app.command(rich_help_panel=VERSIONS)
def source(
    out: Annotated[Path | None, typer.Option(help="Also write them to this folder, a file for each step.")] = None,
) -> None:
    """Print the digest of the code of each step.

    A step whose digest has changed is rerun. Comments, docstrings, type hints and messages do not count.
    """
    from bwsk.study.provenance import STEPS, source_digest, write_digests

    if out is not None:
        write_digests(out)
    for step in STEPS:
        print(f"{source_digest(step)}  {step}")


@app.command(rich_help_panel=VERSIONS)
def record(study: Study = _HERE) -> None:
    """Record in DVC what Snakemake made.

    Runs no step. Refuses results that are incomplete or stale.
    """
    from bwsk.study import dvc_sync as versions

    versions.record(study, typer.echo)


@app.command(rich_help_panel=VERSIONS)
def restore(study: Study = _HERE) -> None:
    """Pull a study's outputs with DVC.

    Marks them as up to date for Snakemake, and names what is missing.
    """
    from bwsk.study import dvc_sync as versions

    versions.restore(study, typer.echo)


@app.command(rich_help_panel=VERSIONS, epilog="Example: bwsk compare HEAD~1 HEAD")
def compare(
    a: Annotated[str, typer.Argument(help="A study directory, a results.json or a git revision.")],
    b: Annotated[str, typer.Argument(help="The one to compare with, given in the same way.")],
    study: Annotated[Path, typer.Option(help="Study whose results are taken at a git revision.")] = _HERE,
) -> None:
    """Show the differences between two studies or two revisions.

    If they are not: what differs, in one line and as a table.
    """
    from bwsk.cli.output import console, say
    from bwsk.cli.tables import compare_table
    from bwsk.study.compare import changes, summary
    from bwsk.study.sides import load_side

    sides = load_side(a, study), load_side(b, study)
    found = changes(*sides)
    equal, line = summary(*sides, found)
    say(console(), line)
    if not equal:
        print()
        compare_table(found, a, b)
