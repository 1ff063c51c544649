"""The tested range of versions: one source each, and what is outside of it is told."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import bwsk
from bwsk.study import tested_versions as tested
from bwsk.study.doctor import Finding, examine, runs

ROOT = Path(__file__).parents[2]


def lock() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_the_floors_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["study"]]
    expected = dict(line.split(">=") for line in asked)
    expected["Python"] = project["requires-python"].removeprefix(">=")
    assert tested.floors() == {name: expected[name] for name in tested.NEWEST}


def test_the_readme_names_floor_pin_and_newest() -> None:
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", (ROOT / "README.md").read_text(), re.M)
    lowest, pinned = tested.floors(), lock()
    assert [row[0] for row in rows] == list(tested.NEWEST)
    for name, floor, pin, newest in rows:
        assert (floor, newest) == (lowest[name], tested.NEWEST[name])
        assert name == "Python" or pin == pinned[name]
        assert tested._release(floor) <= tested._release(pin) <= tested._release(newest)


@pytest.mark.parametrize(
    ("name", "version", "words"),
    [
        ("torch", "2.10.1+cu128", "older than the floor 2.11"),
        ("torch", "2.11.0", None),
        ("torch", "3.0.0.dev20270101", "newer than the tested {}"),
        ("Python", "3.10.9", "older than the floor 3.11"),
        ("Python", "3.99.0rc1", "newer than the tested {}"),
        ("huggingface_hub", "1.32.0", "older than the floor 1.33"),
        ("dvc", "3.1000.0", "newer than the tested {}"),
    ],
)
def test_what_is_outside_is_told(name: str, version: str, words: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tested, "installed", lambda: {name: version})
    expected = [(name, f"{version}, {words.format(tested.NEWEST[name])}")] if words else []
    assert [line[:2] for line in tested.outside()] == expected


def test_the_doctor_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tested, "installed", lambda: {"torch": "2.10.0"})
    found = Finding("torch", "warn", "2.10.0, older than the floor 2.11", "install torch 2.11 or newer")
    findings = examine(None)
    assert found in findings
    assert runs(findings)


def test_an_installed_package_knows_its_floors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bwsk, "__file__", str(tmp_path / "bwsk" / "__init__.py"))
    assert tested.floors().keys() == tested.NEWEST.keys()


def test_a_version_with_nothing_after_the_newest_is_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tested, "installed", lambda: {name: f"{newest}.99" for name, newest in tested.NEWEST.items()})
    assert list(tested.outside()) == []
