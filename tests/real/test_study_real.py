"""The whole workflow on real WikiText-2 and the full T5-small architecture, all six variants, a few steps each.

The base checkpoint is a local stand-in for the pretrained one: fresh weights of the same architecture. So the numbers
say nothing about T5-small; that every step works at full size, and that the modes agree to the bit, is what is tested.
Needs the data in `../shared/data` beside the repository, or in the directory that BWSK_SHARED_DATA names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bwsk import predict_memory

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("BWSK_SHARED_DATA", ROOT.parent / "shared" / "data"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no WikiText-2 in {DATA}; set BWSK_SHARED_DATA"),
]

# Rows of each split: enough for a few blocks and windows, so that the test takes minutes on two cores.
ROWS = {"train": 400, "validation": 60, "test": 60}


def write_study(study: Path) -> None:
    """The published params.yaml with local copies in place of the Hub, and caps that make it end."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    text = study / "data" / "text"
    text.mkdir(parents=True)
    for split, rows in ROWS.items():
        lines = (DATA / "wikitext-2-v1" / f"{split}.txt").read_text(encoding="utf-8").splitlines(keepends=True)
        (text / f"{split}.txt").write_text("".join(lines[:rows]), encoding="utf-8")
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(study / "data" / "t5-small")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["corpus"] = {"source": "directory", "path": "data/text"}
    params["tokenizer"] = {"source": "directory", "path": str(DATA / "t5-tokenizer")}
    params["base"] = {"source": "directory", "path": "data/t5-small", "id": "google-t5/t5-small"}
    # Short blocks, and float32: some processors have no products in bfloat16, and take minutes a step.
    params["tokens"] |= {"block": 64, "window": 64, "stride": 32}
    params["train"] |= {
        "batch_size": 2,
        "max_steps": 3,
        "eval_every": 2,
        "checkpoint_every": 2,
        "log_every": 1,
        "precision": "fp32",
    }
    params["evaluate"] |= {"max_windows": 4, "batch_size": 4}
    (study / "params.yaml").write_text(yaml.safe_dump(params))


def snakemake(study: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("snakemake")), *arguments, "--directory", str(study)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("real")
    write_study(path)
    run = snakemake(path, "--cores", "2", "--resources", "gpu=0")
    assert run.returncode == 0, run.stdout + run.stderr
    return path


def test_the_model_repository_is_whole_and_of_full_size(study: Path) -> None:
    results = json.loads((study / "results" / "results.json").read_text())
    assert set(results["variants"]) == {
        f"{init}-{mode}"
        for init in ("finetune", "scratch")
        for mode in ("conventional", "bwsk-analyzed", "bwsk-reversible")
    }
    for variant in results["variants"]:
        assert (study / "results" / variant / "model.safetensors").stat().st_size == pytest.approx(60_506_624 * 4, 1e-3)
    census = results["census"]
    assert (census["s"], census["k"], census["total"]) == (134, 56, 190)
    assert (study / "results" / "README.md").read_text().startswith("---\n")


def test_modes_agree_to_the_bit(study: Path) -> None:
    for init in ("finetune", "scratch"):
        trainings = [
            json.loads((study / "results" / f"{init}-{mode}" / "training_results.json").read_text())
            for mode in ("conventional", "bwsk-analyzed", "bwsk-reversible")
        ]
        assert len({training["provenance"]["weights_sha256"] for training in trainings}) == 1
        assert len({json.dumps(training["val_perplexity_curve"]) for training in trainings}) == 1


def test_predicted_memory_of_the_reversible_mode_is_lower(study: Path) -> None:
    def predicted(variant: str) -> float:
        file = study / "results" / variant / "training_results.json"
        return json.loads(file.read_text())["predicted_peak_memory_mb"]

    # With blocks this short weights and optimizer are nearly all of it, so the bound is held at the published length.
    assert predicted("finetune-bwsk-reversible") < predicted("finetune-conventional")
    stock, ours = (predict_memory(study / "data" / "t5-small", mode=mode) for mode in ("conventional", "reversible"))
    assert ours.peak_mib < 0.7 * stock.peak_mib


def test_a_second_run_does_nothing(study: Path) -> None:
    again = snakemake(study, "-n")
    assert "Nothing to be done" in again.stdout + again.stderr
