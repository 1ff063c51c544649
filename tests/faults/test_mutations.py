"""The suite's own check: with a safeguard taken out of a copy of the package, the kills must be noticed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults.conftest import Cases
from tests.faults.harness import PROJECT, Server, killed_then_same
from tests.faults.test_kills import OUTPUTS, killed_inside
from tests.faults.test_kills import test_a_damaged_checkpoint_is_reported_and_costs_nothing_but_time as damaged

pytestmark = pytest.mark.faults

# What is taken out: file, text, what stands there instead.
MUTATIONS = {
    "checksum": (
        "study/checkpoint.py",
        "if not file.is_file() or sha256_file(file) != sha256:",
        "if not file.is_file():",
    ),
    "atomic rename of a checkpoint": (
        "study/checkpoint.py",
        "new = partial / target.name\n                new.mkdir()",
        "new = target\n                new.mkdir(exist_ok=True)",
    ),
    "atomic rename of outputs": (
        "files.py",
        "            yield partial\n            written",
        "            yield path\n            written",
    ),
    "random state": ("study/checkpoint.py", '    torch.set_rng_state(states["cpu"])\n', ""),
    "optimizer state": ("study/train.py", 'restore_optimizer(self.optimizer, tensors["optimizer"])', "pass"),
    "best model": ("study/train.py", 'self.best = tensors.get("best")', "self.best = dict(tensors['model'])"),
    "abandoned partial folders": (
        "files.py",
        "            shutil.rmtree(folder, ignore_errors=True)\n",
        "            pass\n",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_without_it_the_suite_fails(cases: Cases, tmp_path: Path, name: str) -> None:
    file, text, instead = MUTATIONS[name]
    for part in ("bwsk", "workflow"):
        shutil.copytree(PROJECT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    source = (tmp_path / "bwsk" / file).read_text()
    assert source.count(text) == 1, f"{file} no longer has the text of this mutation"
    mutated = source.replace(text, instead)
    if name == "atomic rename of a checkpoint":
        mutated = mutated.replace("os.rename(new, target)", "pass").replace("if target.exists():", "if False:")
    (tmp_path / "bwsk" / file).write_text(mutated)
    with Server(tmp_path) as server:
        mutant = Cases.__new__(Cases)
        mutant.__dict__.update(
            cases.__dict__, server=server, root=tmp_path / "runs", number=0, sizes={}, _references={}
        )
        with pytest.raises(AssertionError):
            core_check(mutant)


def core_check(cases: Cases) -> None:
    """The heart of the suite in a few runs: damage, and kills in steps, within an output's write and between writes."""
    damaged(cases)
    name = "scratch-conventional"
    reference, counts, _ = cases.reference(name)
    for at, file in OUTPUTS:
        killed_inside(cases, name, at, file)
    for share in (0.45, 0.62, 0.7):
        kill = {"events": "calls", "at": int(counts["calls"] * share)}
        killed_then_same(cases.server, cases.training(name), reference, kill=kill)
    for at in range(3, counts["files"], max(counts["files"] // 24, 1)):
        killed_then_same(cases.server, cases.training(name), reference, kill={"events": "files", "at": at})
    # A run whose best model is not its last: only there does it matter which one a checkpoint brings back.
    name = "stops early"
    reference, counts, _ = cases.reference(name)
    for share in (0.6, 0.75, 0.9):
        kill = {"events": "calls", "at": int(counts["calls"] * share)}
        killed_then_same(cases.server, cases.training(name), reference, kill=kill)


def test_the_core_check_passes_without_a_mutation(cases: Cases) -> None:
    core_check(cases)
