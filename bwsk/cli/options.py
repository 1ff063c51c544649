"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Study = Annotated[Path, typer.Argument(help="Directory of the study, which has a params.yaml.", show_default=True)]
ParamsFile = Annotated[Path, typer.Option("--params", help="The study's params.yaml.", show_default=True)]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON to this file.")
]

# A model without its weights, and the shape of one of its training steps.
Model = Annotated[str, typer.Argument(help="Hub id (optionally id@revision), local directory or config.json.")]
Batch = Annotated[int, typer.Option("--batch", "-b", help="Sequences (or images) per step.")]
InputLength = Annotated[int, typer.Option("--input", "-i", help="Input tokens per sequence.")]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        "-p",
        help="fp32, or bf16 or fp16 autocast with fp32 weights. The names of the dtypes are accepted too.",
    ),
]
TargetLength = Annotated[
    int | None,
    typer.Option(
        "--target", "-t", help="Target tokens per sequence (encoder-decoder models).", show_default="as --input"
    ),
]
