"""Experiments of DVC have the weights of their own parameters: in the workspace, in a copy, and from the queue.

The copies lack Snakemake's records; trusting modification times there, it would keep the weights of another seed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workflow.dvc_study import Checkout

pytestmark = pytest.mark.slow

VARIANT = "scratch-conventional"
TRAIN = f"train@{VARIANT}"


@pytest.fixture(scope="module")
def experiments(one_variant: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return one_variant.copy(tmp_path_factory.mktemp("experiments") / "author")


@pytest.fixture(scope="module")
def in_workspace(experiments: Checkout) -> bytes:
    """The weights of seed 7, from an experiment in the workspace that ran to the end; the workspace is put back."""
    experiments.dvc("exp", "run", "--name", "workspace-7", "--set-param", "seed=7")
    assert experiments.seed_of() == 7
    assert experiments.status() == {}
    assert "checks passed" in experiments.bwsk("check")
    weights = experiments.weights().read_bytes()
    experiments.git("checkout", "--", ".")
    experiments.bwsk("restore")
    return weights


def test_workspace(one_variant: Checkout, experiments: Checkout, in_workspace: bytes) -> None:
    assert in_workspace != one_variant.weights().read_bytes()
    # Restored: the study of seed 0 again, and neither engine wants to run it.
    assert experiments.weights().read_bytes() == one_variant.weights().read_bytes()
    assert experiments.stale_jobs() == set()


@pytest.mark.parametrize("how", ["temp", "queue"])
def test_elsewhere(one_variant: Checkout, experiments: Checkout, in_workspace: bytes, how: str) -> None:
    name = f"{how}-7"
    experiments.dvc("exp", "run", f"--{how}", "--name", name, "--set-param", "seed=7", TRAIN)
    if how == "queue":
        experiments.dvc("exp", "run", "--run-all")
    # The workspace was not touched.
    assert experiments.weights().read_bytes() == one_variant.weights().read_bytes()
    experiments.dvc("exp", "apply", name)
    assert experiments.seed_of() == 7
    assert experiments.weights().read_bytes() == in_workspace
    experiments.git("checkout", "--", ".")
    experiments.bwsk("restore")


def test_an_experiment_runs_the_source_that_it_records(experiments: Checkout) -> None:
    """Queued with one source, started when the workspace has another: the queued one counts."""
    source = experiments.root / "bwsk" / "study" / "train.py"
    text = source.read_text()
    source.write_text(text.replace("self.state = TrainState()", "self.state = TrainState(nan_count=41)"))
    assert source.read_text() != text
    experiments.dvc("exp", "run", "--queue", "--name", "edited", TRAIN)
    source.write_text(text)
    experiments.dvc("exp", "run", "--run-all")
    experiments.dvc("exp", "apply", "edited")
    assert '"nan_count": 41' in (experiments.study / "results" / VARIANT / "training_results.json").read_text()
    experiments.git("checkout", "--", ".")
    experiments.bwsk("restore")


def test_a_recorded_change_of_the_seed_alone_is_refused(experiments: Checkout, tmp_path: Path) -> None:
    """`dvc commit` believes what it is told; the steps that publish do not."""
    study = experiments.copy(tmp_path / "author")
    study.set(seed=7)
    for command in ("record", "results", "card", "check"):
        shown = study.bwsk(command, ok=False)
        assert "seed was 0, is 7" in shown, command
        assert shown.count("\n") == 1
    # And still after DVC has taken the old files for the new seed's.
    study.dvc("commit", "--force")
    assert "seed was 0, is 7" in study.bwsk("check", ok=False)
