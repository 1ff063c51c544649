"""Hand a study over between DVC, which compares contents, and Snakemake, which compares modification times.

`restore`: files that DVC checks out get new modification times, so Snakemake would rerun everything. So the files are
pulled, compared with `dvc.lock`, and then marked as up to date for Snakemake. `record`: DVC records what Snakemake
made, without running anything. This requires that everything belongs to the current parameters and source (else one
seed's weights could be recorded as another's), and that results.json and the card agree with the files (else a manual
edit could be recorded as an output).
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from bwsk.errors import BwskError
from bwsk.study.dvc_stages import SNAKEFILE, SOURCE
from bwsk.study.params import load_params
from bwsk.study.provenance import write_digests

Say = Callable[[str], None]
SHOWN = 6  # names that a message lists


def restore(study: Path, say: Say) -> None:
    """Pull the study's outputs and mark them as up to date for Snakemake.

    BwskError names what is missing or was recorded with other parameters or source; everything else is restored.
    """
    lock = _lock(study)
    load_params(study / "params.yaml")
    _require_dvc(study)
    for path in drop_corrupt(study, lock):
        say(f"removed from the cache, not what its name says: {path}")
    pulled = _run(study, ["dvc", "pull"])
    if pulled.returncode:  # then not even the files that it fetched are checked out
        _run(study, ["dvc", "checkout", "--allow-missing"], capture=True)
    changes = _changes(study)
    if changes.pop("source", None):  # files of the package changed; the digests show whether its code did
        write_digests(study / SOURCE)
        changes = {stage: change for stage, change in _changes(study).items() if stage != "source"}
    current = [stage["cmd"].split()[-1] for name, stage in lock.items() if name not in changes]
    if current:
        touch = ["snakemake", "--snakefile", os.path.relpath(SNAKEFILE, study), "--cores", "1", "--touch", "--forceall"]
        done = _run(study, [*touch, "--quiet", "all", "--", *current], capture=True)
        if done.returncode:
            raise BwskError(f"{study}: snakemake --touch failed: {_last_line(done)}")
    if problem := _problem(lock, changes):
        failed = "; dvc pull failed, see above" if pulled.returncode else ""
        raise BwskError(f"{study}: {problem}{failed}")
    say(f"{study}: all {len(lock)} stages are as recorded; snakemake and dvc repro have nothing to do")


def record(study: Path, say: Say) -> None:
    """Record in `dvc.lock` and DVC's cache what Snakemake made; BwskError if it is incomplete, stale or edited."""
    from bwsk.study.check import documents
    from bwsk.study.dvc_stages import check
    from bwsk.study.results import gather

    check(study)
    params = load_params(study / "params.yaml")
    documents(params, study, gather(params, study))
    _require_dvc(study)
    write_digests(study / SOURCE)
    if _run(study, ["dvc", "commit", "--force"]).returncode:
        raise BwskError(f"{study}: dvc commit failed, see above; run snakemake until nothing is to be done, then again")
    say(f"{study}: recorded; keep it with: git add {study / 'dvc.lock'}, git commit, dvc push")


def drop_corrupt(study: Path, lock: dict[str, Any]) -> list[Path]:
    """Delete the cache objects of `lock` whose content does not match their name, so that a pull fetches them again."""
    root = study / (_output(study, ["dvc", "cache", "dir"]) or ".dvc/cache") / "files" / "md5"
    corrupt = []
    waiting = [out["md5"] for stage in lock.values() for out in stage.get("outs", [])]
    while waiting:
        name = waiting.pop()
        path = root / name[:2] / name[2:]
        if not path.is_file():
            continue
        with open(path, "rb") as file:
            sound = hashlib.file_digest(file, "md5").hexdigest() == name.removesuffix(".dir")
        if not sound:
            path.unlink()
            corrupt.append(path)
        elif name.endswith(".dir"):
            waiting += [entry["md5"] for entry in json.loads(path.read_bytes())]
    return sorted(corrupt)


def _require_dvc(study: Path) -> None:
    """BwskError unless the study is its own DVC repository; in a parent's, DVC would process everything there."""
    if not (study / ".dvc").is_dir():
        raise BwskError(
            f"{study}: no DVC repository of its own; run in it: dvc init --subdir (without git: dvc init --no-scm)"
        )
    if not (study / "dvc.yaml").is_file():  # without it DVC finds nothing to do and reports 'up to date'
        raise BwskError(f"{study / 'dvc.yaml'}: missing; take it from git, or write it: bwsk stages {study}")


def _lock(study: Path) -> dict[str, Any]:
    """Stage -> its record in `dvc.lock`."""
    path = study / "dvc.lock"
    if not path.is_file():
        load_params(study / "params.yaml")  # if there is no study at all, report that instead
        raise BwskError(f"{path}: missing, nothing was recorded of this study yet; run it: dvc repro")
    try:
        stages = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]
        if all({"cmd", "deps"} <= set(stage) for stage in stages.values()):
            return stages
    except (OSError, ValueError, yaml.YAMLError, AttributeError, KeyError, TypeError):
        pass
    raise BwskError(f"{path}: cannot be read (a merge conflict?); take one side (git checkout --ours dvc.lock)")


def _changes(study: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Stage -> {"changed outs": {path: how}, "changed deps": …} of the stages that are not as recorded."""
    text = _output(study, ["dvc", "status", "--json"])
    if text is None:
        raise BwskError(f"{study}: dvc status failed, see above")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for stage, entries in json.loads(text).items():
        found[stage] = {}
        for entry in entries:
            # An entry is a mapping, or a text such as "changed command".
            found[stage].update(entry if isinstance(entry, dict) else {entry: {}})
    return found


def _problem(lock: dict[str, Any], changes: dict[str, dict[str, dict[str, Any]]]) -> str | None:
    """What differs from the record, as one line with the command that makes it; None if nothing does."""
    missing, other = [], []
    outs = {out["path"] for stage in lock.values() for out in stage.get("outs", [])} - {SOURCE}
    for stage, change in changes.items():
        if "changed outs" in change:
            missing.append(stage)
        elif stage not in lock or any(
            not _within(path, outs) for path in change.get("changed deps", {"changed command": None})
        ):
            other.append(stage)
    if missing:
        paths = [path for stage in missing for path in changes[stage]["changed outs"]]
        # If very many stages are missing, the command for the whole study is shorter.
        command = " ".join(["dvc repro", *(missing if len(missing) <= SHOWN else [])])
        return f"missing or changed: {_first(paths)}; make what no remote has: {command}"
    if other:
        return f"recorded with other parameters or source: {_first(other)}; make them anew: dvc repro"
    return None


def _first(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _within(path: str, outs: set[str]) -> bool:
    return path in outs or any(parent.as_posix() in outs for parent in Path(path).parents)


def _run(study: Path, command: list[str], capture: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command in the study, with the programs of this environment first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    try:
        return subprocess.run(
            command, cwd=study, env={**os.environ, "PATH": path}, capture_output=capture, text=True, check=False
        )
    except FileNotFoundError:
        raise BwskError(f"{command[0]}: not installed; install the pinned versions: make venv") from None


def _output(study: Path, command: list[str]) -> str | None:
    done = _run(study, command, capture=True)
    if done.returncode:
        print(done.stderr, end="", file=sys.stderr)
        return None
    return done.stdout.strip()


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {done.returncode}"
