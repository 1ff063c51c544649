"""`results/results.json`: all results of a study in one strict JSON file, with a verdict per published claim.

It is a pure function of `params.yaml`, the artifacts of the earlier steps and this source, so collecting again gives a
byte-identical file. Absent numbers are null, never 0 (there is no measured peak on a CPU).
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from bwsk.errors import BwskError
from bwsk.files import write_json, write_text
from bwsk.study.agreement import agree
from bwsk.study.claims import judge
from bwsk.study.comparability import differences
from bwsk.study.params import Params
from bwsk.study.provenance import identity
from bwsk.study.schemas import read_checked
from bwsk.study.staleness import current_evaluation, current_inputs, current_training, force

# Fields of training_results.json that results.json repeats, and columns of the CSV table. Curves are not repeated.
COLUMNS = (
    "final_train_loss",
    "best_val_metric",
    "test_metric",
    "epochs_completed",
    "total_steps",
    "planned_steps",
    "best_step",
    "early_stopped",
    "wall_time_s",
    "training_time_s",
    "validation_time_s",
    "step_time_ms",
    "step_time_q1_ms",
    "step_time_q3_ms",
    "tokens_per_s",
    "peak_memory_mb",
    "predicted_peak_memory_mb",
    "nan_count",
    "skipped_steps",
    "erasure_budget",
    "parallelism_ratio",
)
_CENSUS = ("s", "k", "gray", "total", "s_ratio", "k_ratio")
_CORPUS = ("rows", "bytes", "sha256")
_TOKENS = ("rows", "bytes", "n_tokens", "n_blocks", "n_windows", "sha256", "unigram_perplexity")


def collect(params: Params, study: Path) -> dict[str, Any]:
    """Write `results/results.json` of the study in directory `study` and return it; BwskError as `gather`."""
    results = gather(params, study)
    write_json(study / "results" / "results.json", results)
    return results


def gather(params: Params, study: Path) -> dict[str, Any]:
    """The content of `results.json`, without writing it.

    Raises BwskError if a variant or an intermediate artifact is missing, stale or malformed, or if the evaluation of
    the saved weights does not agree with what training recorded.
    """
    _all_there(params, study)
    inputs = current_inputs(params, study)
    census = read_checked(study / "build/analysis/census.json", "build", "census")
    trainings = {name: current_training(params, study, name, inputs) for name in params.variant_names}
    evaluations = {name: current_evaluation(params, study, name, trainings[name]) for name in trainings}
    for name in trainings:
        _same_windows(params, study, name, evaluations[name], inputs["tokens"])
        _agree(study, name, trainings[name], evaluations[name])
    corpus, tokens, base = inputs["corpus"], inputs["tokens"], inputs["base"]
    results: dict[str, Any] = {
        "study": params.study.model_dump(),
        "comparable": False,
        "differences": [],
        "parameters": params.model_dump(mode="json"),
        "census": {**_only(census, ("rules", *_CENSUS)), "strict": _only(census["strict"], _CENSUS)},
        "corpus": {
            "name": corpus["name"],
            "source": corpus["source"],
            "splits": {split: _only(figures, _CORPUS) for split, figures in corpus["splits"].items()},
        },
        "tokens": {
            **_only(tokens, ("dtype", "vocab_size", "tokenizer_sha256")),
            "splits": {split: _only(figures, _TOKENS) for split, figures in tokens["splits"].items()},
        },
        "base": _only(base, ("name", "source", "sha256", "config_sha256", "parameters")),
        "variants": {name: _variant(trainings[name], evaluations[name]) for name in trainings},
        "memory_saving": {init: _memory_saving(trainings, init) for init in params.variants.inits},
        "provenance": {
            "identity": identity(params, "results"),
            **{f"{step}_identity": value["identity"] for step, value in inputs.items()},
            "evaluation_source": identity(params, "evaluate")["source"],
        },
    }
    differing = [difference.text for difference in differences(params, results)]
    results["differences"] = differing
    results["comparable"] = params.study.published is not None and not differing
    results["claims"] = judge(params, results)
    # Provenance goes to the end of the file, because it is long and rarely read.
    results["provenance"] = results.pop("provenance")
    return results


def read_results(study: Path) -> dict[str, Any]:
    """A study's `results.json`, checked against its schema."""
    path = study / "results" / "results.json"
    if not path.is_file():
        raise BwskError(f"{path}: missing; collect it: bwsk results {study}")
    return read_checked(path, "results")


