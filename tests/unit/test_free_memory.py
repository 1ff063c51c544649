"""What a process can still have, under each kind of limit."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bwsk.memory.available import _groups, free_host_memory, free_memory, resident_memory
from bwsk.units import MIB


def test_the_machine_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_host_memory()
    assert free is not None
    assert free > 0
    with monkeypatch.context() as patch:  # what is free changes from one look to the next
        patch.setattr("bwsk.memory.available.free_host_memory", lambda: 7.0)
        assert free_memory(torch.device("cpu")) == 7.0
    now, most = resident_memory() or (0, 0)
    assert 50 < now <= most
    block = torch.ones(256 << 18)
    after = resident_memory()
    assert after is not None
    assert after[0] > now + 200
    del block


def test_a_limit_of_the_address_space_counts() -> None:
    program = """
import resource
from bwsk.memory.available import free_host_memory
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 300 * 2**20, resource.RLIM_INFINITY))
print(free_host_memory())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 280 < float(done.stdout) <= 300
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


GROUP_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


@pytest.mark.parametrize("version", [1, 2])
def test_control_groups_count_with_all_that_hold_them(tmp_path: Path, version: int) -> None:
    """The batch system's group has 800 MiB left, the job's 300 of which 100 are caches; the task's has no limit."""
    names = GROUP_FILES[version]
    top = tmp_path if version == 2 else tmp_path / "memory"

    def group(path: str, limit: str, used: int, cached: int) -> None:
        folder = top / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used * MIB}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached * MIB}\nfile_mapped 0\n")

    group("batch", str(1000 * MIB), 200, 0)
    group("batch/job", str(500 * MIB), 300, 100)
    group("batch/job/task", "max" if version == 2 else str(2**63 - 4096), 10, 0)
    own = tmp_path / "cgroup"
    line = {2: "0::/batch/job/task", 1: "5:cpu,cpuacct:/elsewhere\n4:memory:/batch/job/task"}[version]
    own.write_text(f"{line}\n")
    found = list(_groups(tmp_path, own))
    assert found[-2:] == [300, 800]
    assert all(left > 2**40 for left in found[:-2])


def test_a_path_of_the_host_leads_to_the_container_s_own_group(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(str(100 * MIB))
    (tmp_path / "memory.current").write_text(str(130 * MIB))
    (tmp_path / "memory.stat").write_text("")
    own = tmp_path / "cgroup"
    own.write_text("0::/../../host/only\n")
    assert list(_groups(tmp_path, own)) == [0]
    own.write_text("0::/docker/1234\n")
    assert list(_groups(tmp_path, own)) == [0]
    assert list(_groups(tmp_path, tmp_path / "absent")) == []
