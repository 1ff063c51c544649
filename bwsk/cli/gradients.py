"""Command: gradcheck. It runs the model, with fresh random weights, on the CPU."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bwsk.cli.app import MODELS, app
from bwsk.cli.options import JsonFile, Model, Precision

SETUPS = "stock, checkpoint, checkpoint-reentrant, compiled, fast, balanced, max, a fraction (0.6) or a size (900MiB)."


@app.command(rich_help_panel=MODELS, epilog="Example: bwsk gradcheck google-t5/t5-small --b max --precision bf16")
def gradcheck(
    model: Model,
    a: Annotated[str, typer.Option("--a", metavar="SETUP", help=f"First set-up: {SETUPS}")] = "stock",
    b: Annotated[str, typer.Option("--b", metavar="SETUP", help="Second set-up, one of the same.")] = "fast",
    batch: Annotated[int, typer.Option("--batch", "-b", help="Sequences (or images) per step.")] = 2,
    input_length: Annotated[
        int, typer.Option("--input", "--input-length", "-i", help="Input tokens per sequence.")
    ] = 32,
    target_length: Annotated[
        int | None,
        typer.Option(
            "--target",
            "--target-length",
            "-t",
            help="Target tokens per sequence (encoder-decoder models).",
            show_default="as --input",
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Training steps, each with a batch of its own.")] = 3,
    precision: Precision = "fp32",
    attention: Annotated[str, typer.Option("--attention", help="Attention implementation: eager or sdpa.")] = "eager",
    seed: Annotated[int, typer.Option("--seed", help="Seed of the weights, the batches and the dropout masks.")] = 0,
    json: JsonFile = None,
) -> None:
    """Compare the gradients of two set-ups of a model bit by bit.

    Trains fresh random weights of the model's config on random batches.

    Exit status 0 if the loss and every gradient are identical, 1 if not, 2 for errors.
    """
    from bwsk.architecture import build, load_config
    from bwsk.cli.tables import gradient_table
    from bwsk.errors import BwskError
    from bwsk.files import write_json
    from bwsk.memory.fake_step import require_one_of, require_shape
    from bwsk.reversible.verification.gradient_check import same_gradients
    from bwsk.reversible.verification.random_batch import random_batch
    from bwsk.reversible.verification.random_state import seed_all
    from bwsk.reversible.verification.setups import require_setup
    from bwsk.study.progress import progress
    from bwsk.units import to_precision

    require_setup("--a", _setup(a))
    require_setup("--b", _setup(b))
    require_one_of("--attention", attention, ("eager", "sdpa"))
    require_shape(batch, input_length, target_length)
    to_precision(precision)
    if steps < 1:
        raise BwskError(f"--steps {steps}: must be at least 1")
    config = load_config(model)
    seed_all(seed)
    module = build(config, device="cpu", attn_implementation=attention).float()  # some configs name another dtype
    batches = [random_batch(module, batch, input_length, target_length, seed=seed + step) for step in range(steps)]
    with progress(3 * steps, "gradcheck", unit="pass") as bar:
        found = same_gradients(
            module, batches, _setup(a), _setup(b), steps=steps, precision=precision, seed=seed, on_pass=bar.advance
        )
    gradient_table(found)
    if json:
        write_json(json, {"model_source": model, "attention": attention, **found.to_dict()})
    if not found:
        raise typer.Exit(1)


def _setup(name: str) -> Any:
    try:
        return float(name)
    except ValueError:
        return name
