"""The device that a job runs on, and the numeric switches that belong to it."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

import torch

from bwsk.errors import BwskError
from bwsk.params import Precision

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(gpus: int) -> torch.device:
    """The CUDA device if the job was given a GPU slot and there is one, else the CPU."""
    return torch.device("cuda" if gpus > 0 and torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """`cpu`, or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def configure(device: torch.device, *, threads: int, deterministic: bool, tf32: bool) -> None:
    """Set what decides the bits of a computation, for the whole process."""
    # cuBLAS needs this before its first call to be deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    # Otherwise every uninitialised buffer is filled first, at no gain: nothing here reads one.
    torch.utils.deterministic.fill_uninitialized_memory = False
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32


def check_precision(key: str, precision: Precision, device: torch.device) -> None:
    """BwskError if the device cannot compute in `precision`; `key` is the parameter that asks for it."""
    if device.type == "cpu" and precision == "float16":
        raise BwskError(f"{key}: found float16, which needs a CUDA device; set bfloat16 or float32 to run on the CPU")
    if device.type == "cuda" and precision == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise BwskError(f"{key}: found bfloat16, which {device_name(device)} does not support; set float16 or float32")


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """Mixed precision as a context: matrix products in `precision`, nothing at all for float32."""
    return torch.autocast(device.type, dtype=_DTYPES[precision], enabled=precision != "float32")
