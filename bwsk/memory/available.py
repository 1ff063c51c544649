"""How much memory a process can still allocate: on a GPU, or on the host under every limit that is set there."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bwsk.units import MIB

if TYPE_CHECKING:
    import torch

CGROUPS = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> float | None:
    """MiB that this process can still allocate on `device`; None if the system does not report it."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0] / MIB
    return free_host_memory()


def free_host_memory() -> float | None:
    """MiB of host memory that this process can still allocate; None if the system does not report it.

    The minimum of what the machine has available, what is left in each control group that the process is in
    (containers, batch systems), and what it may still map (`ulimit -v`). Page caches count as free, because the system
    reclaims them.
    """
    if (available := _available()) is None:
        return None
    return min(available, *_groups(), _address_space())


def resident_memory() -> tuple[float, float] | None:
    """MiB of host memory that this process has resident now and had at most; None if the system does not report it."""
    try:
        status = _table(Path("/proc/self/status"))
        return status["VmRSS"] / 1024, status["VmHWM"] / 1024
    except (OSError, KeyError):
        return None


def _available() -> float | None:
    try:
        return _table(Path("/proc/meminfo"))["MemAvailable"] / 1024
    except (OSError, KeyError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / MIB
    except (ValueError, OSError, AttributeError):  # no such number, or no such call: Windows
        return None


def _groups(root: Path = CGROUPS, process: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """MiB left in the process's control group and in each group above it, of version 2 and of version 1."""
    try:
        lines = process.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        limit, used, cached = names
        # In a container the path may be the host's. Its groups are not visible from here, but the top one is.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            group = top.joinpath(*parts[:depth])
            try:
                left = int((group / limit).read_text()) - int((group / used).read_text())
                yield max(left + _table(group / "memory.stat").get(cached, 0), 0) / MIB
            except (OSError, ValueError):  # no such group, or "max"
                pass


def _address_space() -> float:
    """MiB that the process may still map under its limit; infinite without a limit."""
    try:
        import resource
    except ImportError:  # Windows
        return math.inf
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return math.inf
    try:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        mapped = 0
    return max(limit - mapped, 0) / MIB


def _table(file: Path) -> dict[str, int]:
    """The numbers of a kernel file with lines like `name: 12 kB` or `name 12`, in the file's own units."""
    rows = (line.replace(":", " ").split() for line in file.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
