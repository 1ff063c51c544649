"""What makes PyTorch fast on a CPU that its builds leave slow. Settings of the whole process; a GPU does not notice.

**Products.** PyTorch computes float32 matrix products by MKL, which takes its AVX2 kernels on processors that are not
Intel's, although they have AVX-512. oneDNN, which the same builds bring for bfloat16, has kernels for all of them. So
large float32 products go to oneDNN there, in forward and backward alike: as exact, not always MKL's bits. Every mode
of a study runs in a process that is set like this, so what has the same bits in one has them in the other.

**Freed memory.** glibc gives large blocks, and what is free at the end of its heap, back to the system at once, and a
training step then asks for all of it again, page by page: a quarter of a million faults a step for T5-small. The heap
can keep everything for the next step. Its holes do not always fit again (before glibc 2.38 an aligned block needs more
room than it leaves), which costs up to half as much memory again. So it keeps only where there is plenty, looked at
again every few steps, and a training gives all free pages back after each validation.
"""

from __future__ import annotations

import ctypes
import platform
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bwsk._compat import mm_out, onednn_linear
from bwsk.memory.available import free_host_memory, resident_memory

# Products with fewer multiply-adds stay with MKL: below, the way through Python takes longer than what is gained.
WORTH_IT = 1 << 22
# mallopt's parameters, by their numbers in glibc's malloc.h, and two settings. What glibc itself comes to in a process
# that frees large blocks; and to keep everything: the heap's end never trimmed (-1), no block mapped apart from it.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_GLIBC = {_M_TRIM_THRESHOLD: 64 * 2**20, _M_MMAP_THRESHOLD: 32 * 2**20, _M_MMAP_MAX: 65536}
_KEEP = {_M_TRIM_THRESHOLD: -1, _M_MMAP_MAX: 0}
# What `torch.library` registers lasts as long as this object.
_OVERRIDE: list[torch.library.Library] = []


def tune() -> None:
    """Set up this process; what the machine does not need or have is left out. Again is harmless."""
    if mkl_falls_short():
        multiply_by_onednn()


@cache
def mkl_falls_short() -> bool:
    """Whether float32 products go to MKL, on a processor with AVX-512 that is not Intel's."""
    cpuinfo = Path("/proc/cpuinfo")
    if not (torch.backends.mkl.is_available() and cpuinfo.is_file()):
        return False
    vendor = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("vendor_id")), "")
    return "AuthenticAMD" in vendor and torch.backends.cpu.get_cpu_capability() == "AVX512"


def multiply_by_onednn() -> bool:
    """Compute large float32 products on the CPU by oneDNN from now on; False where this PyTorch has none."""
    if _OVERRIDE:
        return True
    if (onednn := onednn_linear()) is None:
        return False

    def mm(a: Tensor, b: Tensor) -> Tensor:
        rows, columns = a.shape[0], b.shape[1]
        large = rows * a.shape[1] * columns >= WORTH_IT
        if large and a.dtype is torch.float32 and b.dtype is torch.float32:
            return onednn(a, b.t(), None, "none", [], "")  # a · (bᵀ)ᵀ
        return mm_out(a, b, out=a.new_empty((rows, columns)))

    override = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():  # that a kernel is replaced
        warnings.simplefilter("ignore", UserWarning)
        override.impl("mm", mm, "CPU")
    _OVERRIDE.append(override)
    return True


def keep_freed_memory() -> bool:
    """Let the heap keep what is freed for the next step while the process can have twice the most it ever had.

    True if it does from now on. Meant to be called every few steps; without glibc it does nothing.
    """
    if not _on_glibc():
        return False
    resident, free = resident_memory(), free_host_memory()
    keep = resident is not None and free is not None and 2 * resident[1] <= resident[0] + free
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(*setting) for setting in (_KEEP if keep else _GLIBC).items()) and keep


def give_back_freed_memory() -> None:
    """Give the pages of all that is free back to the system, also from the middle of the heap; glibc only."""
    if _on_glibc():
        ctypes.CDLL(None).malloc_trim(0)


@cache
def _on_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
