"""Push, clone and pull through a folder, through ssh and through WebDAV: the same bytes, and each object sent once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.workflow import remotes
from tests.workflow.dvc_study import Checkout

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["local", "ssh", "webdav"])
def test_push_clone_restore(one_variant: Checkout, tmp_path: Path, kind: str) -> None:
    author = one_variant.copy(tmp_path / "author")
    with getattr(remotes, kind)(tmp_path / kind) as remote:
        author.dvc("remote", "add", "--default", "team", remote.url)
        for name, value in remote.settings.items():
            author.dvc("remote", "modify", "team", name, value)
        author.commit("remote")
        first = author.dvc("push")
        objects = remote.objects()
        assert pushed(first) == len(objects) > 20
        # Content-addressed: what is there already is not sent again.
        assert "up to date" in author.dvc("push")
        # Only what changed.
        author.set(study__title="Another title")
        author.dvc("repro", "card")
        author.commit("another title")
        second = author.dvc("push", "card", "results")
        added = {name: size for name, size in remote.objects().items() if name not in objects}
        assert pushed(second) == len(added) > 0
        assert author.weights().stat().st_size > max(added.values())
        clone = author.clone(tmp_path / "clone")
        shown = clone.bwsk("restore", ok=False)
        # `check` was not run again for the new title, and restore says so.
        assert re.search(r"check", shown.splitlines()[-1])
        assert {path: value for path, value in clone.sha256().items() if path in author.sha256()} == author.sha256()


def pushed(shown: str) -> int:
    found = re.search(r"(\d+) files? pushed", shown)
    assert found, shown
    return int(found[1])
