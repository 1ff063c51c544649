"""The C library's allocator, told to keep what training frees.

PyTorch takes CPU tensors from `malloc`. glibc maps each block above 32 MiB from the kernel and returns it when it is
freed, and returns the top of its heap; so every step pays again for page faults and for pages filled with zeros: a
log-softmax of T5-small's logits (125 MiB) spends 50 of 68 ms there. A training step needs the same memory again right
away. With these two settings the heap stays; values and alignment (64 bytes, PyTorch's own) do not change.
"""

from __future__ import annotations

import ctypes
import sys

# mallopt's parameters, from malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep freed blocks for the life of this process; False where the C library is not glibc (nothing is done)."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(_M_MMAP_MAX, 0) and library.mallopt(_M_TRIM_THRESHOLD, _NEVER))
