"""A side of a comparison: the results.json that a directory, a file or a git revision stands for.

A side is named by a directory (a study, or a folder with `results.json`), by a `results.json`, or by a git revision; of
a revision, `results.json` is taken from git if git tracks it, else from DVC's cache or remote.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from bwsk.errors import BwskError
from bwsk.files import read_json


def load_side(name: str, study: Path) -> dict[str, Any]:
    """The `results.json` that `name` stands for; `study` is where a revision's is looked for.

    BwskError if `name` is neither a path with results nor a revision that has them.
    """
    if not name.strip():
        raise BwskError(f"compare: found {name!r}; name a directory, a results.json or a git revision")
    path = Path(name)
    for candidate in (path / "results" / "results.json", path / "results.json", path):
        if candidate.is_file():
            return _checked(_of_file(candidate), str(candidate))
    if path.is_dir():
        raise BwskError(f"{name}: a directory without results.json; run its study, or name another")
    return _checked(_of_revision(name, study), name)


def _of_file(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except BwskError:
        # Its advice to delete the file does not apply, because the user may have named any file.
        raise BwskError(f"{path}: not the results.json of a study (no JSON object); name another") from None


def _of_revision(revision: str, study: Path) -> dict[str, Any]:
    top = _git(study, "rev-parse", "--show-toplevel")
    if top is None:
        why = f"{study} is in no git repository" if shutil.which("git") else "git is not installed"
        raise BwskError(f"{revision}: no such file or directory, and {why} to look it up")
    if revision.startswith("-") or _git(study, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}") is None:
        raise BwskError(f"{revision}: neither a directory with results nor a git revision; name one of them")
    path = (study.resolve().relative_to(Path(top).resolve()) / "results" / "results.json").as_posix()
    text = _git(study, "show", f"{revision}:{path}")
    if text is None:
        text = _from_dvc(revision, path, top)
    try:
        value = json.loads(text)
    except ValueError:
        raise BwskError(f"{revision}: its {path} is not JSON; name another revision") from None
    if not isinstance(value, dict):
        raise BwskError(f"{revision}: its {path} is not a JSON object; name another revision")
    return value


def _from_dvc(revision: str, path: str, top: str) -> str:
    try:
        import dvc.api
        import dvc.exceptions
    except ImportError:
        raise BwskError(f"{revision}: git has no {path} there, and DVC is not installed to ask") from None
    try:
        return dvc.api.read(path, repo=top, rev=revision)
    except dvc.exceptions.PathMissingError:  # not recorded or not in the cache: DVC says the same
        reason = "not recorded, or not in the cache"
    except Exception as error:  # DVC raises many kinds: no DVC repository, remote unreachable
        reason = " ".join(str(error).split())[:160] or type(error).__name__
    raise BwskError(
        f"{revision}: neither git nor DVC has {path} there ({reason}); name another, or: dvc fetch --all-commits"
    )


def _git(directory: Path, *arguments: str) -> str | None:
    """Output of a git command, None if it fails."""
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _checked(value: dict[str, Any], name: str) -> dict[str, Any]:
    variants = value.get("variants")
    if not isinstance(variants, dict) or not all(isinstance(variant, dict) for variant in variants.values()):
        raise BwskError(f"{name}: not the results.json of a study (no variants); name another")
    return value
