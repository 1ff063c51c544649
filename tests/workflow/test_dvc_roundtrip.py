"""From `dvc repro` over push, clone and pull to a study in which neither engine finds anything to do."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.workflow.dvc_study import Checkout

VARIANT = "scratch-conventional"


def test_after_repro_both_engines_have_nothing_to_do(one_variant: Checkout) -> None:
    assert one_variant.status() == {}
    assert one_variant.stale_stages() == set()
    assert one_variant.stale_jobs() == set()
    assert one_variant.git("status", "--porcelain") == ""


def test_a_clone_has_the_same_bytes_and_nothing_to_do(one_variant: Checkout, tmp_path: Path) -> None:
    # Beside the author's checkout: the default remote is found without any setting.
    clone = one_variant.clone(one_variant.root.parent / "clone")
    shown = clone.bwsk("restore")
    assert "snakemake and dvc repro have nothing to do" in shown
    assert clone.sha256() == one_variant.sha256()
    assert clone.status() == {}
    assert clone.stale_stages() == set()
    assert clone.stale_jobs() == set()
    assert clone.git("status", "--porcelain") == ""
    assert "checks passed" in clone.bwsk("check")
    # Restored means known: a change is still noticed by both.
    clone.set(train__lr_scratch=2.0e-3)
    assert f"train {VARIANT}" in clone.stale_jobs()
    assert f"train@{VARIANT}" in clone.stale_stages()
    clone.git("checkout", "--", ".")
    # A remark in the package is no other code, a constant is.
    card = clone.root / "bwsk" / "study" / "card.py"
    card.write_text(f"{card.read_text()}\n# a remark\n")
    assert "have nothing to do" in clone.bwsk("restore")
    card.write_text(f"{card.read_text()}EDITED = True\n")
    shown = clone.bwsk("restore", ok=False)
    assert "recorded with other parameters or source: card, check; make them anew: dvc repro" in shown


def test_a_pull_alone_would_make_everything_again(one_variant: Checkout, tmp_path: Path) -> None:
    """Why `bwsk restore` is there. If this fails, Snakemake compares contents after a pull and it can go."""
    clone = one_variant.clone(one_variant.root.parent / "pulled")
    clone.dvc("pull")
    assert clone.status() == {}
    # DVC writes files in an order that depends on the machine; here the tokens come after the weights.
    later = clone.weights(VARIANT).stat().st_mtime + 10
    for tokens in (clone.study / "build" / "tokens").iterdir():
        os.utime(tokens, (later, later))
    assert f"train {VARIANT}" in clone.stale_jobs()


def test_outputs_are_plain_files(one_variant: Checkout) -> None:
    """Neither links into the cache nor read-only: an edit of a result must not reach into the cache."""
    for file in (one_variant.study / "results").rglob("*"):
        if file.is_file():
            assert not file.is_symlink()
            assert file.stat().st_nlink == 1
            assert file.stat().st_mode & 0o200


def test_make_reproduce_looks_at_the_machine_first(one_variant: Checkout) -> None:
    """Offline, the published study cannot get its corpus: it stops before anything is run, and says why."""
    venv = Path(sys.executable).parent.parent
    # The environment is there: make must not install it again.
    make = ["make", "reproduce", f"VENV={venv}", "--old-file", str(venv / ".installed")]
    shown = one_variant.run(*make, ok=False, cwd=one_variant.root)
    assert "fail" in shown
    assert "Hub" in shown
    assert "Running stage" not in shown
    assert not (one_variant.root / "build" / "corpus").exists()
