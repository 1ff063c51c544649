"""The device that a job runs on, and the numeric switches that belong to it."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bwsk.errors import BwskError
from bwsk.locks import POLL_SECONDS, Lock, holder, try_lock
from bwsk.study.cpu_tuning import tune
from bwsk.units import dtype_of

if TYPE_CHECKING:
    from bwsk.units import Precision

# One lock per GPU of the machine, whoever uses it.
LOCKS = Path(tempfile.gettempdir()) / "bwsk-gpus"
# The device of this process, with its lock, which lives as long as the process.
_HELD: list[tuple[int, Lock]] = []


def pick_device(gpus: int, say: Callable[[str], None] = lambda text: print(text, file=sys.stderr)) -> torch.device:
    """A CUDA device for this process alone if the job was given a GPU slot and there is one, else the CPU.

    It is the first device of `CUDA_VISIBLE_DEVICES` that no other bwsk process holds, and it is held until this process
    ends. If all are taken, this waits for one and reports that it does.
    """
    if gpus <= 0 or not torch.cuda.is_available():
        return torch.device("cpu")
    if not _HELD:
        count = torch.cuda.device_count()
        names = visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), count)
        # The same card under its number and under its UUID must be one lock.
        keys = [str(getattr(torch.cuda.get_device_properties(i), "uuid", names[i])) for i in range(count)]
        _HELD.append(claim(keys, LOCKS, say))
    index, _ = _HELD[0]
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def visible_gpus(variable: str | None, count: int) -> list[str]:
    """Names of the devices that a process sees: numbers or UUIDs of `CUDA_VISIBLE_DEVICES`, all `count` if unset.

    As in CUDA, the list ends at the first invalid entry.
    """
    if variable is None:
        return [str(index) for index in range(count)]
    names: list[str] = []
    for name in map(str.strip, variable.split(",")):
        if not name or name.startswith("-") or name in names:
            break
        names.append(name)
    return names[:count]


def claim(keys: list[str], folder: Path, say: Callable[[str], None]) -> tuple[int, Lock]:
    """Index and lock of the first of the devices `keys` that no other process holds; waits while there is none."""
    if not folder.is_dir():
        with suppress(OSError):  # two processes at once, or no permission, which the locks report
            folder.mkdir(parents=True)
            folder.chmod(0o1777)  # writable by everybody on the machine, like the temporary folder that contains it
    paths = [folder / f"gpu-{re.sub('[^A-Za-z0-9-]', '_', key)}.lock" for key in keys]
    waited = False
    while True:
        for index, path in enumerate(paths):
            if (lock := try_lock(path, waited)) is not None:
                return index, lock
        if not waited:
            say(f"GPU: all {len(keys)} in use, the first by {holder(paths[0])}; waiting until one is free")
        waited = True
        time.sleep(POLL_SECONDS)


def device_name(device: torch.device) -> str:
    """`cpu`, or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def configure(device: torch.device, *, threads: int, deterministic: bool, tf32: bool) -> None:
    """Set everything that a computation's exact bits depend on, for the whole process."""
    # cuBLAS needs this before its first call to be deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    # Deterministic mode would fill every uninitialised buffer first, although nothing here reads one.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a module's property
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
    else:
        tune()


def check_precision(key: str, precision: Precision, device: torch.device) -> None:
    """BwskError if the device does not support `precision`; `key` is the parameter that requests it."""
    if device.type == "cpu" and precision == "fp16":
        raise BwskError(f"{key}: found fp16, which needs a CUDA device; set bf16 or fp32 to run on the CPU")
    if device.type == "cuda" and precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise BwskError(f"{key}: found bf16, which {device_name(device)} does not support; set fp16 or fp32")


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """Mixed precision as a context: matrix products in `precision`; disabled for fp32."""
    return torch.autocast(device.type, dtype=dtype_of(precision), enabled=precision != "fp32")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out; on a CPU torch says so in the text of a RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in ("DefaultCPUAllocator", "not enough memory", "CUDA out of memory"))
    )
