"""The `bwsk` command: the application object that every command registers itself on.

Commands import what they need inside their bodies, so that `bwsk --help` does not import torch.
"""

from __future__ import annotations

import typer

# Panels of `bwsk --help`, in the order of the modules whose commands they list (`bwsk.cli.GROUPS`).
MODELS = "Models, without their weights"
STEPS = "The steps of a study, in order"
VERSIONS = "Versions of a study"
LOOK = "Inspect"

app = typer.Typer(
    name="bwsk",
    help="Classify the operations of neural networks as S-type or K-type, and use that to train with less memory.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from bwsk import __version__

        typer.echo(f"bwsk {__version__}")
        raise typer.Exit()
