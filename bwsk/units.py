"""Units: sizes in bytes, and the names of precisions."""

from __future__ import annotations

import re

from bwsk.errors import BwskError

MIB = 2**20
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": MIB, "gib": 2**30}


def size_in_bytes(text: str) -> int:
    """Bytes of a size with a unit, such as "900 MiB" or "8GB"; raises `BwskError` otherwise."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([kmg]i?b|b)", text.strip().lower())
    if found is None:
        raise BwskError(f"size: found {text!r}; give a number and a unit, such as 900MiB or 8GB")
    return int(float(found[1]) * _UNITS[found[2]])
