"""What reruns when: each row of the table in docs/versioning.md, asked of both engines, and some really run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.workflow.dvc_study import Checkout

pytestmark = pytest.mark.slow

MODES = ("conventional", "bwsk-analyzed", "bwsk-reversible")
SCRATCH = [f"scratch-{mode}" for mode in MODES]
ALL = [f"{init}-{mode}" for init in ("finetune", "scratch") for mode in MODES]
ANALYZED = [f"{init}-bwsk-analyzed" for init in ("finetune", "scratch")]
REVERSIBLE = [f"{init}-bwsk-reversible" for init in ("finetune", "scratch")]
PUBLISH = ("results", "card", "check")
CODE = "\nEDITED = True\n"


def retrained(variants: list[str], *steps: str) -> set[str]:
    """The steps given, training and evaluation of the variants, and what is published of them."""
    return {*steps, *(f"{step} {name}" for step in ("train", "evaluate") for name in variants), *PUBLISH}


def edit(path: Path, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


def package(study: Checkout) -> Path:
    return study.root / "bwsk"


def touch_everything(study: Checkout) -> None:
    for root in ("bwsk", "workflow", "demo/build/tokens", "demo/build/base", "demo/results"):
        for path in (study.root / root).rglob("*"):
            if path.is_file():
                os.utime(path)


def comment_in_rule(study: Checkout) -> None:
    edit(study.root / "workflow" / "rules" / "train.smk", "\n# a comment\n")


def other_command_in_rule(study: Checkout) -> None:
    rules = study.root / "workflow" / "rules" / "train.smk"
    text = rules.read_text()
    changed = text.replace('"bwsk train {wildcards.variant}', '"bwsk train  {wildcards.variant}')
    assert changed != text
    rules.write_text(changed)


FROM_BASE = ("base", "classify", "trace", *(f"memory-{mode}" for mode in MODES))
# What is changed, what DVC makes anew, what Snakemake makes anew (None: the same).
ROWS: dict[str, tuple[Callable[[Checkout], None], set[str], set[str] | None]] = {
    "nothing": (lambda study: None, set(), None),
    "lr_scratch": (lambda study: study.set(train__lr_scratch=1.0e-3), retrained(SCRATCH), None),
    "stride": (lambda study: study.set(tokens__stride=16), retrained(ALL, "tokens", *FROM_BASE), None),
    "seed": (lambda study: study.set(seed=7), retrained(ALL, *FROM_BASE), None),
    "evaluate": (lambda study: study.set(evaluate__max_windows=6), retrained(ALL), None),
    "title": (lambda study: study.set(study__title="Another"), set(PUBLISH), None),
    "budget": (
        lambda study: study.set(train__budget=0.95),
        retrained(REVERSIBLE, "memory-bwsk-reversible"),
        None,
    ),
    "comment": (lambda study: edit(package(study) / "study" / "train.py", "\n# edited\n"), set(), None),
    "train.py": (lambda study: edit(package(study) / "study" / "train.py", CODE), retrained(ALL), None),
    "reversible": (
        lambda study: edit(package(study) / "reversible" / "dropout.py", CODE),
        retrained(REVERSIBLE, "memory-bwsk-reversible"),
        None,
    ),
    "erasure": (
        lambda study: edit(package(study) / "classification" / "erasure.py", CODE),
        retrained(ANALYZED),
        None,
    ),
    "card.py": (lambda study: edit(package(study) / "study" / "card.py", CODE), {"card", "check"}, None),
    "template": (
        lambda study: edit(study.root / "workflow" / "templates" / "model_card.md.j2", "\nMore.\n"),
        {"card", "check"},
        None,
    ),
    "comment in a rule": (comment_in_rule, set(), None),
    "command of a rule": (other_command_in_rule, set(), retrained(ALL)),
    "touch": (touch_everything, set(), None),
}


@pytest.fixture(scope="module")
def changed(six_variants: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return six_variants.copy(tmp_path_factory.mktemp("reruns") / "author")


@pytest.fixture
def study(changed: Checkout) -> Iterator[Checkout]:
    """A study to change the sources and parameters of, without running it; put back afterwards."""
    yield changed
    changed.git("checkout", "--", ".")
    changed.dvc("checkout", "source")


@pytest.mark.parametrize("row", ROWS)
def test_what_reruns_when(study: Checkout, row: str) -> None:
    change, by_dvc, by_snakemake = ROWS[row]
    change(study)
    study.dvc("repro", "source")  # what `dvc repro` does first; it runs if the package has changed
    assert {stage.replace("@", " ") for stage in study.stale_stages()} == by_dvc
    assert study.stale_jobs() == (by_dvc if by_snakemake is None else by_snakemake)


def test_repro_of_one_variant_trains_it_alone(six_variants: Checkout, tmp_path: Path) -> None:
    study = six_variants.copy(tmp_path / "author")
    before = study.sha256()
    study.set(train__lr_scratch=1.0e-3)
    study.dvc("repro", "train@scratch-bwsk-reversible")
    after = study.sha256()
    different = {path.split("/")[1] for path in before if path.startswith("results/") and before[path] != after[path]}
    assert different == {"scratch-bwsk-reversible"}
    assert "train@scratch-bwsk-reversible" not in study.stale_stages()
    assert "train@scratch-conventional" in study.stale_stages()
    # Results are not collected of variants that do not belong together.
    assert "scratch-conventional: stale, train.lr_scratch was" in study.bwsk("results", ok=False)


def test_snakemake_runs_directly_and_dvc_takes_it_over(six_variants: Checkout, tmp_path: Path) -> None:
    study = six_variants.copy(tmp_path / "author")
    before = study.sha256()
    study.set(train__lr_scratch=1.0e-3)
    assert "stale" in study.bwsk("record", ok=False)
    study.snakemake("--cores", "2", "--resources", "gpu=0")
    shown = study.bwsk("record")
    assert "recorded" in shown
    assert "Running stage" not in shown
    assert study.status() == {}
    assert study.stale_jobs() == set()
    after = study.sha256()
    weights = {name: f"results/{name}/model.safetensors" for name in ALL}
    assert {name for name, path in weights.items() if before[path] != after[path]} == set(SCRATCH)
    # Nothing of what is as before is sent again. The three modes of an init have the same weights: one object.
    study.commit()
    remote = study.root.parent / "bwsk-dvc"
    study.dvc("push", "--remote", "storage")
    objects = {path.relative_to(remote): path.stat().st_size for path in remote.rglob("*") if path.is_file()}
    assert "up to date" in study.dvc("push")
    # The base checkpoint is one more of that size.
    distinct = {after[path] for path in [*weights.values(), "build/base/model.safetensors"]}
    assert len(distinct) == 3
    assert list(objects.values()).count(study.weights().stat().st_size) == len(distinct)


def test_another_budget_trains_the_reversible_variants_alone(six_variants: Checkout, tmp_path: Path) -> None:
    """Really run: DVC trains them again because their memory prediction, which names the budget, has other bytes."""
    study = six_variants.copy(tmp_path / "author")
    before = study.sha256()
    study.set(train__budget="900GiB")
    shown = study.dvc("repro")
    ran = set(re.findall(r"Running stage '(\S+)'", shown))
    stages = {f"{step}@{name}" for step in ("train", "evaluate") for name in REVERSIBLE}
    assert ran == {"memory-bwsk-reversible", *stages, *PUBLISH}
    after = study.sha256()
    weights = [f"results/{name}/model.safetensors" for name in ALL]
    assert [after[path] for path in weights] == [before[path] for path in weights]
    assert study.status() == {}
    assert study.stale_jobs() == set()
    assert "checks passed" in study.bwsk("check")


def test_a_change_of_the_engine_trains_the_reversible_variants_alone(six_variants: Checkout, tmp_path: Path) -> None:
    """Really run, after a comment elsewhere, which only makes the digests again."""
    study = six_variants.copy(tmp_path / "author")
    before = study.sha256()
    edit(package(study) / "study" / "train.py", "\n# a remark\n")
    assert set(study.status()) == {"source"}
    shown = study.dvc("repro")
    assert re.findall(r"Running stage '(\S+)'", shown) == ["source"]
    assert study.status() == {}
    assert study.stale_jobs() == set()
    edit(package(study) / "reversible" / "dropout.py", CODE)
    shown = study.dvc("repro")
    ran = set(re.findall(r"Running stage '(\S+)'", shown))
    stages = {f"{step}@{name}" for step in ("train", "evaluate") for name in REVERSIBLE}
    assert ran == {"source", "memory-bwsk-reversible", *stages, *PUBLISH}
    after = study.sha256()
    weights = [f"results/{name}/model.safetensors" for name in ALL]
    assert [after[path] for path in weights] == [before[path] for path in weights]
    assert study.status() == {}
    assert study.stale_jobs() == set()
    assert "checks passed" in study.bwsk("check")


def test_an_edit_of_the_template_rebuilds_the_card_alone(six_variants: Checkout, tmp_path: Path) -> None:
    study = six_variants.copy(tmp_path / "author")
    times = {path: path.stat().st_mtime_ns for path in (study.study / "results").glob("*-*/*")}
    assert len(times) == 36
    edit(study.root / "workflow" / "templates" / "model_card.md.j2", "\nOne more paragraph.\n")
    shown = study.dvc("repro")
    assert "Running stage 'card'" in shown
    assert shown.count("Running stage") == 2
    assert "One more paragraph." in (study.study / "results" / "README.md").read_text()
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert study.stale_jobs() == set()
