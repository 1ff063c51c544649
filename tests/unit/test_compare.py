"""`bwsk compare`: two studies, two files, two git revisions, two revisions that DVC keeps."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bwsk.errors import BwskError
from bwsk.files import read_json, write_json
from bwsk.study.compare import Change, changes, summary
from bwsk.study.sides import load_side


def altered(root: Path, seed: int, loss: float) -> None:
    value = read_json(root / "results/results.json")
    value["parameters"]["seed"] = seed
    value["variants"]["scratch-conventional"]["final_train_loss"] = loss
    write_json(root / "results/results.json", value)


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    names = {"GIT_AUTHOR_NAME": "a", "GIT_COMMITTER_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_EMAIL": "a@b"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**environment, **names})


def bwsk(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "bwsk", *arguments, cwd=cwd)


def test_what_differs_is_listed_and_what_does_not_is_not(study: Path, editable: Path) -> None:
    a = load_side(str(study), Path())
    assert changes(a, load_side(str(study / "results"), Path())) == []
    altered(editable, seed=4, loss=2.0)
    found = changes(a, load_side(str(editable / "results/results.json"), Path()))
    before = a["variants"]["scratch-conventional"]["final_train_loss"]
    assert found == [
        Change("parameters", "seed", 3, 4),
        Change("scratch-conventional", "final_train_loss", before, 2.0),
    ]
    assert found[1].relative == pytest.approx((2.0 - before) / before)


EDITS = {
    "parameters (train.lr_scratch)": lambda v: v["parameters"]["train"].update(lr_scratch=1.0),
    "data (corpus.test)": lambda v: v["corpus"]["splits"]["test"].update(sha256="1" * 64),
    "data (tokens.train)": lambda v: v["tokens"]["splits"]["train"].update(sha256="1" * 64),
    "data (tokenizer)": lambda v: v["tokens"].update(tokenizer_sha256="1" * 64),
    "data (base.sha256)": lambda v: v["base"].update(sha256="1" * 64),
    "source (results)": lambda v: v["provenance"]["identity"].update(source="1" * 64),
    "source (evaluation)": lambda v: v["provenance"].update(evaluation_source="1" * 64),
    "source (training)": lambda v: v["variants"]["scratch-conventional"]["provenance"].update(source="1" * 64),
    "census (strict.s)": lambda v: v["census"]["strict"].update(s=0),
    "weights (scratch-conventional)": lambda v: v["variants"]["scratch-conventional"]["provenance"].update(
        weights_sha256="1" * 64
    ),
    "figures (peak_memory_mb)": lambda v: v["variants"]["scratch-conventional"].update(peak_memory_mb=1.0),
    "verdicts (s-ratio)": lambda v: v["claims"][0].update(verdict="reproduced"),
}


@pytest.mark.parametrize("line", EDITS)
def test_whatever_differs_is_in_the_first_line(study: Path, line: str) -> None:
    a = load_side(str(study), Path())
    b = copy.deepcopy(a)
    EDITS[line](b)
    assert summary(a, b, changes(a, b)) == (False, f"different: {line}")


def test_times_and_machines_do_not_make_studies_differ_but_are_mentioned(study: Path) -> None:
    a = load_side(str(study), Path())
    b = copy.deepcopy(a)
    for figures, factor in zip(b["variants"].values(), (0.53, 0.9, 1, 1, 1.25, 1.1), strict=True):
        figures |= {"step_time_ms": factor * figures["step_time_ms"], "wall_time_s": 2 * figures["wall_time_s"]}
        figures["provenance"] |= {"device": "NVIDIA H100"}
    next(claim for claim in b["claims"] if claim["topic"] == "time")["verdict"] = "exceeded"
    assert summary(a, b, changes(a, b)) == (
        True,
        "equal: the same parameters, data, source and weights; step times differ by −47 % to +25 %; "
        "made in another environment (device)",
    )


def test_what_a_side_does_not_have_is_not_called_equal(study: Path) -> None:
    a = load_side(str(study), Path())
    old = {key: value for key, value in a.items() if key not in ("provenance", "corpus")}
    for figures in old["variants"].values():
        figures["provenance"] = {"weights_sha256": figures["provenance"]["weights_sha256"]}
    assert summary(old, old, []) == (True, "equal: the same parameters and weights")
    bare = {"variants": {"scratch-conventional": {}}}
    assert summary(bare, bare, changes(bare, bare)) == (True, "equal: the same figures")
    assert summary(a, old, changes(a, old))[0] is False


def test_a_variant_that_only_one_side_has_is_compared_with_nothing(study: Path) -> None:
    a = load_side(str(study), Path())
    b = {**a, "variants": {name: figures for name, figures in a["variants"].items() if name != "scratch-conventional"}}
    found = {change.name: change for change in changes(a, b)}
    assert found["best_val_metric"].b is None
    assert found["weights"].relative is None


def test_the_command_prints_a_table(study: Path, editable: Path) -> None:
    same = bwsk("compare", str(study), str(study), cwd=editable)
    assert same.returncode == 0
    assert same.stdout == "equal: the same parameters, data, source and weights\n"
    altered(editable, seed=4, loss=2.0)
    done = bwsk("compare", str(study), ".", cwd=editable)
    assert done.returncode == 0, done.stderr
    first, blank, *_ = done.stdout.splitlines()
    assert (first, blank) == ("different: parameters (seed); figures (final_train_loss)", "")
    for part in ("parameters", "seed", "scratch-conventional", "final_train_loss", "2.0000", " %"):
        assert part in done.stdout


def test_revisions_of_git(editable: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    (repository / "sub").mkdir(parents=True)
    shutil.copytree(editable / "results", repository / "sub/results", ignore=shutil.ignore_patterns("*.safetensors"))
    assert run("git", "init", "-q", ".", cwd=repository).returncode == 0
    for loss in (1.0, 2.0):
        altered(repository / "sub", seed=3, loss=loss)
        run("git", "add", "-A", cwd=repository)
        assert run("git", "commit", "-qm", "results", cwd=repository).returncode == 0
    done = bwsk("compare", "HEAD~1", "HEAD", cwd=repository / "sub")
    assert done.returncode == 0, done.stderr
    assert "+100.00 %" in done.stdout
    assert "seed" not in done.stdout
    with_directory = bwsk("compare", "HEAD~1", "sub", "--study", "sub", cwd=repository)
    assert "+100.00 %" in with_directory.stdout


def test_revisions_that_dvc_keeps(editable: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "results").mkdir()
    dvc = str(Path(sys.executable).with_name("dvc"))
    assert run("git", "init", "-q", ".", cwd=repository).returncode == 0
    assert run(dvc, "init", "-q", cwd=repository).returncode == 0
    for loss in (1.0, 2.0):
        shutil.copyfile(editable / "results/results.json", repository / "results/results.json")
        altered(repository, seed=3, loss=loss)
        added = run(dvc, "add", "-q", "results/results.json", cwd=repository)
        assert added.returncode == 0, added.stderr
        run("git", "add", "-A", cwd=repository)
        assert run("git", "commit", "-qm", "results", cwd=repository).returncode == 0
    done = bwsk("compare", "HEAD~1", "HEAD", cwd=repository)
    assert done.returncode == 0, done.stderr
    assert "+100.00 %" in done.stdout
    shutil.rmtree(repository / ".dvc/cache")
    lost = bwsk("compare", "HEAD~1", "HEAD", cwd=repository)
    assert lost.returncode == 1
    assert lost.stderr.startswith(
        "bwsk: error: HEAD~1: neither git nor DVC has results/results.json there (not recorded, or"
    )
    assert len(lost.stderr.splitlines()) == 1


def test_a_side_that_is_nothing_is_refused(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BwskError, match=r"a directory without results\.json"):
        load_side(str(tmp_path), Path())
    for name in ("", " "):
        with pytest.raises(BwskError, match=f"found '{name}'; name a directory, a results.json or a git revision"):
            load_side(name, study)
    # Whose file it is is not known: no advice to delete it.
    for file in ("params.yaml", "results/scratch-conventional/model.safetensors"):
        with pytest.raises(
            BwskError, match=rf"{file}: not the results\.json of a study \(no JSON object\); name another$"
        ):
            load_side(str(study / file), study)
    with pytest.raises(BwskError, match="in no git repository"):
        load_side("v1.0", tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(BwskError, match="git is not installed to look it up"):
            load_side("v1.0", tmp_path)
    other = tmp_path / "other.json"
    other.write_text('{"a": 1}')
    with pytest.raises(BwskError, match=r"not the results\.json of a study"):
        load_side(str(other), tmp_path)
    run("git", "init", "-q", ".", cwd=tmp_path)
    for name in ("no-such-revision", "--output=x"):
        with pytest.raises(BwskError, match="neither a directory with results nor a git revision"):
            load_side(name, tmp_path)
