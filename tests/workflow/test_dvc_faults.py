"""Faults of storage and of people: a clear error, nothing lost, and the command of docs/versioning.md repairs it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.workflow.dvc_study import Checkout
from tests.workflow.remotes import free_port

pytestmark = pytest.mark.slow

VARIANT = "scratch-conventional"
WEIGHTS = f"results/{VARIANT}/model.safetensors"


@pytest.fixture
def author(one_variant: Checkout, tmp_path: Path) -> Checkout:
    """The author's checkout, with a remote of its own beside it."""
    study = one_variant.copy(tmp_path / "author")
    study.dvc("push")
    return study


def object_of(study: Checkout, storage: Path) -> Path:
    """Where a cache or a remote keeps the weights of the variant."""
    md5 = hashlib.md5(study.weights().read_bytes()).hexdigest()
    return storage / "files" / "md5" / md5[:2] / md5[2:]


def list_of_folder(study: Checkout, storage: Path) -> Path:
    """Where a cache or a remote keeps the list of the files of the variant's folder."""
    lock = yaml.safe_load((study.study / "dvc.lock").read_text())["stages"][f"train@{VARIANT}"]
    md5 = next(out["md5"] for out in lock["outs"] if out["path"] == f"results/{VARIANT}")
    return storage / "files" / "md5" / md5[:2] / md5[2:]


def damage(path: Path) -> None:
    """Other bytes of the same length."""
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def test_a_damaged_object_of_the_cache_is_fetched_again(author: Checkout) -> None:
    before = author.sha256()
    cached = object_of(author, author.study / ".dvc" / "cache")
    damage(cached)
    author.weights().unlink()
    shown = author.bwsk("restore")
    assert "removed from the cache, not what its name says: " in shown
    assert f"{cached.parent.name}/{cached.name}" in shown
    assert author.sha256() == before
    assert author.status() == {}
    assert author.stale_jobs() == set()


def test_damaged_weights_that_were_checked_out_are_refused(author: Checkout) -> None:
    damage(object_of(author, author.study / ".dvc" / "cache"))
    before = author.sha256()
    author.weights().unlink()
    author.dvc("checkout")
    for command in ("check", "record"):
        shown = author.bwsk(command, ok=False)
        assert f"results/{VARIANT}: stale, model.safetensors is not the trained file" in shown
    author.weights().unlink()
    author.bwsk("restore")
    assert author.sha256() == before
    assert "checks passed" in author.bwsk("check")


