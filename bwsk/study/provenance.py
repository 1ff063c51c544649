"""Which parameters, source and inputs an artifact was made from, and with which versions.

A step's *identity* determines its output: the parameters that it reads and the digest of the code that it can run.
Snakemake reruns a step when its identity changes. Each artifact stores the identity that it was made with, and the
steps that publish refuse an artifact whose identity is no longer the study's.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from bwsk.files import write_text
from bwsk.study.params import Params
from bwsk.study.source_digest import Source

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Step:
    """The modules that a step's command (in `bwsk/cli/`) calls, and the sections of params.yaml that it reads.

    `without`: modules that those import inside functions and never run in this step.
    """

    modules: tuple[str, ...]
    sections: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


# The reversible engine, which is imported inside the functions that run it.
_ENGINE = ("reversible.handle", "reversible.plan")

# Steps that differ by mode have an entry for each, so that code that a mode cannot run does not count for its variants.
# Which parameters a training reads depends on its variant (see `identity`).
STEPS = {
    "corpus": Step(("study.corpus",), ("corpus",)),
    "tokenizer": Step(("study.tokenizer",), ("tokenizer",)),
    "tokens": Step(("study.tokens",), ("tokens",)),
    "base": Step(("study.base_checkpoint",), ("base", "seed")),
    "classify": Step(("classification.census", "files")),
    "trace": Step(("classification.trace", "classification.barriers", "classification.plots")),
    "memory-conventional": Step(("memory.prediction", "files"), without=_ENGINE),
    "memory-bwsk-analyzed": Step(("memory.prediction", "files"), without=_ENGINE),
    "memory-bwsk-reversible": Step(("memory.prediction", "files")),
    "train-conventional": Step(("study.train",), without=(*_ENGINE, "classification.erasure")),
    "train-bwsk-analyzed": Step(("study.train",), without=_ENGINE),
    "train-bwsk-reversible": Step(("study.train",), without=("classification.erasure", "reversible.report")),
    "evaluate": Step(("study.evaluate",), ("tokens", "evaluate")),
    "results": Step(("study.results",), ("study", "variants")),
    "card": Step(("study.card", "study.results", "study.staleness"), ("study", "variants")),
    "check": Step(("study.check",), ("study", "variants")),
}
# Modules that cannot change an artifact: what is declared here is compared separately, and progress is only shown.
UNCOUNTED = ("study.provenance", "study.source_digest", "study.progress")
SOURCE_FILES = tuple(
    PACKAGE / "study" / name for name in ("provenance.py", "source_digest.py")
)  # the code that computes digests
_SOURCE = Source(PACKAGE)


def identity(params: Params, step: str, variant: str | None = None) -> dict[str, Any]:
    """`{"params": …, "source": sha256}` of a step; for `train`, only the parameters that this variant reads.

    So a change of `lr_scratch` does not affect the fine-tuned variants, and `budget` affects the reversible ones only.
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
        step = f"train-{mode}"
    else:
        dumped = params.model_dump()
        effective = {section: dumped[section] for section in STEPS[step].sections}
        if step == "base":
            if params.base.source == "pretrain":
                effective["threads"] = params.train.threads  # the exact bits depend on it
            else:
                del effective["seed"]  # nothing is random
    return {"params": effective, "source": source_digest(step)}


@cache
def source_digest(step: str, source: Source = _SOURCE) -> str:
    """sha256 of the code that this step of `STEPS` can run (see `source_digest.py`)."""
    return source.digest(STEPS[step].modules, (*STEPS[step].without, *UNCOUNTED))


def source_files(step: str, source: Source = _SOURCE) -> list[Path]:
    """The files of that code."""
    return source.files(STEPS[step].modules, (*STEPS[step].without, *UNCOUNTED))


def write_digests(folder: Path) -> None:
    """Write the digest of each step's source to a file of its name in `folder`; DVC's stages depend on them."""
    for step in STEPS:
        write_text(folder / step, f"{source_digest(step)}\n")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries that affect numbers; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("bwsk", "torch", "transformers", "tokenizers", "safetensors", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
