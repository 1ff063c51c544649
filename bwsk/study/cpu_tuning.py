"""Process-wide CPU settings that speed up PyTorch where its builds are slow. They do not affect a GPU.

**Products.** PyTorch computes float32 matrix products by MKL, which uses its AVX2 kernels on processors by other
vendors than Intel, although they have AVX-512. oneDNN, which the same builds contain for bfloat16, has AVX-512 kernels
for all of them. So large float32 products go to oneDNN there, in forward and backward. The results are as exact, but
not always bit-identical to MKL's. Every mode of a study runs in a process with these settings, so bit-identity between
modes holds.

**Freed memory.** glibc returns large blocks, and free memory at the end of its heap, to the system at once. A training
step then requests all of it again, page by page: a quarter of a million page faults a step for T5-small. The heap can
retain everything for the next step. Fragmentation (before glibc 2.38 an aligned block needs more room than it leaves)
costs up to half as much memory again, so the heap retains memory only while there is plenty, checked every few steps.
A training returns all free pages after each validation.
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

# Products with fewer multiply-adds stay with MKL, because the call through Python costs more than it gains.
WORTH_IT = 1 << 22
# mallopt's parameters, by their numbers in glibc's malloc.h, and two settings: what glibc itself arrives at in a
# process that frees large blocks, and one that retains everything (the heap is never trimmed, and no block is mapped
# separately).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_GLIBC = {_M_TRIM_THRESHOLD: 64 * 2**20, _M_MMAP_THRESHOLD: 32 * 2**20, _M_MMAP_MAX: 65536}
_KEEP = {_M_TRIM_THRESHOLD: -1, _M_MMAP_MAX: 0}
# What `torch.library` registers lasts as long as this object.
_OVERRIDE: list[torch.library.Library] = []


def tune() -> None:
    """Apply the settings that this machine needs and supports. Calling it again is harmless."""
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
    """Compute large float32 products on the CPU by oneDNN from now on; False where this PyTorch lacks oneDNN."""
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
    with warnings.catch_warnings():  # torch warns that a kernel is replaced
        warnings.simplefilter("ignore", UserWarning)
        override.impl("mm", mm, "CPU")
    _OVERRIDE.append(override)
    return True


def keep_freed_memory() -> bool:
    """Let the heap retain freed memory for the next step while twice the process's peak would be available.

    Returns whether it does from now on. Meant to be called every few steps; without glibc it does nothing.
    """
    if not _on_glibc():
        return False
    resident, free = resident_memory(), free_host_memory()
    keep = resident is not None and free is not None and 2 * resident[1] <= resident[0] + free
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(*setting) for setting in (_KEEP if keep else _GLIBC).items()) and keep


def give_back_freed_memory() -> None:
    """Return all free pages to the system, also from the middle of the heap; glibc only."""
    if _on_glibc():
        ctypes.CDLL(None).malloc_trim(0)


@cache
def _on_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
