"""Commands: plan and memory. Neither needs a GPU or allocates a model."""

from __future__ import annotations

from typing import Any

import typer

from bwsk.cli.app import MODELS, app
from bwsk.cli.options import Batch, InputLength, JsonFile, Model, Precision, TargetLength


@app.command(rich_help_panel=MODELS, epilog="Example: bwsk plan google-t5/t5-small --budget max")
def plan(
    model: Model,
    budget: str = typer.Option("fast", "--budget", help="fast, balanced, max, a fraction (0.6) or a size (900MiB)."),
    batch: Batch = 4,
    input_length: InputLength = 256,
    target_length: TargetLength = None,
    precision: Precision = "fp32",
    full: bool = typer.Option(False, "--full", help="List every block, also those that are alike."),
    explain: bool = typer.Option(False, "--explain", help="List what every module runs: the engine, or stock and why."),
    json: JsonFile = None,
) -> None:
    """Show what a reversible step saves and recomputes, and its cost.

    Lists every operation with its residue, and the trade-off between memory and extra FLOPs.
    """
    from bwsk.architecture import load_config
    from bwsk.cli.tables import explanation_table, plan_tables
    from bwsk.files import write_json
    from bwsk.reversible.handle import curve_of, plan_of
    from bwsk.reversible.report import plan_dict

    shape = (batch, input_length, input_length if target_length is None else target_length)
    config = load_config(model)
    found = plan_of(config, _number(budget), shape, precision)
    points = curve_of(config, shape, precision)
    plan_tables(config, found, points, shape, precision, full)
    if explain:
        explanation_table(found)
    if json:
        write_json(
            json, {"model": model, "precision": precision, **plan_dict(found), "curve": [p.point() for p in points]}
        )


@app.command(rich_help_panel=MODELS, epilog="Example: bwsk memory google-t5/t5-small --mode reversible --fit 8GB")
def memory(
    model: Model,
    batch: Batch = 4,
    input_length: InputLength = 256,
    target_length: TargetLength = None,
    mode: str = typer.Option(
        "conventional", "--mode", "-m", help="Training mode: conventional, checkpoint or reversible."
    ),
    precision: Precision = "fp32",
    budget: str | None = typer.Option(
        None,
        "--budget",
        help="For mode reversible: fast, balanced, max, a fraction (0.6) or a size (900MiB).",
        show_default="fast",
    ),
    optimizer: str | None = typer.Option(
        None,
        "--optimizer",
        help="Implementation of AdamW: foreach, fused or loop.",
        show_default="fused if reversible, else foreach",
    ),
    attention: str = typer.Option("eager", "--attention", help="Attention implementation: eager or sdpa."),
    fit: str | None = typer.Option(
        None,
        "--fit",
        metavar="SIZE",
        help="Does the step fit into this size (8GB), and what is the largest batch that does?",
    ),
    json: JsonFile = None,
) -> None:
    """Predict the peak memory of a training step, and whether it fits.

    By phase and by kind of memory. Needs no GPU.
    """
    from bwsk.architecture import load_config
    from bwsk.cli.tables import memory_table
    from bwsk.files import write_json
    from bwsk.memory.prediction import largest_batch, predict_memory
    from bwsk.units import MIB, size_in_bytes

    config = load_config(model)
    step: dict[str, Any] = {
        "input_length": input_length,
        "target_length": target_length,
        "mode": mode,
        "precision": precision,
        "budget": _number(budget),
        "optimizer": optimizer,
        "attention": attention,
    }
    limit = None if fit is None else size_in_bytes(fit) / MIB
    found = predict_memory(config, batch=batch, **step)
    largest = None if limit is None else largest_batch(config, limit, **step)
    memory_table(model, found, limit, largest)
    if json:
        answer = (
            {} if limit is None else {"limit_mib": limit, "fits": found.peak_mib <= limit, "largest_batch": largest}
        )
        write_json(json, {"model_source": model, **found.to_dict(), **answer})


def _number(budget: str | None) -> str | float | None:
    try:
        return None if budget is None else float(budget)
    except ValueError:
        return budget
