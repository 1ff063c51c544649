"""Commands that train and evaluate the variants of a study."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bwsk.cli.app import STEPS, app
from bwsk.cli.options import JsonFile, ParamsFile

_PARAMS = Path("params.yaml")
_VARIANT = "{finetune,scratch}-{conventional,bwsk-analyzed,bwsk-reversible}, for example scratch-bwsk-reversible."


@app.command(rich_help_panel=STEPS, epilog="Example: bwsk train scratch-conventional --out build/try")
def train(
    variant: Annotated[str, typer.Argument(help=_VARIANT)],
    out: Annotated[Path, typer.Option(help="Output folder of the trained variant.")],
    params_file: ParamsFile = _PARAMS,
    tokens: Annotated[Path, typer.Option(help="Folder written by `bwsk tokens`.")] = Path("build/tokens"),
    tokenizer: Annotated[Path, typer.Option(help="Folder written by `bwsk tokenizer`.")] = Path("build/tokenizer"),
    base: Annotated[Path, typer.Option(help="Folder written by `bwsk base`.")] = Path("build/base"),
    census: Annotated[Path, typer.Option(help="Census, by `bwsk classify --json`.")] = Path(
        "build/analysis/census.json"
    ),
    memory: Annotated[Path | None, typer.Option(help="Predicted memory, by `bwsk memory --json`.")] = None,
    checkpoints: Annotated[Path, typer.Option(help="Where to checkpoint and resume.")] = Path("build/checkpoints"),
    curves: Annotated[Path | None, typer.Option(help="Also write train.csv and validation.csv to this folder.")] = None,
    gpus: Annotated[int, typer.Option(help="Number of GPUs of this job; 0 trains on the CPU.", min=0)] = 1,
) -> None:
    """Train one variant.

    After an interruption, give the same command again to continue from the last checkpoint.
    """
    from bwsk.files import require_writable
    from bwsk.locks import wait_lock
    from bwsk.memory.available import free_memory
    from bwsk.study.device import is_out_of_memory, pick_device
    from bwsk.study.params import load_params
    from bwsk.study.signals import Interrupted
    from bwsk.study.train import Run, finished
    from bwsk.study.train_inputs import TrainInputs

    params = load_params(params_file)
    params.split_variant(variant)
    for folder in (out, *([curves] if curves else [])):
        require_writable(folder)
    inputs = TrainInputs(tokens=tokens, tokenizer=tokenizer, base=base, census=census, memory=memory)
    # One process at a time. A process that was left behind when its Snakemake was killed may still be training.
    lock = wait_lock(checkpoints / f"{variant}.lock", f"{variant}", say=_say)
    device = pick_device(gpus)
    free = free_memory(device)
    results = None
    try:
        run = Run(params, variant, inputs, checkpoints / variant, device, say=_say)
        results = finished(out, curves, run.provenance) if lock.waited else None
        if results is None:
            run.run()
            results = run.finish(out, curves)
        else:
            _say(f"{variant}: trained meanwhile by the process that was waited for, from the same inputs; results kept")
    except Interrupted as interrupted:
        _say(str(interrupted))
        sys.exit(128 + interrupted.signum)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if results is None:  # out of memory; outside the handler, whose traceback keeps the failed step's tensors alive
        from transformers import AutoConfig

        from bwsk.study.out_of_memory import out_of_memory

        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        raise out_of_memory(params, variant, config, device, free)
    _say(
        f"{variant}: validation perplexity {results['best_val_metric']:,.2f} (step {results['best_step']}), "
        f"test perplexity {results['test_metric']:,.2f}, "
        f"{results['total_steps']} steps in {results['wall_time_s']:.1f} s"
    )


@app.command(rich_help_panel=STEPS, epilog="Example: bwsk evaluate results/scratch-conventional --text FILE")
def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of a saved model and its tokenizer.")],
    text: Annotated[Path | None, typer.Option(help="Evaluate on this UTF-8 text file.")] = None,
    json_file: JsonFile = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer for --text; by default the model's own.")] = None,
    window: Annotated[int, typer.Option(help="Tokens per window (--text).", min=2)] = 512,
    stride: Annotated[int, typer.Option(help="Distance between windows (--text).", min=1)] = 128,
    batch_size: Annotated[int, typer.Option(help="Windows per batch (--text).", min=1)] = 32,
    max_windows: Annotated[int | None, typer.Option(help="Evaluate only this many windows (--text).", min=1)] = None,
    params_file: Annotated[Path | None, typer.Option("--params", help="Evaluate a variant of this study.")] = None,
    tokens: Annotated[Path, typer.Option(help="The study's tokens (--params).")] = Path("build/tokens"),
    metrics: Annotated[Path | None, typer.Option(help="Also write DVC's metrics to this file (--params).")] = None,
    gpus: Annotated[int, typer.Option(help="Number of GPUs of this job; 0 evaluates on the CPU.", min=0)] = 1,
) -> None:
    """Measure the perplexity of a saved model.

    On any text (--text), or on a study's validation and test splits (--params).
    """
    from bwsk.cli.tables import evaluation_table
    from bwsk.errors import BwskError
    from bwsk.files import read_json, write_json
    from bwsk.study import evaluate as evaluation
    from bwsk.study.params import EvaluateParams, load_params

    if text is not None and params_file is None:
        settings = EvaluateParams(batch_size=batch_size, max_windows=max_windows)
        result = evaluation.evaluate_text(model, text, tokenizer or model, window, stride, settings, gpus)
    elif text is None and params_file is not None:
        result = evaluation.evaluate_variant(load_params(params_file), model, tokens, gpus)
        if metrics is not None:
            write_json(metrics, evaluation.metrics(result, read_json(model / "training_results.json")))
    else:
        raise BwskError("evaluate: give either --text FILE or --params FILE")
    evaluation_table(result["splits"])
    if json_file is not None:
        write_json(json_file, result)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
