"""Fixtures of the fault tests: one tiny study, one fork server, and an undisturbed run of each training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Server, Training
from tests.tiny import make_inputs, write_params
from tests.unit.study_fixture import editable, study

__all__ = ["editable", "study"]

# What is trained, with its changes of the tiny study's `train`: six variants, and one that stops early.
CASES: dict[str, tuple[str, dict]] = {
    **{
        f"{init}-{mode}": (f"{init}-{mode}", {})
        for init in ("finetune", "scratch")
        for mode in ("conventional", "bwsk-analyzed", "bwsk-reversible")
    },
    "stops early": (
        "scratch-conventional",
        {"lr_scratch": 0.5, "warmup": 0.0, "max_steps": 40, "eval_every": 2, "patience": 3},
    ),
}


class Cases:
    """The trainings of `CASES`, each with the bytes of an undisturbed run and the number of its events."""

    def __init__(self, root: Path, server: Server) -> None:
        self.root, self.server = root, server
        self.study = root / "study"
        make_inputs(self.study)
        self.number = 0
        self.sizes: dict[str, dict[str, int]] = {}  # bytes of the files of the undisturbed runs
        self._references: dict[str, tuple[dict[str, str], dict[str, int], float]] = {}

    def training(self, name: str, root: Path | None = None) -> Training:
        """A new, empty place for the training."""
        self.number += 1
        variant, changes = CASES[name]
        folder = self.root / "params" / name.replace(" ", "-")
        if not folder.exists():
            folder.mkdir(parents=True)
            write_params(folder, **changes)
        return Training(self.study, folder / "params.yaml", variant, (root or self.root / "cases") / str(self.number))

    def reference(self, name: str) -> tuple[dict[str, str], dict[str, int], float]:
        """Hashes of the undisturbed run's files, its number of calls and of file operations, its seconds."""
        if name not in self._references:
            counts, files = {}, []
            for events in ("calls", "files"):
                training = self.training(name)
                counts[events] = training.run(self.server, kill={"events": events, "at": 0})["count"]
                files.append(training.files())
            results = json.loads((training.case / "out" / "training_results.json").read_text())
            assert files[0] == files[1]
            assert len(files[0]) == 8
            self.sizes[name] = {file: (training.case / file).stat().st_size for file in files[0]}
            self._references[name] = files[0], counts, results["wall_time_s"] + 0.5
        return self._references[name]


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Cases:
    return Cases(tmp_path_factory.mktemp("faults"), server)
