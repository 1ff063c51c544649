"""Which parameters, source files and inputs an artifact was made from, and with which versions.

A step's *identity* is what decides its output: the parameters that it reads and the digest of the source files it
runs. Snakemake reruns a step when its identity changes, each artifact stores the identity it was made with, and the
steps that publish refuse an artifact whose identity is no longer the study's.
"""

from __future__ import annotations

import ast
import hashlib
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from bwsk.study.params import Params

PACKAGE = Path(__file__).parents[1]

# Step -> the modules that its command (in `bwsk/cli/`) calls, and the sections of params.yaml that it reads.
# `train` is not here: its parameters depend on the variant (see `identity`).
STEPS = {
    "corpus": (["study.corpus"], ["corpus"]),
    "tokenizer": (["study.tokenizer"], ["tokenizer"]),
    "tokens": (["study.tokens"], ["tokens"]),
    "base": (["study.base_checkpoint"], ["base", "seed"]),
    "classify": (["classification.census", "files"], []),
    "trace": (["classification.trace", "classification.barriers", "classification.plots"], []),
    "memory": (["memory.prediction", "files"], []),
    "evaluate": (["study.evaluate"], ["tokens", "evaluate"]),
    "results": (["study.results"], ["study", "variants"]),
    "card": (["study.card", "study.results", "study.staleness"], ["study", "variants"]),
    "check": (["study.check"], ["study", "variants"]),
}


def identity(params: Params, step: str, variant: str | None = None) -> dict[str, Any]:
    """`{"params": …, "source": sha256}` of a step; for `train`, only what this variant's training reads.

    A change of `lr_scratch` therefore does not touch the fine-tuned variants, nor `budget` any but the reversible.
    """
    if step == "train":
        assert variant is not None
        init, mode = params.split_variant(variant)
        train = params.train.model_dump()
        train["lr"] = train[f"lr_{init}"]
        unread = {"lr_finetune", "lr_scratch"} | (set() if mode == "bwsk-reversible" else {"budget"})
        effective: dict[str, Any] = {
            "init": init,
            "mode": mode,
            "seed": params.seed,
            "train": {key: value for key, value in train.items() if key not in unread},
            "tokens": params.tokens.model_dump(),
            "evaluate": params.evaluate.model_dump(),
        }
        modules = ["study.train"]
    else:
        modules, sections = STEPS[step]
        dumped = params.model_dump()
        effective = {section: dumped[section] for section in sections}
        if step == "base":
            if params.base.source == "pretrain":
                effective["threads"] = params.train.threads  # bits depend on it
            else:
                del effective["seed"]  # nothing is drawn
    return {"params": effective, "source": source_digest(*modules)}


@cache
def source_digest(*modules: str) -> str:
    """sha256 over the source files that these modules of bwsk are made of, themselves and all they import from bwsk."""
    digest = hashlib.sha256()
    for path in source_files(*modules):
        digest.update(f"{path.relative_to(PACKAGE).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def source_files(*modules: str) -> list[Path]:
    """The files of these modules of bwsk and, transitively, of every bwsk module that they import."""
    found: set[Path] = set()
    waiting = {path for module in modules if (path := _file(module.split(".")))}
    while waiting:
        path = waiting.pop()
        found.add(path)
        waiting |= imported(path.read_bytes()) - found
    return sorted(found)


def imported(source: bytes | str) -> set[Path]:
    """The files of the bwsk modules that a source text imports, anywhere in it."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    parts = [name.split(".") for name in names]
    return {path for first, *rest in parts if first == "bwsk" and (path := _file(rest))}


def _file(parts: list[str]) -> Path | None:
    """The file of a module below bwsk. The package's own `__init__` only forwards names and decides nothing."""
    if not parts:
        return None
    path = PACKAGE.joinpath(*parts)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries that decide numbers; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("bwsk", "torch", "transformers", "tokenizers", "safetensors", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
