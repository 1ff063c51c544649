"""The embedded study, whole, by the README's command; and what a study tells when it cannot run."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def snakemake(study: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "snakemake"), *arguments, "--directory", str(study)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=1500, env={**os.environ, **environment}, check=False
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = tmp_path_factory.mktemp("study") / "demo"
    study.mkdir()
    shutil.copy(ROOT / "demo" / "params.yaml", study)
    run = snakemake(study, "--cores", "all", "--resources", "gpu=0")
    assert run.returncode == 0, run.stdout + run.stderr
    return study


def training(study: Path, variant: str) -> dict:
    return json.loads((study / "results" / variant / "training_results.json").read_text())


@pytest.mark.slow
def test_scratch_beats_the_unigram_model_and_finetune_beats_scratch(demo: Path) -> None:
    tokens = json.loads((demo / "build" / "tokens" / "tokens.json").read_text())
    for split, key in (("validation", "best_val_metric"), ("test", "test_metric")):
        unigram = tokens["splits"][split]["unigram_perplexity"]
        scratch = training(demo, "scratch-conventional")[key]
        finetune = training(demo, "finetune-conventional")[key]
        assert scratch < 0.6 * unigram
        assert finetune < 0.95 * scratch


@pytest.mark.slow
@pytest.mark.parametrize("init", ["finetune", "scratch"])
def test_the_modes_give_the_same_weights_bit_for_bit(demo: Path, init: str) -> None:
    hashes = {
        mode: training(demo, f"{init}-{mode}")["provenance"]["weights_sha256"]
        for mode in ("conventional", "bwsk-analyzed", "bwsk-reversible")
    }
    assert len(set(hashes.values())) == 1, hashes


@pytest.mark.slow
def test_a_second_run_does_nothing_on_any_number_of_cores(demo: Path) -> None:
    for arguments in (("-n",), ("--cores", "1", "--resources", "gpu=1"), ("--cores", "all", "--resources", "gpu=0")):
        again = snakemake(demo, *arguments)
        assert "Nothing to be done" in again.stdout + again.stderr


@pytest.mark.slow
def test_the_report_is_made_offline(demo: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    run = snakemake(demo, "--report", str(report))
    assert run.returncode == 0, run.stderr
    assert "model_card" in report.read_text() or "Model card" in report.read_text()


def test_the_published_study_offline_stops_with_one_line_about_the_hub(tmp_path: Path) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    run = snakemake(tmp_path, "--cores", "1", "--resources", "gpu=1", HF_HUB_OFFLINE="1")
    output = run.stdout + run.stderr
    assert run.returncode != 0
    assert "Traceback" not in output
    # Snakemake 9.19 shows the log of a failed job twice.
    [line] = {line for line in output.splitlines() if line.startswith("bwsk: error:")}
    # Corpus, tokenizer and base do not wait for each other: whichever came first says what to set instead.
    assert "the Hub cannot be reached" in line
    assert ".source: directory" in line


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("warmup: 0.1", "warmup: 1.5", "params.yaml: train.warmup: found 1.5, must be less than 1"),
        ("seed: 0", "sede: 0", "params.yaml: sede: unknown key"),
        ("[finetune, scratch]", "[finetune, scrath]", "params.yaml: variants.inits.1: found 'scrath'"),
    ],
)
def test_a_bad_parameter_stops_before_any_work(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (ROOT / "demo" / "params.yaml").read_text()
    assert old in text
    (tmp_path / "params.yaml").write_text(text.replace(old, new, 1))
    run = snakemake(tmp_path, "--cores", "1")
    assert run.returncode != 0
    assert message in run.stdout + run.stderr
    assert not (tmp_path / "build").exists()


def test_a_value_from_the_command_line_is_refused(tmp_path: Path) -> None:
    shutil.copy(ROOT / "demo" / "params.yaml", tmp_path)
    run = snakemake(tmp_path, "-n", "--config", "seed=7")
    assert run.returncode != 0
    assert "change the file instead" in run.stdout + run.stderr


def test_a_variant_that_does_not_exist_is_no_target(tmp_path: Path) -> None:
    shutil.copy(ROOT / "demo" / "params.yaml", tmp_path)
    run = snakemake(tmp_path, "-n", "results/finetune-reversible/model.safetensors")
    assert run.returncode != 0
    assert "MissingRule" in run.stdout + run.stderr


def test_the_job_environment_pins_what_the_lock_file_pins() -> None:
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    environment = (ROOT / "workflow" / "envs" / "bwsk.yml").read_text()
    pins = [line.strip().removeprefix("- ") for line in environment.splitlines() if "==" in line]
    assert len(pins) > 10
    assert set(pins) <= set(lock)


def test_the_job_environment_has_all_that_the_package_imports() -> None:
    environment = yaml.safe_load((ROOT / "workflow" / "envs" / "bwsk.yml").read_text())
    pinned = {pin.partition("==")[0].lower() for pin in environment["dependencies"][-1]["pip"]}
    imported: dict[str, Path] = {}
    for file in sorted((ROOT / "bwsk").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            imported |= {name.partition(".")[0]: file for name in names}
    # DVC: `bwsk compare` alone, and that is no step of the workflow.
    ours = imported.keys() - sys.stdlib_module_names - {"bwsk", "dvc"}
    homes = packages_distributions()
    missing = {name: imported[name].name for name in ours if pinned.isdisjoint(map(str.lower, homes[name]))}
    assert missing == {}
