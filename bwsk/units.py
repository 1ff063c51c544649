"""Units: sizes in bytes, and the names of precisions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, get_args

from bwsk.errors import BwskError

if TYPE_CHECKING:
    import torch

# Float32 weights, with autocast to a narrower dtype or without.
Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
# PyTorch's names of the dtypes, which are accepted wherever a precision is given.
DTYPES: dict[str, Precision] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

MIB = 2**20
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": MIB, "gib": 2**30}


def size_in_bytes(text: str) -> int:
    """Bytes of a size with a unit, such as "900 MiB" or "8GB"; raises `BwskError` for anything else."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([kmg]i?b|b)", text.strip().lower())
    if found is None:
        raise BwskError(f"size: found {text!r}; give a number and a unit, such as 900MiB or 8GB")
    return int(float(found[1]) * _UNITS[found[2]])


def short_precision(name: Any) -> Any:
    """A precision by the name used here, such as "fp16" for "float16"; anything but a dtype's name is unchanged."""
    return DTYPES.get(name, name) if isinstance(name, str) else name


def to_precision(name: Any) -> Precision:
    """Return "fp32", "bf16" or "fp16", also from the name of the dtype; raises `BwskError` for anything else."""
    found = short_precision(name)
    if found not in PRECISIONS:
        raise BwskError(f"precision: found {name!r}, must be one of {', '.join(PRECISIONS)}")
    return found


def dtype_of(precision: Precision) -> torch.dtype:
    """The dtype in which autocast computes matrix products; float32 means no autocast."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
