"""Options that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ParamsFile = Annotated[Path, typer.Option("--params", help="The study's params.yaml.", show_default=True)]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON to this file.")]