def write_table(results: dict[str, Any], path: Path) -> None:
    """A CSV row per variant, for the workflow's report and for spreadsheets; an absent number is an empty cell."""
    rows = [
        {
            "variant": name,
            **{key: figures[key] for key in COLUMNS},
            **{
                f"{split}_{key}": figures["evaluation"][split][key]
                for split in ("validation", "test")
                for key in ("published_perplexity", "token_perplexity", "bits_per_byte")
            },
        }
        for name, figures in results["variants"].items()
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _all_there(params: Params, study: Path) -> None:
    """Report every missing variant in one error instead of one per run."""
    folders = {name: study / "results" / name for name in params.variant_names}
    missing = [name for name, folder in folders.items() if not (folder / "training_results.json").is_file()]
    if len(missing) == len(folders):
        raise BwskError(
            f"{study / 'results'}: no variant is trained; run the study (snakemake --cores 1) or pull it (bwsk restore)"
        )
    if missing:
        targets = " ".join(f"results/{name}/model.safetensors" for name in missing)
        raise BwskError(
            f"{study / 'results'}: no {', '.join(missing)}; "
            f"pull what is missing (bwsk restore) or train it: {force(targets)}"
        )


def _same_windows(params: Params, study: Path, name: str, evaluation: dict[str, Any], tokens: dict[str, Any]) -> None:
    """Check that the evaluation used the windows of the current parameters, on which the token files do not depend."""
    for split in ("validation", "test"):
        there = tokens["splits"][split]["n_windows"]
        wanted = min(there, params.evaluate.max_windows or there)
        if (found := evaluation["splits"][split]["n_windows"]) != wanted:
            path = f"build/evaluation/{name}.json"
            raise BwskError(
                f"{study / path}: stale, {found:,} windows of {split} where the parameters now give {wanted:,}; "
                f"train and evaluate it again: {force(f'results/{name}/model.safetensors')}"
            )


def _agree(study: Path, name: str, training: dict[str, Any], evaluation: dict[str, Any]) -> None:
    for split, key in (("validation", "best_val_metric"), ("test", "test_metric")):
        recorded, found = training[key], evaluation["splits"][split]["published_perplexity"]
        if not agree(found, recorded):
            raise BwskError(
                f"{study / 'build/evaluation' / name}.json: {split} perplexity {found:.6g}, but training recorded "
                f"{recorded:.6g}; train it again: {force(f'results/{name}/model.safetensors')}"
            )


def _variant(training: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, Any]:
    provenance = training["provenance"]
    return {
        **_only(training, ("init", "mode", *COLUMNS)),
        "evaluation": {split: evaluation["splits"][split] for split in ("validation", "test")},
        "provenance": {
            **_only(provenance, ("seed", "precision", "device", "versions", "weights_sha256")),
            "source": provenance["identity"]["source"],
        },
    }


def _memory_saving(trainings: dict[str, dict[str, Any]], init: str) -> dict[str, float | None]:
    """Share of the conventional peak memory that the reversible mode saves; None where a peak is absent."""
    saving: dict[str, float | None] = {}
    for kind, key in (("measured", "peak_memory_mb"), ("predicted", "predicted_peak_memory_mb")):
        full, reduced = (trainings.get(f"{init}-{mode}", {}).get(key) for mode in ("conventional", "bwsk-reversible"))
        saving[kind] = None if full is None or reduced is None else 1 - reduced / full
    return saving


def _only(value: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value[key] for key in keys}
