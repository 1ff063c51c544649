"""Evaluate a saved model, loaded as a user would load it: a study's variant, or any model on any text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bwsk.errors import BwskError
from bwsk.files import read_json, sha256_file
from bwsk.reversible.t5.float16 import keep_projection_out_of_float16
from bwsk.study.agreement import agree
from bwsk.study.corpus import decode_text, split_lines
from bwsk.study.device import check_precision, configure, device_name, pick_device
from bwsk.study.model import embedding_count, load_model, move
from bwsk.study.params import EvaluateParams, Params, TokensParams
from bwsk.study.perplexity import Perplexity, evaluation_starts, perplexity
from bwsk.study.progress import progress
from bwsk.study.provenance import identity, versions
from bwsk.study.tokenizer import load_tokenizer
from bwsk.study.tokens import load_tokens, tokenize


def evaluate_variant(params: Params, variant: Path, tokens: Path, gpus: int) -> dict[str, Any]:
    """Perplexities of a trained variant on validation and test, as `build/evaluation/<variant>.json` holds them.

    BwskError if they differ from what training recorded, because the weights are then not those of the run.
    """
    trained = read_json(variant / "training_results.json")
    for key in ("best_val_metric", "test_metric"):
        if not isinstance(trained.get(key), (int, float)):
            raise BwskError(
                f"{variant / 'training_results.json'}: found {trained.get(key)!r} as {key}, must be a number; "
                "train this variant again"
            )
    device = pick_device(gpus)
    check_precision("evaluate.precision", params.evaluate.precision, device)
    configure(device, threads=params.train.threads, deterministic=params.train.deterministic, tf32=params.train.tf32)
    model = load_model(variant.parent, variant.name)
    move(model, device)
    if params.evaluate.precision == "fp16":
        keep_projection_out_of_float16(model)
    sizes = read_json(tokens / "tokens.json")["splits"]
    shape, splits = params.tokens, {}
    for split in ("validation", "test"):
        stream, n_bytes = load_tokens(tokens, split), sizes[split]["bytes"]
        splits[split] = _measure(
            model, stream, n_bytes, shape.window, shape.stride, params.evaluate, f"{split} {variant.name}"
        )
    recorded = {"validation": trained["best_val_metric"], "test": trained["test_metric"]}
    for split, value in recorded.items():
        found = splits[split].published_perplexity
        if not agree(found, value):
            raise BwskError(
                f"{variant}: {split} perplexity of the saved weights is {found:.6g}, training recorded {value:.6g}; "
                "train this variant again"
            )
    return {
        "variant": variant.name,
        "weights_sha256": sha256_file(variant / "model.safetensors"),
        "splits": {split: asdict(result) for split, result in splits.items()},
        "trained": recorded,
        "provenance": {
            "identity": identity(params, "evaluate"),
            "device": device_name(device),
            "versions": versions(),
            "tokens_sha256": {split: sizes[split]["sha256"] for split in splits},
        },
    }


def evaluate_text(
    model_dir: Path, text: Path, tokenizer_dir: Path, window: int, stride: int, params: EvaluateParams, gpus: int
) -> dict[str, Any]:
    """Perplexities of any saved sequence-to-sequence model on a UTF-8 text file; the recipe is the study's."""
    if window % 2 or stride > window:
        raise BwskError(f"evaluate: found window {window}, stride {stride}; the window is even, the stride within it")
    rows = split_lines(decode_text(text))
    stream = tokenize(load_tokenizer(tokenizer_dir), rows, TokensParams().separator)
    n_bytes = sum(len(row.encode()) for row in rows)
    if len(stream) <= window:
        raise BwskError(f"{text}: has {len(stream)} tokens, a window needs more than {window}; set --window")
    device = pick_device(gpus)
    model = load_model(model_dir)
    move(model, device)
    vocabulary = embedding_count(model)
    if int(stream.max()) >= vocabulary:
        raise BwskError(
            f"{tokenizer_dir}: gives token {int(stream.max())}, the model's vocabulary has {vocabulary}; "
            "name the model's own tokenizer by --tokenizer"
        )
    result = _measure(model, stream, n_bytes, window, stride, params, text.name)
    return {
        "model": str(model_dir),
        "text": str(text),
        "weights_sha256": sha256_file(model_dir / "model.safetensors"),
        "n_tokens": len(stream),
        "n_bytes": n_bytes,
        "window": window,
        "stride": stride,
        "splits": {"text": asdict(result)},
        **asdict(result),
        "provenance": {"device": device_name(device), "versions": versions()},
    }


def metrics(result: dict[str, Any], trained: dict[str, Any]) -> dict[str, float]:
    """The few figures of a variant by which versions are compared; `trained` is its training_results.json.

    Figures that were not measured are omitted, such as peak memory on a CPU.
    """
    validation, test = result["splits"]["validation"], result["splits"]["test"]
    figures = {
        "validation_perplexity": validation["published_perplexity"],
        "test_perplexity": test["published_perplexity"],
        "test_token_perplexity": test["token_perplexity"],
        "test_bits_per_byte": test["bits_per_byte"],
        "train_loss": trained["final_train_loss"],
        "steps": trained["total_steps"],
        "step_time_ms": trained["step_time_ms"],
        "peak_memory_mb": trained["peak_memory_mb"],
    }
    return {name: value for name, value in figures.items() if value is not None}


def _measure(
    model: torch.nn.Module,
    stream: Any,
    n_bytes: int,
    window: int,
    stride: int,
    params: EvaluateParams,
    description: str,
) -> Perplexity:
    published, plain = evaluation_starts(len(stream), window, stride, params.max_windows)
    total = len(set(published.tolist()) | set(plain.tolist()))
    with progress(total, description, unit="window") as bar:
        return perplexity(model, stream, n_bytes, window=window, stride=stride, params=params, on_batch=bar.advance)
