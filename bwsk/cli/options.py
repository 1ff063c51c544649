"""Arguments and options that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Study = Annotated[Path, typer.Argument(help="A study: a directory with a params.yaml.", show_default=True)]
ParamsFile = Annotated[Path, typer.Option("--params", help="The study's params.yaml.", show_default=True)]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON to this file.")
]

# A model without its weights, and the shape of a training step of it.
Model = Annotated[str, typer.Argument(help="Hub id (optionally id@revision), local directory or config.json.")]
Batch = Annotated[int, typer.Option("--batch", "-b", help="Sequences (or images) per step.")]
InputLength = Annotated[int, typer.Option("--input", "-i", help="Input tokens per sequence.")]
TargetLength = Annotated[
    int | None,
    typer.Option("--target", "-t", help="Target tokens (encoder-decoder models).", show_default="as --input"),
]
