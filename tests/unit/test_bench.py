"""The benches that need no GPU run, in a small form, and write what they print. `test_bench_gpu.py` has the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SMALL = ["--rounds", "1", "--steps", "1", "--warm", "0", "--threads", "1"]


def bench(script: str, out: Path, *options: str) -> dict[str, Any]:
    """The JSON that a bench writes."""
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / f"{script}.py", out, *options],
        capture_output=True,
        text=True,
        check=True,
    )
    written = Path(done.stdout.splitlines()[-1].removeprefix("wrote "))
    return json.loads(written.read_text())


def test_rivals_take_turns(tmp_path: Path) -> None:
    shape = ["--model", str(ROOT / "bench" / "demo-t5.json"), "--batch", "2", "--input", "16", "--target", "16"]
    options = ["--rivals", "ours-reversible-eager", "--precisions", "fp32", "--windows", "4", "--profile"]
    result = bench("run", tmp_path, *shape, *SMALL, *options)
    plain, ours = result["rows"]
    assert (plain["rival"], ours["rival"], result["not_measured"]) == ("plain", "ours-reversible-eager", [])
    assert ours["ratio_to_plain"] == pytest.approx(ours["step_ms"] / plain["step_ms"], rel=1e-2)
    for row in result["rows"]:
        assert row["windows_per_s"] > 0 < row["projected_study_s"]
        assert "aten::mm" in row["profile"]["operators"]
        assert row["peak_mib"] is None  # of the CPU it is not measured


def test_growth(tmp_path: Path) -> None:
    axes = [
        "--batches",
        "--lengths",
        "--models",
        "tiny",
        "--precision",
        "fp32",
        "--figure",
        str(tmp_path / "growth.svg"),
    ]
    result = bench("growth", tmp_path, *axes, *SMALL)
    assert [row["rival"] for row in result["rows"]] == ["plain", "ours-conventional", "ours-reversible"]
    plain, _, reversible = result["rows"]
    assert reversible["predicted_mib"] < plain["predicted_mib"]
    assert (tmp_path / "growth.svg").is_file()


def test_workflow(tmp_path: Path) -> None:
    result = bench("workflow", tmp_path, "--rounds", "1")
    assert len(result["rows"]) == 4
    assert all(0 < row["min_s"] <= row["median_s"] <= row["max_s"] for row in result["rows"])
