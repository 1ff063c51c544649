"""`bwsk restore` and `bwsk record` where they cannot work: a line that names the thing and the fix, nothing changed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bwsk.errors import BwskError
from bwsk.study import dvc_stages as stages
from bwsk.study import dvc_sync as versions
from bwsk.study.dvc_sync import SHOWN, record, restore
from tests.faults.harness import PROJECT

LOCK = "schema: '2.0'\nstages:\n  corpus:\n    cmd: snakemake build/corpus\n    deps: []\n"
UNREADABLE = r"dvc\.lock: cannot be read .* take one side \(git checkout --ours dvc\.lock\)$"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these is refused before DVC or Snakemake is started."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr(versions.subprocess, "run", refuse)


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ([], r"params\.yaml: no such file; a study is a directory with a params\.yaml"),
        (["params.yaml"], r"dvc\.lock: missing, nothing was recorded of this study yet; run it: dvc repro"),
        (["params.yaml", "dvc.lock"], r"no DVC repository of its own; run in it: dvc init --subdir \(without git: "),
        (["params.yaml", "dvc.lock", ".dvc"], r"dvc\.yaml: missing; take it from git, or write it: bwsk stages"),
    ],
    ids=["no study", "nothing recorded", "no DVC", "no dvc.yaml"],
)
def test_restore_of_what_is_no_recorded_study(tmp_path: Path, there: list[str], words: str) -> None:
    for name in there:
        if name == ".dvc":
            (tmp_path / name).mkdir()
        elif name == "dvc.lock":
            (tmp_path / name).write_text(LOCK)
        else:
            shutil.copy(PROJECT / "demo" / name, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(BwskError, match=words) as error:
        restore(tmp_path, print)
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "lock",
    [b"", b"\xff\xfe", b"[", b"stages: [1]", b"stages: {a: 1}", b"stages: {a: {}}", b"<<<<<<< HEAD\nstages: {}"],
)
def test_a_lock_that_is_none(tmp_path: Path, lock: bytes) -> None:
    shutil.copy(PROJECT / "demo" / "params.yaml", tmp_path)
    (tmp_path / "dvc.lock").write_bytes(lock)
    with pytest.raises(BwskError, match=UNREADABLE):
        restore(tmp_path, print)


def test_record_in_a_study_without_dvc(editable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC would look for a repository in the folders above, and commit all that is there."""
    monkeypatch.chdir(editable)
    with pytest.raises(BwskError, match=r"^dvc\.yaml: missing; write it: bwsk stages \.$"):
        record(Path(), print)
    stages.write(Path())
    before = contents(editable)
    with pytest.raises(BwskError, match=r"^\.: no DVC repository of its own; run in it: dvc init --subdir"):
        record(Path(), print)
    assert contents(editable) == before


@pytest.mark.parametrize(
    ("path", "edit", "words"),
    [
        ("results/README.md", lambda text: text.replace("BWSK", "Our", 1), "is not the card of results.json; write"),
        ("results/README.md", None, "missing; make it: snakemake --cores 1 --force results/README.md"),
        (
            "results/results.json",
            lambda text: text.replace('"comparable": false', '"comparable": true'),
            "comparable is",
        ),
    ],
    ids=["card edited", "card missing", "results edited"],
)
def test_record_of_what_the_workflow_did_not_write(
    editable: Path, path: str, edit: Callable[[str], str] | None, words: str
) -> None:
    stages.write(editable)
    file = editable / path
    if edit is None:
        file.unlink()
    else:
        text = file.read_text()
        file.write_text(edit(text))
        assert file.read_text() != text
    before = contents(editable)
    with pytest.raises(BwskError, match=re.escape(f"{path}: {words}")) as error:
        record(editable, print)
    assert "\n" not in str(error.value)
    assert contents(editable) == before


def test_a_line_does_not_name_everything() -> None:
    def problem(count: int) -> str | None:
        outs = [f"out{index}" for index in range(count)]
        lock = {f"stage{index}": {"outs": [{"path": out}]} for index, out in enumerate(outs)}
        return versions._problem(lock, {f"stage{i}": {"changed outs": {out: "deleted"}} for i, out in enumerate(outs)})

    assert problem(2) == "missing or changed: out0, out1; make what no remote has: dvc repro stage0 stage1"
    named = ", ".join(f"out{index}" for index in range(SHOWN))
    assert problem(40) == f"missing or changed: {named} and 34 more; make what no remote has: dvc repro"
