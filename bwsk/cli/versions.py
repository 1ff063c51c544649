"""Commands that keep a study's versions: the stages that DVC runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bwsk.cli.app import app

Study = Annotated[Path, typer.Argument(help="A study: a directory with a params.yaml.", show_default=True)]
_HERE = Path()


@app.command()
def stages(
    study: Study = _HERE,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if dvc.yaml is out of date.")] = False,
) -> None:
    """Write a study's dvc.yaml: DVC's stages, each of which asks Snakemake for one artifact."""
    from bwsk import stages as graph

    if check:
        graph.check(study)
    else:
        typer.echo(f"wrote {graph.write(study)}")


@app.command()
def restore(study: Study = _HERE) -> None:
    """Pull a study's outputs with DVC and tell Snakemake that they are up to date; names what is missing."""
    from bwsk import versions

    versions.restore(study, typer.echo)


@app.command()
def record(study: Study = _HERE) -> None:
    """Take over into DVC what Snakemake made, without running it again; refuses what is incomplete or stale."""
    from bwsk import versions

    versions.record(study, typer.echo)
