"""`bwsk doctor`: what is there, what would run, and the exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from bwsk.study import hub
from bwsk.study.doctor import Finding, as_json, examine, runs
from tests.unit.hub_stand_in import hub as stand_in

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _asked_again() -> Iterator[None]:
    """The Hub's answer is kept for a process; each test asks again."""
    hub.unreachable.cache_clear()
    yield
    hub.unreachable.cache_clear()


def study(folder: Path, **changes: object) -> Path:
    values = yaml.safe_load((ROOT / "demo" / "params.yaml").read_text())
    values.update(changes)
    folder.mkdir(exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    return folder


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_the_demo_runs_on_any_machine(tmp_path: Path) -> None:
    findings = examine(study(tmp_path / "study"))
    found = by_name(findings)
    assert runs(findings)
    assert found["study"].found == "BWSK demo: 6 variants"
    assert found["Python"].found.startswith(".".join(map(str, sys.version_info[:3])))
    assert "torch " in found["library"].found
    assert found["base"].found == "pretrained on the train split"
    assert found["Hub"].status == "warn"
    assert "HF_HUB_OFFLINE is set" in found["Hub"].found
    report = json.loads(json.dumps(as_json(findings), allow_nan=False))
    assert report["runs"] is True
    assert [entry["name"] for entry in report["findings"]] == [finding.name for finding in findings]


def test_a_study_on_the_hub_does_not_run_offline(tmp_path: Path) -> None:
    source = {"source": "hub", "id": "owner/never-fetched", "revision": "f" * 40}
    findings = examine(study(tmp_path / "study", tokenizer=source, base=source, corpus={**source, "config": "c"}))
    found = by_name(findings)
    assert not runs(findings)
    for section in ("corpus", "tokenizer", "base"):
        assert found[section].status == "fail"
        assert found[section].found == "owner/never-fetched@ffffffffffff is on the Hub, which cannot be reached"
        assert found[section].advice == f"connect, or set {section}.source: directory and {section}.path"


def test_missing_local_paths_are_named(tmp_path: Path) -> None:
    folder = study(
        tmp_path / "study",
        corpus={"source": "directory", "path": "texts"},
        tokenizer={"source": "directory", "path": str(tmp_path / "nowhere")},
        base={"source": "directory", "path": "base"},
    )
    (folder / "texts").mkdir()
    (folder / "texts" / "train.txt").write_text("a")
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text("{}")
    (folder / "base" / "pytorch_model.bin").write_text("")
    found = by_name(examine(folder))
    assert "has neither validation.txt nor validation.parquet" in found["corpus"].found
    assert "nowhere is not a directory" in found["tokenizer"].found
    assert "has no model.safetensors (pytorch_model.bin is a pickle" in found["base"].found
    assert [found[name].status for name in ("corpus", "tokenizer", "base")] == ["fail"] * 3
    for split in ("validation", "test"):
        (folder / "texts" / f"{split}.txt").write_text("a")
    assert by_name(examine(folder))["corpus"].status == "ok"


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="this machine can compute in float16")
def test_float16_needs_a_gpu(tmp_path: Path) -> None:
    values = yaml.safe_load((ROOT / "demo" / "params.yaml").read_text())
    findings = examine(study(tmp_path / "study", train={**values["train"], "precision": "float16"}))
    device = by_name(findings)["device"]
    assert device.status == "fail"
    assert device.found == "CPU, but train.precision is fp16"
    assert device.advice == "use a GPU, or set train.precision: fp32"
    assert not runs(findings)


def test_bad_parameters_are_a_finding(tmp_path: Path) -> None:
    findings = examine(study(tmp_path / "study", seed=-1))
    assert not runs(findings)
    assert "seed: found -1, must be" in by_name(findings)["study"].found


def doctor(cwd: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | variables
    command = [sys.executable, "-m", "bwsk", "doctor", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_with_a_reachable_hub_and_a_dvc_remote(tmp_path: Path) -> None:
    source = {"source": "hub", "id": "owner/model", "revision": "f" * 40}
    folder = study(tmp_path / "study", tokenizer=source, base=source)
    secret = "https://user:s3cret@store.example.org/bucket?sig=s3cret"
    (tmp_path / ".dvc").mkdir()
    config = "[core]\n    remote = store\n    no_scm = true\n['remote \"store\"']\n"
    (tmp_path / ".dvc" / "config").write_text(f"{config}    url = {secret}\n    password = s3cret\n")
    (tmp_path / "hub").mkdir()
    with stand_in(tmp_path / "hub") as (endpoint, _):
        result = doctor(folder, "--json", "report.json", HF_ENDPOINT=endpoint, HF_TOKEN="hf_s3cret")
    assert result.returncode == 0, result.stdout + result.stderr
    lines = {line.split()[1]: line for line in result.stdout.splitlines()}
    assert lines["Hub"].startswith("ok ")
    assert lines["tokenizer"] == "ok   tokenizer  owner/model@ffffffffffff from the Hub"
    assert lines["DVC"] == "ok   DVC        remote store: https://store.example.org/bucket"
    assert "s3cret" not in result.stdout + result.stderr + (folder / "report.json").read_text()
    assert json.loads((folder / "report.json").read_text())["runs"] is True


def test_the_command_fails_for_a_study_that_could_not_run(tmp_path: Path) -> None:
    source = {"source": "hub", "id": "owner/model", "revision": "f" * 40}
    folder = study(tmp_path / "study", base=source)
    result = doctor(tmp_path, str(folder), HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "home"))
    assert result.returncode == 1
    assert "warn Hub        not reachable (127.0.0.1:9: " in result.stdout
    assert "fail base       owner/model@ffffffffffff is on the Hub, which cannot be reached -> connect" in result.stdout
    assert result.stderr == ""


def test_a_local_dvc_remote_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / ".dvc").mkdir()
    config = "[core]\n    remote = disk\n    no_scm = true\n['remote \"disk\"']\n    url = ../store\n"
    (tmp_path / ".dvc" / "config").write_text(config)
    folder = study(tmp_path / "study")
    finding = by_name(examine(folder))["DVC"]
    assert (finding.status, finding.found) == ("warn", f"remote disk: {tmp_path / 'store'} is not there")
    (tmp_path / "store").mkdir()
    assert by_name(examine(folder))["DVC"].status == "ok"


def test_an_unanswering_hub_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that accepts and then says nothing, as behind some firewalls."""
    import socket
    import time

    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        reason = hub.unreachable(1.0)
        assert time.monotonic() - began < 30  # a client left to itself waits for ever
    assert reason is not None
    assert "no answer" in reason or "timed out" in reason.lower()
