"""Versions of a study side by side: DVC's own commands and `bwsk compare`, on two revisions and two directories."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest

from tests.workflow.dvc_study import Checkout

pytestmark = pytest.mark.slow

VARIANTS = [
    f"{init}-{mode}"
    for init in ("finetune", "scratch")
    for mode in ("conventional", "bwsk-analyzed", "bwsk-reversible")
]


@pytest.fixture(scope="module")
def versions(six_variants: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """Two revisions: the second trains from scratch with another learning rate."""
    study = six_variants.copy(tmp_path_factory.mktemp("compare") / "author")
    study.set(train__lr_scratch=1.0e-3)
    study.snakemake("--cores", "2", "--resources", "gpu=0")
    study.bwsk("record")
    study.commit("another learning rate")
    return study


def test_metrics(versions: Checkout) -> None:
    shown = json.loads(versions.dvc("metrics", "show", "--json"))[""]["data"]
    assert sorted(shown) == sorted(f"build/metrics/{name}.json" for name in VARIANTS)
    figures = shown["build/metrics/scratch-conventional.json"]["data"]
    assert {"test_perplexity", "validation_perplexity", "train_loss", "test_bits_per_byte"} <= set(figures)
    results = json.loads((versions.study / "results" / "results.json").read_text())["variants"]
    for name in VARIANTS:
        assert shown[f"build/metrics/{name}.json"]["data"]["test_perplexity"] == pytest.approx(
            results[name]["test_metric"], rel=1e-4
        )
    difference = json.loads(versions.dvc("metrics", "diff", "--json", "HEAD~1", "HEAD"))
    changed = {path for path, values in difference.items() if values.get("test_perplexity", {}).get("diff")}
    assert changed == {f"build/metrics/{name}.json" for name in VARIANTS if name.startswith("scratch")}


def test_params_and_experiments(versions: Checkout) -> None:
    difference = json.loads(versions.dvc("params", "diff", "--json", "HEAD~1", "HEAD"))
    assert list(difference["params.yaml"]) == ["train.lr_scratch"]
    assert difference["params.yaml"]["train.lr_scratch"]["new"] == 1.0e-3
    # The heading, the workspace and two revisions; cells have line breaks of their own.
    rows = list(csv.DictReader(io.StringIO(versions.dvc("exp", "show", "--csv", "--num", "2"))))
    assert [row["train.lr_scratch"] for row in rows[:2]] == ["0.001", "0.001"]
    assert len(rows) == 3
    before, after = (float(rows[i]["build/metrics/scratch-conventional.json:test_perplexity"]) for i in (2, 1))
    assert before != after


def test_plots(versions: Checkout, tmp_path: Path) -> None:
    for command, revisions in (("show", []), ("diff", ["HEAD~1", "HEAD"])):
        out = tmp_path / command
        versions.dvc("plots", command, *revisions)
        versions.dvc("plots", command, "--out", str(out), *revisions)
        page = (out / "index.html").read_text()
        for label in ("Optimizer step", "Training loss (nats per token)", "Validation perplexity"):
            assert label in page
        assert page.count('"labelLimit": 0') == 2  # in both plots, the names are not cut
        for name in VARIANTS:
            for file in ("train.csv", "validation.csv"):
                assert f"{name}/{file}" in page
    # Where DVC writes the page unless told otherwise is git's business neither.
    assert versions.git("status", "--porcelain") == ""
    shown = json.loads(versions.dvc("plots", "show", "--json"))
    assert sorted(shown["data"]) == ["training loss", "validation perplexity"]
    for entries in shown["data"].values():
        points = json.dumps(entries)
        assert all(name in points for name in VARIANTS)


def test_bwsk_compare(versions: Checkout, six_variants: Checkout) -> None:
    by_revision = versions.bwsk("compare", "HEAD~1", "HEAD")
    by_directory = versions.bwsk("compare", str(six_variants.study), str(versions.study))
    for shown in (by_revision, by_directory):
        assert re.search(r"train\.lr_scratch\W+[\d.]+\W+0\.001", shown)
        assert "scratch-bwsk-analyzed" in shown
        assert re.search(r"weights", shown)
        # Their figures are the same; a variant that does not differ has no row.
        assert "finetune-conventional" not in shown
    equal = versions.bwsk("compare", "HEAD", str(versions.study))
    assert equal.startswith("equal: the same parameters, data, source and weights")
    unrecorded = versions.bwsk("compare", "HEAD~2", "HEAD", ok=False)
    assert unrecorded.startswith(
        "bwsk: error: HEAD~2: neither git nor DVC has demo/results/results.json there (not rec"
    )
    assert len(unrecorded.splitlines()) == 1


def test_two_studies_side_by_side(versions: Checkout) -> None:
    """Each study is a DVC repository of its own: the commands in one know nothing of the others."""
    other = Checkout(versions.root)
    folder = versions.root / "mine"
    folder.mkdir()
    (folder / "params.yaml").write_bytes((versions.study / "params.yaml").read_bytes())
    other.run("bwsk", "stages", cwd=folder)
    other.run("dvc", "init", "--quiet", "--subdir", cwd=folder)
    other.run("dvc", "repro", "tokens", cwd=folder)
    stages = other.run("dvc", "stage", "list", "--name-only", cwd=folder).split()
    assert len(stages) == len(versions.dvc("stage", "list", "--name-only").split()) > 15
    assert (folder / "build" / "tokens" / "train.npy").read_bytes() == (
        versions.study / "build" / "tokens" / "train.npy"
    ).read_bytes()
    assert versions.status() == {}
    assert versions.stale_jobs() == set()
    assert "mine" not in versions.dvc("data", "status")
