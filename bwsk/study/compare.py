"""Compare two results of a study: two directories, or two revisions of the repository that versions it.

A side is named by a directory (a study, or a folder with `results.json`), by a `results.json`, or by a git revision; of
a revision, `results.json` is taken from git if git tracks it, else from DVC's cache or remote.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bwsk.errors import BwskError
from bwsk.files import read_json

# Figures of a variant that are compared, with the decimals they are shown with.
DECIMALS = {
    "final_train_loss": 4,
    "best_val_metric": 3,
    "test_metric": 3,
    "total_steps": 0,
    "wall_time_s": 1,
    "step_time_ms": 2,
    "peak_memory_mb": 1,
    "predicted_peak_memory_mb": 1,
}


@dataclass(frozen=True)
class Change:
    """One parameter, figure or verdict that is not the same on both sides; a side that lacks it has None."""

    group: str
    name: str
    a: Any
    b: Any

    @property
    def relative(self) -> float | None:
        """(b - a) / a for two numbers, else None."""
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (self.a, self.b))
        return (self.b - self.a) / abs(self.a) if numbers and self.a else None


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


def changes(a: dict[str, Any], b: dict[str, Any]) -> list[Change]:
    """What differs: parameters, then census and corpus, each variant's figures, memory savings, verdicts, weights."""
    found = [
        *_compared("parameters", _flat(a.get("parameters", {})), _flat(b.get("parameters", {}))),
        *_compared("census", a.get("census", {}), b.get("census", {})),
        *_compared("base", a.get("base", {}), b.get("base", {})),
    ]
    for variant in {**a["variants"], **b["variants"]}:
        sides = [_figures(results["variants"].get(variant)) for results in (a, b)]
        found += _compared(variant, *sides)
    found += _compared("memory_saving", _flat(a.get("memory_saving", {})), _flat(b.get("memory_saving", {})))
    verdicts = [{claim["id"]: claim["verdict"] for claim in results.get("claims", [])} for results in (a, b)]
    return found + _compared("claims", *verdicts)


def _figures(variant: dict[str, Any] | None) -> dict[str, Any]:
    if variant is None:
        return {}
    sha256 = variant.get("provenance", {}).get("weights_sha256")
    return {**{key: variant.get(key) for key in DECIMALS}, "weights": sha256 and sha256[:12]}


def _compared(group: str, a: dict[str, Any], b: dict[str, Any]) -> list[Change]:
    return [Change(group, key, a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf
        for name, part in value.items()
        for key, leaf in _flat(part, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _of_file(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except BwskError:
        # Not its advice, to delete the file and run again: here any file may have been named.
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
