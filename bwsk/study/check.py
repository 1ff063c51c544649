"""Verify a finished model repository from its files alone: layout, loading, JSON, card, hashes.

It uses no network and executes nothing from the repository. The first problem ends the check with a one-line error;
otherwise it returns the list of all checks that passed.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bwsk.errors import BwskError
from bwsk.files import flat, read_json, write_json
from bwsk.study.card import check_header, render
from bwsk.study.params import SPLITS, Params
from bwsk.study.repository import CARD, PLOTS, RESULTS, TEMPLATE, repository_files
from bwsk.study.results import gather, read_results
from bwsk.study.staleness import current_results, current_training, present

# Written by version control into the folders that it tracks; not part of the repository.
TOLERATED = frozenset({".gitignore"})
_PROMPT = "The statement is executed and the value of the expression"
_NEW_TOKENS = 12


@dataclass(frozen=True)
class Check:
    """One check that passed: what was checked, in which file or folder, and what was found there."""

    what: str
    where: str
    found: str


def verify(params: Params, study: Path, template: Path = TEMPLATE) -> list[Check]:
    """All checks of the study in `study`, in order. BwskError at the first that fails, naming file and problem."""
    built = (study / "build/tokens/tokens.json").is_file()
    return [
        *_layout(params, study / "results"),
        *documents(params, study, gather(params, study) if built else None, template),
        *(check for variant in params.variant_names for check in _variant(params, study, variant)),
    ]


def documents(params: Params, study: Path, collected: dict[str, Any] | None, template: Path = TEMPLATE) -> list[Check]:
    """The checks of results.json and the card alone: that they agree exactly with the study's files.

    `collected` is what `gather` returns; None in a pulled repository without build/.
    """
    return [*_results(params, study, collected), *_card(params, study, template)]


def write_checks(checks: list[Check], study: Path) -> None:
    """Record the checks in `build/check.json`."""
    write_json(study / "build" / "check.json", {"passed": len(checks), "checks": [asdict(check) for check in checks]})


def _layout(params: Params, root: Path) -> Iterator[Check]:
    """Exactly the published files, all regular, readable, not executable and not writable by everybody."""
    if not root.is_dir():
        raise BwskError(f"{root}: missing; run the study first")
    wanted = repository_files(params.variant_names)
    folders = {path.parent for path in wanted} - {Path()}
    found = set()
    for path in sorted(root.rglob("*")):
        name, mode = path.relative_to(root), path.lstat().st_mode
        if stat.S_ISLNK(mode):
            raise BwskError(f"{path}: is a link, the published files must be themselves; replace it by a copy")
        if mode & stat.S_IWOTH:
            raise BwskError(f"{path}: is writable by everybody (mode {mode & 0o7777:o}); chmod o-w")
        if stat.S_ISDIR(mode):
            if name not in folders:
                raise BwskError(f"{path}: a folder that is no part of the study; remove it")
            continue
        if name.name in TOLERATED:
            continue
        if name not in wanted or not stat.S_ISREG(mode):
            raise BwskError(f"{path}: no part of a model repository; remove it")
        if mode & 0o7111 or not mode & stat.S_IRUSR:
            raise BwskError(f"{path}: has mode {mode & 0o7777:o}, must be readable and not executable; chmod 644")
        if path.stat().st_size == 0:
            raise BwskError(f"{path}: is empty; run the step that makes it again")
        found.add(name)
    if missing := sorted(wanted - found):
        raise BwskError(f"{root / missing[0]}: missing; pull it (dvc pull) or run the study")
    yield Check("layout", str(root), f"{len(found)} files, nothing else")
    yield Check("permissions", str(root), "regular files, none executable, none writable by everybody")


def _results(params: Params, study: Path, collected: dict[str, Any] | None) -> Iterator[Check]:
    path = study / "results" / RESULTS
    results = read_results(study)
    yield Check("JSON schema", str(path), f"{len(results['variants'])} variants, {len(results['claims'])} claims")
    current_results(params, study, results)
    if collected is not None:
        if results != collected:
            key = _first_difference(results, collected)
            raise BwskError(f"{path}: {key} is not what the study's files say; collect it again: bwsk results {study}")
        yield Check("agreement", str(path), "collected again from the study's files: the same")
        return
    # Compare with the variants' own files, which are all there is.
    for variant in params.variant_names:
        training = current_training(params, study, variant, None)
        figures, recorded = (flat(one) for one in (results["variants"][variant], training))
        for key, value in figures.items():
            if key in recorded and recorded[key] != value:
                raise BwskError(f"{path}: variants.{variant}.{key} is {value}, training recorded {recorded[key]}")
        tokens = {split: results["tokens"]["splits"][split]["sha256"] for split in SPLITS}
        if training["provenance"]["tokens_sha256"] != tokens:
            raise BwskError(f"{path}: {variant} was trained on other tokens; collect it again: bwsk results {study}")
    yield Check("agreement", str(path), "agrees with training_results.json of every variant")


def _card(params: Params, study: Path, template: Path) -> Iterator[Check]:
    path = present(study, f"results/{CARD}")
    results = read_results(study)
    try:
        text = path.read_bytes().decode()  # not with line ends translated
    except UnicodeDecodeError:
        raise BwskError(f"{path}: not UTF-8; write it again: bwsk card {study}") from None
    fields = check_header(text, results, path)
    yield Check("card header", str(path), f"{len(fields)} fields, {len(results['variants'])} perplexities")
    if text != render(params, results, template):
        raise BwskError(f"{path}: is not the card of results.json; write it again: bwsk card {study}")
    yield Check("card", str(path), "rendered again from results.json: the same")
    for name in PLOTS:
        picture = present(study, f"results/figures/{name}")
        if not picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n"):
            raise BwskError(f"{picture}: not a PNG file; draw it again: bwsk card {study}")
    yield Check("figures", str(study / "results" / "figures"), ", ".join(PLOTS))


def _variant(params: Params, study: Path, variant: str) -> Iterator[Check]:
    folder = study / "results" / variant
    training = current_training(params, study, variant, None)
    yield Check("training record", str(folder / "training_results.json"), "schema, parameters and source are current")
    parameters = _weights(folder / "model.safetensors")
    digest = training["provenance"]["weights_sha256"][:12]
    yield Check("weights", str(folder / "model.safetensors"), f"{parameters:,} float32 values, sha256 {digest}…")
    yield Check("loads and writes", str(folder), _generate(study / "results", variant, parameters))


def _weights(path: Path) -> int:
    """The number of parameters in a safetensors file; BwskError unless all are finite float32."""
    import torch
    from safetensors import SafetensorError, safe_open

    total = 0
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != "pt":
                raise BwskError(f"{path}: header lacks format: pt; train this variant again")
            for name in file.keys():  # noqa: SIM118 -- not a dict
                tensor = file.get_tensor(name)
                if tensor.dtype != torch.float32:
                    raise BwskError(f"{path}: {name} is {tensor.dtype}, published weights are float32")
                if not torch.isfinite(tensor).all():
                    raise BwskError(f"{path}: {name} has values that are not finite; train this variant again")
                total += tensor.numel()
    except (SafetensorError, OSError) as error:
        raise BwskError(f"{path}: not a valid safetensors file ({error}); pull or train it again") from None
    if total == 0:
        raise BwskError(f"{path}: holds no tensors; pull or train it again")
    return total


def _generate(root: Path, variant: str, parameters: int) -> str:
    """Load a variant as the card recommends, without the network, and return some generated text, shortened."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.utils import logging

    from bwsk.study.model import without_progress_bars

    folder = root / variant
    config = read_json(folder / "config.json")
    if "auto_map" in config:
        raise BwskError(f"{folder / 'config.json'}: asks for code from the repository (auto_map); remove it")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    offline: dict[str, Any] = {"subfolder": variant, "local_files_only": True, "trust_remote_code": False}
    try:
        with without_progress_bars():
            model, problems = AutoModelForSeq2SeqLM.from_pretrained(
                root, use_safetensors=True, output_loading_info=True, **offline
            )
            tokenizer = AutoTokenizer.from_pretrained(root, **offline)
    except Exception as error:  # transformers raises many kinds; to a user they all mean that it does not load
        raise BwskError(f"{folder}: does not load ({' '.join(str(error).split())[:160]})") from None
    finally:
        logging.set_verbosity(verbosity)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, problems[kind])):
            raise BwskError(f"{folder / 'model.safetensors'}: {kind.replace('_', ' ')}: {names[0]} and perhaps more")
    found = sum(parameter.numel() for parameter in model.parameters())
    if found != parameters:
        raise BwskError(f"{folder}: config.json makes {found:,} parameters, model.safetensors has {parameters:,}")
    vocabulary = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise BwskError(f"{folder}: the tokenizer has {len(tokenizer):,} tokens, the model {vocabulary:,}")
    inputs = tokenizer(_PROMPT, add_special_tokens=False, return_tensors="pt")
    if inputs["input_ids"].numel() == 0:
        raise BwskError(f"{folder / 'tokenizer.json'}: makes no tokens of English text; make it again")
    with torch.inference_mode():
        written = model.eval().generate(
            input_ids=inputs["input_ids"],
            min_new_tokens=_NEW_TOKENS,
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            no_repeat_ngram_size=2,
        )
    if written.shape[1] <= _NEW_TOKENS:
        raise BwskError(f"{folder}: wrote {written.shape[1] - 1} tokens where {_NEW_TOKENS} were asked for")
    text = str(tokenizer.decode(written[0], skip_special_tokens=True)).strip() or str(tokenizer.decode(written[0]))
    return f"{_NEW_TOKENS} tokens: {' '.join(text.split())[:40]}"


def _first_difference(found: Any, wanted: Any, key: str = "") -> str:
    """Key path of the first difference of two JSON values that are not equal."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        pairs = [(name, found.get(name), wanted.get(name)) for name in {**found, **wanted}]
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = [(str(index), *pair) for index, pair in enumerate(zip(found, wanted, strict=True))]
    else:
        return key or "the file"
    name, left, right = next(pair for pair in pairs if pair[1] != pair[2])
    return _first_difference(left, right, f"{key}.{name}" if key else name)
