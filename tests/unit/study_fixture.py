"""A tiny but real study: the real steps on a few pages of text, six variants trained for a few steps each.

Made once per test session (seconds). `study` is shared and read only; `editable` is a copy to tamper with. `data` is
the embedded study's corpus, tokenizer and tokens, read only as well.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from bwsk.classification.census import classify
from bwsk.files import write_json
from bwsk.study.base_checkpoint import make_base_checkpoint
from bwsk.study.corpus import embedded, make_corpus
from bwsk.study.evaluate import evaluate_variant
from bwsk.study.params import SPLITS, Params, load_params
from bwsk.study.results import collect
from bwsk.study.tokenizer import make_tokenizer
from bwsk.study.tokens import make_tokens
from bwsk.study.train import Run
from bwsk.study.train_inputs import TrainInputs

PARAMS = """\
study: {title: Tiny study, repository: bwsk/tiny, published: t5-small}
seed: 3
corpus: {source: directory, path: text}
tokenizer: {source: train, vocab_size: 320}
tokens: {block: 32, window: 32, stride: 16}
base: {source: directory, path: pretrained}
train:
  batch_size: 4
  epochs: 1
  max_steps: 12
  lr_finetune: 1.0e-3
  lr_scratch: 3.0e-3
  precision: fp32
  eval_every: 4
  log_every: 3
  threads: 1
evaluate: {batch_size: 32, max_windows: 40}
"""
_ROWS = {"train": 500, "validation": 160, "test": 160}
DEMO = Path(__file__).parents[2] / "demo" / "params.yaml"


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished study. It is made with it as the working directory, as the workflow does."""
    root = tmp_path_factory.mktemp("tiny") / "study"
    with pytest.MonkeyPatch.context() as patch:
        _make(root, patch)
    return root


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the embedded study's `corpus`, `tokenizer` and `tokens`."""
    out = tmp_path_factory.mktemp("data")
    params = load_params(DEMO)
    make_corpus(params, out / "corpus")
    make_tokenizer(params, out / "corpus", out / "tokenizer")
    make_tokens(params, out / "corpus", out / "tokenizer", out / "tokens")
    return out


@pytest.fixture
def editable(study: Path, tmp_path: Path) -> Path:
    """A copy of the finished study."""
    return shutil.copytree(study, tmp_path / "study")


@pytest.fixture
def params(study: Path) -> Params:
    """Its parameters."""
    return load_params(study / "params.yaml")


def _make(root: Path, patch: pytest.MonkeyPatch) -> None:
    texts = embedded()
    (root / "text").mkdir(parents=True)
    for split in SPLITS:
        (root / "text" / f"{split}.txt").write_text("".join(texts[split][: _ROWS[split]]), encoding="utf-8")
    (root / "params.yaml").write_text(PARAMS, encoding="utf-8")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=320, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(root / "pretrained")
    patch.chdir(root)
    params, build = load_params("params.yaml"), Path("build")
    make_corpus(params, build / "corpus")
    make_tokenizer(params, build / "corpus", build / "tokenizer")
    make_tokens(params, build / "corpus", build / "tokenizer", build / "tokens")
    make_base_checkpoint(params, build / "tokenizer", build / "tokens", build / "base")
    published, strict = (classify(build / "base", rules) for rules in ("published", "strict"))
    write_json(build / "analysis" / "census.json", published.beside(strict))
    inputs = TrainInputs(build / "tokens", build / "tokenizer", build / "base", build / "analysis" / "census.json")
    for name in params.variant_names:
        run = Run(params, name, inputs, build / "checkpoints" / name, torch.device("cpu"), say=lambda text: None)
        run.run()
        run.finish(Path("results") / name, build / "curves" / name)
        evaluation = evaluate_variant(params, Path("results") / name, build / "tokens", gpus=0)
        write_json(build / "evaluation" / f"{name}.json", evaluation)
    publish(params, Path())


def publish(params: Params, root: Path) -> None:
    """Collect the results of the study in `root` and write its card, whatever was done to its files before."""
    from bwsk.study.card import write_card
    from bwsk.study.staleness import current_training

    results = collect(params, root)
    trainings = {name: current_training(params, root, name, None) for name in params.variant_names}
    write_card(params, results, trainings, root)
