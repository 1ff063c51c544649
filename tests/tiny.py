"""A tiny but real study for tests: real text, a tokenizer trained on it, a T5 of 60 thousand parameters."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path
from typing import Any

import yaml

from bwsk.files import write_json
from bwsk.study.base_checkpoint import make_base_checkpoint
from bwsk.study.corpus import make_corpus
from bwsk.study.params import Params, load_params
from bwsk.study.tokenizer import make_tokenizer
from bwsk.study.tokens import make_tokens

PARAMS: dict[str, Any] = {
    "study": {"title": "Tiny", "repository": "bwsk/tiny", "published": None},
    "corpus": {"source": "directory", "path": "text"},
    "tokenizer": {"source": "train", "vocab_size": 300},
    "tokens": {"block": 32, "window": 32, "stride": 16},
    "base": {
        "source": "pretrain",
        "architecture": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4},
        "steps": 5,
        "batch_size": 4,
        "input_length": 32,
    },
    "train": {
        "batch_size": 4,
        "max_steps": 12,
        "precision": "fp32",
        "eval_every": 4,
        "checkpoint_every": 3,
        "log_every": 2,
        "threads": 1,
    },
    "evaluate": {"batch_size": 16, "max_windows": 40},
}


def write_text(folder: Path) -> None:
    """Three splits of a few kilobytes of English each, the largest for training."""
    folder.mkdir(parents=True)
    text = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)).splitlines(True)
    for split, first, last in (("train", 0, 400), ("validation", 400, 500), ("test", 500, 600)):
        (folder / f"{split}.txt").write_text("".join(text[first:last]), encoding="utf-8")


def write_params(study: Path, **train: Any) -> Params:
    """Write the tiny study's params.yaml with changes of its `train` section, and read it as the workflow does."""
    content = {**PARAMS, "train": {**PARAMS["train"], **train}}
    (study / "params.yaml").write_text(yaml.safe_dump(content))
    return load_params(study / "params.yaml")


def make_inputs(study: Path) -> Params:
    """Everything that training reads, made in `study` by the study's own steps (the census apart: two numbers)."""
    study.mkdir(parents=True, exist_ok=True)
    write_text(study / "text")
    params = write_params(study)
    absolute = params.model_copy(update={"corpus": params.corpus.model_copy(update={"path": str(study / "text")})})
    build = study / "build"
    make_corpus(absolute, build / "corpus")
    make_tokenizer(params, build / "corpus", build / "tokenizer")
    make_tokens(params, build / "corpus", build / "tokenizer", build / "tokens")
    make_base_checkpoint(params, build / "tokenizer", build / "tokens", build / "base")
    write_json(build / "analysis" / "census.json", {"s_ratio": 0.7, "k_ratio": 0.3})
    return params
