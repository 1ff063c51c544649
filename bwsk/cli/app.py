"""The `bwsk` command: the application object that every command registers itself on.

Commands import what they need inside their bodies: `bwsk --help` must not pay for torch.
"""

from __future__ import annotations

import typer

# Panels of `bwsk --help`, in the order of the modules that fill them (`bwsk.cli.GROUPS`).
MODELS = "Models, without their weights"
STEPS = "The steps of a study, in their order"
VERSIONS = "Versions of a study"
LOOK = "Look"

app = typer.Typer(
    name="bwsk",
    help="Classify neural networks into S-type and K-type operations, and train with less memory by it.",
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
