"""Staleness checks: whether a study's artifacts belong to its current parameters, inputs, files and source.

Snakemake and DVC decide what to rerun, but either can be bypassed, and a copied, restored or edited file can have a new
modification time and outdated content. So each artifact stores its identity and the hashes of its inputs, which are
compared once more before publication. The error names the artifact and the difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bwsk.errors import BwskError
from bwsk.files import flat, sha256_file
from bwsk.study.params import SPLITS, Params
from bwsk.study.provenance import identity
from bwsk.study.schemas import read_checked

# Step -> its artifact, in the order in which they are made, because the first stale one explains those after it.
UPSTREAM = {
    "corpus": "build/corpus/corpus.json",
    "tokens": "build/tokens/tokens.json",
    "base": "build/base/base.json",
}


def current_inputs(params: Params, study: Path) -> dict[str, dict[str, Any]]:
    """`{"corpus": corpus.json, "tokens": tokens.json, "base": base.json}`; BwskError if one is stale or missing."""
    found = {step: _existing(study, path, step) for step, path in UPSTREAM.items()}
    for step, value in found.items():
        if change := difference(value["identity"], identity(params, step)):
            raise BwskError(f"{study / UPSTREAM[step]}: stale, {change}; make it again: {force(UPSTREAM[step])}")
    recorded = {f"build/tokens/{split}.npy": found["tokens"]["splits"][split]["sha256"] for split in SPLITS}
    recorded["build/base/model.safetensors"] = found["base"]["sha256"]
    recorded["build/base/config.json"] = found["base"]["config_sha256"]
    for path, sha256 in recorded.items():
        if sha256_file(present(study, path)) != sha256:
            raise BwskError(f"{study / path}: is not the file that its step wrote; make it again: {force(path)}")
    return found


def current_training(
    params: Params, study: Path, variant: str, inputs: dict[str, dict[str, Any]] | None
) -> dict[str, Any]:
    """A variant's training_results.json; BwskError if the variant is missing or stale.

    It compares parameters, source, and the hashes of `model.safetensors`, configuration and tokenizer. With `inputs`
    (from `current_inputs`) it also compares the tokens and the base checkpoint that the variant was trained on.
    """
    folder = study / "results" / variant
    target = f"results/{variant}/model.safetensors"
    for name in ("training_results.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise BwskError(f"{folder / name}: missing; pull it (dvc pull) or train it: {force(target)}")
    training = read_checked(folder / "training_results.json", "training_results")
    if training["variant"] != variant:
        raise BwskError(f"{folder}: holds the results of {training['variant']}; train it again: {force(target)}")
    if change := next(_training_changes(params, variant, training["provenance"], inputs, folder), None):
        raise BwskError(f"{folder}: stale, {change}; train it again: {force(target)}")
    return training


def current_evaluation(params: Params, study: Path, variant: str, training: dict[str, Any]) -> dict[str, Any]:
    """A variant's evaluation; BwskError if it is missing, stale, or of other weights than those of `training`."""
    path = f"build/evaluation/{variant}.json"
    found = read_checked(present(study, path), "build", "evaluation")
    change = difference(found["provenance"]["identity"], identity(params, "evaluate"))
    if change is None and found["variant"] != variant:
        change = f"it is the evaluation of {found['variant']}"
    if change is None and found["weights_sha256"] != training["provenance"]["weights_sha256"]:
        change = "it was made with other weights (model.safetensors has another sha256)"
    tokens = training["provenance"]["tokens_sha256"]
    for split, sha256 in found["provenance"].get("tokens_sha256", {}).items():
        if change is None and sha256 != tokens[split]:
            change = f"it was made on other tokens of {split}"
    if change:
        raise BwskError(f"{study / path}: stale, {change}; evaluate it again: {force(path)}")
    return found


def current_results(params: Params, study: Path, results: dict[str, Any]) -> dict[str, Any]:
    """`results` (of results.json) unchanged; BwskError if they were collected from other parameters or source."""
    made_with = {"params": results["parameters"], "source": results["provenance"]["identity"]["source"]}
    now = {"params": params.model_dump(mode="json"), "source": identity(params, "results")["source"]}
    if change := difference(made_with, now):
        path = study / "results" / "results.json"
        raise BwskError(f"{path}: stale, {change}; collect it again: {force('results/results.json')}")
    return results


def difference(stored: dict[str, Any], current: dict[str, Any]) -> str | None:
    """The difference between a stored identity and the current one, in words; None if they are equal."""
    before, now = flat(stored["params"]), flat(current["params"])
    changes = [
        f"{_key(key, before)} was {_shown(before, key)}, is {_shown(now, key)}"
        for key in {**before, **now}
        if key not in before or key not in now or before[key] != now[key]
    ]
    if changes:
        more = f" (and {len(changes) - 1} more changes)" if len(changes) > 1 else ""
        return f"{changes[0]}{more}"
    return None if stored["source"] == current["source"] else "the source of its step (bwsk) has changed since"


def present(study: Path, path: str) -> Path:
    """`study / path`; BwskError if there is no such file."""
    if not (study / path).is_file():
        raise BwskError(f"{study / path}: missing; make it: {force(path)}")
    return study / path


def force(target: str) -> str:
    """The command that remakes one artifact regardless of timestamps."""
    return f"snakemake --cores 1 --force {target}"


def _training_changes(
    params: Params, variant: str, provenance: dict[str, Any], inputs: dict[str, dict[str, Any]] | None, folder: Path
) -> Iterator[str]:
    if change := difference(provenance["identity"], identity(params, "train", variant)):
        yield change
    if inputs is not None:
        for split in SPLITS:
            if provenance["tokens_sha256"][split] != inputs["tokens"]["splits"][split]["sha256"]:
                yield f"the tokens of {split} are not those it was trained on"
        if provenance["base_sha256"] not in (None, inputs["base"]["sha256"]):
            yield "the base checkpoint is not the one it was trained from"
        if provenance["config_sha256"] != inputs["base"]["config_sha256"]:
            yield "the base's config.json is not the one it was trained from"
    found = sha256_file(folder / "model.safetensors")
    if found != provenance["weights_sha256"]:
        recorded = provenance["weights_sha256"][:12]
        yield f"model.safetensors is not the trained file (sha256 {found[:12]}…, training recorded {recorded}…)"
    for name, sha256 in provenance["files_sha256"].items():
        if not (folder / name).is_file() or sha256_file(folder / name) != sha256:
            yield f"{name} is not the file that training wrote"


def _existing(study: Path, path: str, part: str) -> dict[str, Any]:
    return read_checked(present(study, path), "build", part)


def _key(key: str, params: dict[str, Any]) -> str:
    """The key as in params.yaml; a variant's identity has its own learning rate as `train.lr`."""
    return f"train.lr_{params.get('init', 'finetune')}" if key == "train.lr" else key


def _shown(params: dict[str, Any], key: str) -> str:
    return repr(params[key]) if key in params else "absent"
