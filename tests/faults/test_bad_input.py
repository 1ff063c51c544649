"""Malformed inputs: one line that names the thing, the exit status, and nothing that was there is touched."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.faults import bad_input
from tests.faults.bad_input import MODELS, PUBLISHING, TEXT, TOKENIZERS, TRAINING, YAML, Bad, set_param
from tests.faults.conftest import Cases
from tests.faults.harness import Server

full = pytest.mark.faults


def some_quick(cases: list[Bad]) -> list:
    """The first three belong to the quick subset, all to the full one."""
    return [pytest.param(case, id=case.name, marks=() if n < 3 else full) for n, case in enumerate(cases)]


@pytest.fixture(scope="module")
def unbroken(cases: Cases, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny study with its tokenizer and base as local folders, and a `results/` to publish."""
    root = shutil.copytree(cases.study, tmp_path_factory.mktemp("bad") / "study")
    shutil.copytree(root / "build" / "tokenizer", root / "tok")
    shutil.copytree(root / "build" / "base", root / "model")
    (root / "build" / "analysis" / "memory.json").write_text('{"peak_mib": 1.0}')
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["tokenizer"] = {"source": "directory", "path": "tok"}
    params["base"] = {"source": "directory", "path": "model"}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return root


def tree(root: Path) -> dict[str, str]:
    """Every file below `root` with its mode and a hash of its bytes; links by their targets."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(root))] = os.readlink(path)
        elif path.is_file() and path.suffix != ".lock":
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(root))] = f"{path.stat().st_mode:o} {content}"
    return found


def refused(server: Server, root: Path, case: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Break the study in `root`, run the command, and hold what it said and did to the case; returns its line."""
    monkeypatch.chdir(root)
    case.break_it()
    before = tree(root)
    log = tmp_path / "log"
    told = server.run(case.command.split(), root, log, limit=case.limit)
    said = log.read_text(errors="replace")
    assert "Traceback" not in said, said
    assert told["status"] == case.status, said
    errors = [line for line in said.splitlines() if "error:" in line]
    assert len(errors) == 1, said
    assert said.splitlines()[-1] == errors[0], said
    assert errors[0].startswith("bwsk: error: ")
    assert len(errors[0]) < 700, errors[0]
    assert re.search(case.says, errors[0]), said
    after = tree(root)
    if case.limit is None or "step-" not in case.says:
        assert after == before, {name for name in {**before, **after} if before.get(name) != after.get(name)}
    return errors[0]


@pytest.mark.parametrize("case", some_quick(YAML + TEXT))
def test_parameters_file_and_corpus(case: Bad, server, unbroken, tmp_path, monkeypatch, figures: Counter[str]) -> None:
    root = shutil.copytree(unbroken, tmp_path / "study")
    refused(server, root, case, tmp_path, monkeypatch)
    figures["malformed inputs"] += 1


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        pytest.param(*row, id=f"{row[0]}={row[1]!r}"[:50], marks=() if n % 8 == 0 else full)
        for n, row in enumerate(bad_input.PARAMS)
    ],
)
def test_parameters(key, value, says, server, cases, tmp_path, monkeypatch, figures: Counter[str]) -> None:
    (tmp_path / "study").mkdir()
    shutil.copyfile(cases.study / "params.yaml", tmp_path / "study" / "params.yaml")
    case = Bad(key, lambda: set_param(key, value), bad_input.CORPUS, says)
    line = refused(server, tmp_path / "study", case, tmp_path, monkeypatch)
    assert key.split(".")[0] in line
    figures["malformed inputs"] += 1


@pytest.mark.parametrize("case", some_quick(TOKENIZERS))
def test_tokenizers(case: Bad, server, unbroken, tmp_path, monkeypatch, figures: Counter[str]) -> None:
    root = shutil.copytree(unbroken, tmp_path / "study")
    refused(server, root, case, tmp_path, monkeypatch)
    figures["malformed inputs"] += 1


@pytest.mark.parametrize("case", some_quick(MODELS))
def test_models(case: Bad, server, unbroken, tmp_path, monkeypatch, figures: Counter[str]) -> None:
    root = shutil.copytree(unbroken, tmp_path / "study")
    line = refused(server, root, case, tmp_path, monkeypatch)
    assert (tmp_path / "log").read_text() == f"{line}\n"  # nor what transformers has to say of the weights
    figures["malformed inputs"] += 1


@pytest.mark.parametrize("case", some_quick(TRAINING))
def test_training(case: Bad, server, unbroken, tmp_path, monkeypatch, figures: Counter[str]) -> None:
    root = shutil.copytree(unbroken, tmp_path / "study")
    refused(server, root, case, tmp_path, monkeypatch)
    assert "train finetune" not in (tmp_path / "log").read_text()  # no step was taken
    figures["malformed inputs"] += 1


@pytest.mark.parametrize(
    ("command", "says", "whose"),
    [pytest.param(*row, id=row[1][:50], marks=() if n < 3 else full) for n, row in enumerate(bad_input.COMMANDS)],
)
def test_command_line(command, says, whose, server, tmp_path, monkeypatch, figures: Counter[str]) -> None:
    (tmp_path / "empty").mkdir()
    case = Bad(command, lambda: None, command, re.escape(says), status=2)
    line = refused(server, tmp_path / "empty", case, tmp_path, monkeypatch)
    assert line.startswith(f"bwsk: error: {says}")
    assert line.endswith(f"; see: bwsk{whose} --help")
    figures["malformed inputs"] += 1


@full
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in PUBLISHING])
def test_publishing(case: Bad, server, editable: Path, tmp_path, monkeypatch, figures: Counter[str]) -> None:
    refused(server, editable, case, tmp_path, monkeypatch)
    figures["malformed inputs"] += 1
