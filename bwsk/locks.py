"""Locks on files that die with the process that holds them, and say who that is.

A lock is the operating system's (flock), so a kill of any kind frees it; the file only carries the name of the holder
and stays. Where a file system has no such locks the lock is granted: it is a guard against accidents. A system that is
not POSIX has none at all, nor the rest that whole files and studies stand on: there `require_posix` says so.
"""

from __future__ import annotations

import errno
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bwsk.errors import BwskError

try:
    import fcntl
except ImportError:  # Windows: what needs no locks works there
    fcntl = None  # type: ignore[assignment]  # a module that may be missing, which `require_posix` reports

POLL_SECONDS = 0.5
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Lock:
    """A lock that this process holds until `release` or its end. `waited`: whether somebody else had it before."""

    def __init__(self, path: Path, descriptor: int, waited: bool) -> None:
        self.path, self.waited = path, waited
        self._descriptor = descriptor

    def release(self) -> None:
        """Let others have it."""
        os.close(self._descriptor)


def require_posix(what: str) -> None:
    """BwskError if this system has no file locks; `what` is what they are needed for."""
    if fcntl is None:
        raise BwskError(
            f"{what}: needs a POSIX system such as Linux, found {sys.platform}, which has no flock; run it there"
        )


def try_lock(path: Path, waited: bool = False) -> Lock | None:
    """The lock of `path`, or None if another process has it."""
    require_posix(str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _open(path)
    except OSError as error:
        raise BwskError(f"{path}: cannot be written ({error.strerror}); name a writable directory") from None
    if not flock(descriptor):
        os.close(descriptor)
        return None
    with suppress(OSError):  # another user's file, or a full disk: the lock holds without the name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _signature().encode(), 0)
    return Lock(path, descriptor, waited)


def wait_lock(path: Path, what: str, say: Callable[[str], None]) -> Lock:
    """The lock of `path`, once it is free. While somebody has it, `say` reports that once; `what` is what it is for."""
    lock = try_lock(path)
    if lock is None:
        say(f"{what}: in use by {holder(path)}; waiting until it is free")
    while lock is None:
        time.sleep(POLL_SECONDS)
        lock = try_lock(path, waited=True)
    return lock


def holder(path: Path) -> str:
    """Who has the lock, by its own account."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    except OSError:
        return "another process"


def flock(descriptor: int, wait: bool = False) -> bool:
    """Lock an open file or folder for this process; False if another has it and this one is not to wait."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return True
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _open(path: Path) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        # Not with O_CREAT: systems refuse that on another user's file in a folder for everybody.
        return os.open(path, os.O_RDWR | flags)
    except FileNotFoundError:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o644)
    except PermissionError:
        return os.open(path, os.O_RDONLY | flags)


def _signature() -> str:
    return f"pid {os.getpid()} on {platform.node()}, {_command()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"


def _command() -> str:
    """The command that runs, by its program and first two arguments: enough to recognise it, no secrets of others."""
    return " ".join([Path(sys.argv[0] or "python").name, *sys.argv[1:3]])[:120]


def hold_study(state: Path) -> str | None:
    """Mark the study whose Snakemake state is in `state` (`.snakemake`) as in use for as long as this process lives.

    A killed Snakemake leaves its own locks behind and refuses to start again; they are removed if no other process
    of this machine is alive in the study. Else returns who is, if a run is under way there.
    """
    path, locks = state / "bwsk.lock", state / "locks"
    try:
        state.mkdir(exist_ok=True)
        descriptor = _open(path)
    except OSError:
        return None  # nothing can be written here: Snakemake will say so if it has to
    alone = flock(descriptor)
    abandoned = list(locks.glob("*.lock"))
    if alone and abandoned and f" on {platform.node()}," in holder(path):
        for lock in abandoned:
            lock.unlink(missing_ok=True)
    if alone:
        sign_study(state)
    # From now on shared: any number of processes can look at a study, and none of them is alone.
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    _HELD.append(descriptor)
    return holder(path) if abandoned and not alone else None


def sign_study(state: Path) -> None:
    """Note this process as the one that runs the study."""
    with suppress(OSError):
        (state / "bwsk.lock").write_text(_signature(), encoding="utf-8")


# Descriptors of locks that last until the process ends.
_HELD: list[int] = []
