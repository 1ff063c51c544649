"""The scripts for a GPU machine, on the CPU in a small form: checks before the table, a study in several calls."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import make_inputs

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "BWSK_DEVICE": "cpu"}


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(ROOT / "bench" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)


@pytest.mark.slow
def test_checks_come_first_and_the_table_names_what_it_left_out(tmp_path: Path) -> None:
    small = tmp_path / "out" / "tiny"  # made by the checks
    rivals = ["ours-conventional-eager", "ours-conventional-graph"]
    options = ["--model", small, "--input", 16, "--target", 16, "--rounds", 2, "--windows", 2, "--precisions", "fp32"]
    result = script("gpu.sh", tmp_path / "out", *options, "--rivals", *rivals)
    assert result.returncode == 0, result.stderr
    checks = json.loads((tmp_path / "out" / "correctness-cpu.json").read_text())["checks"]
    assert all(check["passed"] for check in checks)
    for name in ("reversible-fast = conventional", "reversible-max = conventional", "interrupted = whole"):
        assert any(name in check["check"] and check["equal"] == check["tensors"] for check in checks)
    assert any("must differ" in check["check"] and check["equal"] < check["tensors"] for check in checks)
    table = json.loads((tmp_path / "out" / "step-cpu.json").read_text())
    assert [row["rival"] for row in table["rows"]] == ["plain", "ours-conventional-eager"]
    for row in table["rows"]:
        assert row["step_ms"] > 0
        assert len(row["bursts_ms"]) == 2
        assert row["gpu_busy"] is None
        assert row["peak_mib"] is None
    (missing,) = table["not_measured"]
    assert missing["rival"] == "ours-conventional-graph"
    assert "needs a CUDA device" in missing["reason"]


@pytest.mark.slow
def test_a_study_in_several_calls_ends_like_one_in_a_single_call(tmp_path: Path) -> None:
    make_inputs(tmp_path / "study")
    data = tmp_path / "data"
    shutil.copytree(tmp_path / "study" / "text", data)
    shutil.copytree(tmp_path / "study" / "build" / "tokenizer", data / "tokenizer")
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 300}
    changes = ["tokens.block=32", "tokens.window=32", "tokens.stride=16", "evaluate.max_windows=40"]
    changes += ["train.max_steps=300", "train.checkpoint_every=100000", "train.eval_every=100000"]
    options = ["--cpu", "--backend", "eager", "--precision", "fp32", "--modes", "conventional"]
    options += ["--architecture", json.dumps(shape), "--set", *changes]
    whole = script("gpu-study.sh", tmp_path / "whole", data, *options)
    assert whole.returncode == 0, whole.stderr
    first = script("gpu-study.sh", tmp_path / "parts", data, "--minutes", "0.001", *options)
    assert first.returncode == 75, first.stderr
    assert not (tmp_path / "parts" / "study.json").exists()
    second = script("gpu-study.sh", tmp_path / "parts", data, *options)
    assert second.returncode == 0, second.stderr
    assert "resuming after step" in second.stderr
    one, other = (json.loads((tmp_path / name / "study.json").read_text()) for name in ("whole", "parts"))
    assert one["weights_sha256"] == other["weights_sha256"]
    assert one["variants"]["scratch-conventional"]["total_steps"] == 300
