"""Reading and writing files so that a partial output never looks finished.

Everything is written under a temporary name in the target's own directory, flushed to disk and renamed; JSON is strict
(`NaN` and `Infinity` are errors, keys keep their order, one trailing newline).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bwsk.errors import BwskError
from bwsk.locks import flock, require_posix

_PARTIAL = ".partial-"


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a value's canonical JSON (sorted keys, no blanks)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; BwskError naming the file if it is missing or is not one."""
    try:
        value = json.loads(
            path.read_bytes(), parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique
        )
    except FileNotFoundError:
        raise BwskError(f"{path}: no such file; run the step that makes it") from None
    except OSError as error:
        raise BwskError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise BwskError(f"{path}: not strict JSON ({' '.join(str(error).split())}); delete it and run again") from None
    if not isinstance(value, dict):
        raise BwskError(f"{path}: found a JSON {type(value).__name__}, must be an object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # 1e999
        raise ValueError(f"{text} is not finite")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # readers differ in which of the two counts
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def write_json(path: Path, value: Any) -> None:
    """Write strict, indented JSON atomically; ValueError if a number in it is not finite."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf
        for name, part in value.items()
        for key, leaf in flat(part, f"{prefix}.{name}" if prefix else name).items()
    }


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that is renamed to it when the block ends without an exception."""
    with atomic_directory(path.parent) as folder:
        yield folder / path.name


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A temporary folder whose files are moved into `path` when the block ends without an exception.

    Files of `path` that the block did not write stay. The files are flushed to disk before the first rename, so a
    crash leaves either the old file or the new one under each name, never a part of one.
    """
    with partial_folder(path) as partial:
        try:
            yield partial
            written = sorted(file for file in partial.rglob("*") if file.is_file())
            targets = [path / file.relative_to(partial) for file in written]
            for file, target in zip(written, targets, strict=True):
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.is_dir():
                    raise IsADirectoryError(None, f"{target.name} is a directory")
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            for file, target in zip(written, targets, strict=True):
                file.chmod(0o644 & ~_umask())
                os.replace(file, target)
        except BwskError:
            raise
        except Exception as error:
            if (reason := disk_fault(error)) is None:
                raise
            raise BwskError(f"{path}: writing failed ({reason}); what was there is unchanged") from error


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """An empty folder `path/.partial-…`, removed at the end of the block; clears those that a kill has left behind.

    Each is locked by the process that writes into it, which distinguishes a dead one's from a live one's.
    """
    require_posix(f"{path}: writing it whole or not at all")
    try:
        path.mkdir(parents=True, exist_ok=True)
        parent = os.open(path, os.O_RDONLY)
        try:
            if not path.name.startswith(_PARTIAL):  # else it is this process's own, and locked by it
                flock(parent, wait=True)  # nobody takes a new folder for an abandoned one before it is locked
            for old in path.glob(f"{_PARTIAL}*"):
                _remove_abandoned(old)
            partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=path))
            descriptor = os.open(partial, os.O_RDONLY)
            flock(descriptor)
        finally:
            os.close(parent)
    except OSError as error:
        raise BwskError(f"{path}: cannot be written ({error.strerror}); name a writable directory") from None
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(descriptor)


def require_writable(folder: Path) -> None:
    """BwskError if `folder` could not be written at the end of a long step; nothing is created."""
    require_posix(f"{folder}: writing it whole or not at all")
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise BwskError(f"{existing}: is a file where a folder is to be written; move it away")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise BwskError(f"{existing}: cannot be written; name a writable directory")


def disk_fault(error: Exception) -> str | None:
    """What the operating system said, if `error` is its refusal to write (full, read-only, …); else None.

    The Rust libraries that write weights and tokenizers raise it under classes of their own, as a text.
    """
    if isinstance(error, OSError):
        return error.strerror or " ".join(str(error).split())[:200] or type(error).__name__
    text = " ".join(str(error).split())
    return text[:200] if re.search(r"\(os error \d+\)", text) else None


def _remove_abandoned(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        if flock(descriptor):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