def test_truncated_weights(author: Checkout) -> None:
    before = author.sha256()
    content = author.weights().read_bytes()
    author.weights().write_bytes(content[: len(content) // 2])
    assert f"results/{VARIANT}: stale, model.safetensors is not the trained file" in author.bwsk("check", ok=False)
    shown = author.bwsk("restore", ok=False)
    assert f"missing or changed: results/{VARIANT}" in shown.splitlines()[-1]
    # Nothing that is not in the cache is overwritten: it may have been made on purpose.
    assert author.weights().stat().st_size == len(content) // 2
    author.weights().unlink()
    author.bwsk("restore")
    assert author.sha256() == before


def test_a_card_that_was_edited_by_hand(author: Checkout) -> None:
    before = author.sha256()
    with open(author.study / "results" / "README.md", "a") as card:
        card.write("Best model ever.\n")
    for command in ("check", "record"):
        shown = author.bwsk(command, ok=False)
        assert shown == "bwsk: error: results/README.md: is not the card of results.json; write it again: bwsk card .\n"
    author.bwsk("card")
    author.bwsk("record")
    assert author.sha256() == before
    assert author.status() == {}


def test_a_damaged_object_of_the_remote_is_not_taken(author: Checkout, tmp_path: Path) -> None:
    remote = tmp_path / "bwsk-dvc"
    stored = object_of(author, remote)
    damage(stored)
    clone = author.clone(tmp_path / "clone")
    shown = clone.bwsk("restore", ok=False)
    assert f"results/{VARIANT}" in shown.splitlines()[-1]
    assert not clone.weights().exists()
    # Who has the weights sends them again. DVC believes a folder to be complete whose list is there: that goes as well.
    stored.unlink()
    list_of_folder(author, remote).unlink()
    assert "2 files pushed" in author.dvc("push")
    clone.bwsk("restore")
    assert clone.weights().read_bytes() == author.weights().read_bytes()


def test_missing_objects_are_named_by_variant_and_made_again(author: Checkout, tmp_path: Path) -> None:
    object_of(author, tmp_path / "bwsk-dvc").unlink()
    clone = author.clone(tmp_path / "clone")
    shown = clone.bwsk("restore", ok=False).splitlines()[-1]
    assert f"results/{VARIANT}" in shown
    assert f"make what no remote has: dvc repro train@{VARIANT}" in shown
    # The rest is there and up to date: one training and what depends on it, nothing before it.
    assert clone.stale_jobs() == {f"train {VARIANT}", f"evaluate {VARIANT}", "results", "card", "check"}
    clone.dvc("repro", f"train@{VARIANT}")
    assert clone.weights().read_bytes() == author.weights().read_bytes()


def test_an_unreachable_remote(author: Checkout, tmp_path: Path) -> None:
    author.dvc("remote", "add", "--default", "team", f"ssh://nobody@127.0.0.1:{free_port()}/storage")
    author.commit("remote")
    before = author.sha256()
    assert "ERROR" in author.dvc("push", ok=False)
    assert author.sha256() == before
    assert author.status() == {}
    clone = author.clone(tmp_path / "clone")
    shown = clone.bwsk("restore", ok=False)
    assert "dvc pull failed, see above" in shown.splitlines()[-1]
    # Another place, for this clone alone.
    clone.dvc("remote", "default", "--local", "storage")
    clone.bwsk("restore")
    assert clone.sha256() == before


def test_a_full_disk_during_push(author: Checkout, tmp_path: Path) -> None:
    """A disk with room for half of the weights, mounted for this command alone."""
    storage = tmp_path / "full"
    storage.mkdir()
    author.dvc("remote", "add", "--default", "full", str(storage))
    before = author.sha256()
    mount = f"mount -t tmpfs -o size={author.weights().stat().st_size // 2} tmpfs {storage}"
    in_namespace = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*in_namespace, mount], check=False).returncode:
        pytest.skip("a small disk cannot be mounted here (user namespaces)")
    push = f"{mount} && ! dvc push && find {storage} -type f ! -name '*.tmp' -printf '%s\\n' | sort -n | tail -1"
    shown = author.run(*in_namespace, push)
    assert "No space left on device" in shown
    assert int(shown.splitlines()[-1]) < author.weights().stat().st_size // 2
    assert author.sha256() == before
    assert author.status() == {}
    # With room again the same command goes on.
    author.dvc("push")
    assert object_of(author, storage).read_bytes() == author.weights().read_bytes()
    author.commit("remote")
    clone = author.clone(tmp_path / "clone")
    clone.bwsk("restore")
    assert clone.sha256() == before


def test_a_conflict_in_dvc_lock(author: Checkout) -> None:
    for branch in ("one", "two"):
        author.git("checkout", "--quiet", "-B", branch, "main")
        author.set(study__title=f"Title {branch}")
        author.dvc("repro")
        author.commit(branch)
    shown = author.git("merge", "one", ok=False)
    assert "CONFLICT" in shown
    assert "dvc.lock" in shown
    assert "git checkout --ours dvc.lock" in author.bwsk("restore", ok=False)
    author.git("checkout", "--ours", "demo/dvc.lock", "demo/params.yaml")
    author.commit("merged")
    assert "nothing to do" in author.bwsk("restore")
    assert "Title two" in (author.study / "results" / "README.md").read_text()
    # Nothing of the other side was lost either.
    author.git("checkout", "--quiet", "one")
    author.bwsk("restore")
    assert "Title one" in (author.study / "results" / "README.md").read_text()
