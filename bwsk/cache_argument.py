"""The argument that hands on a generation cache: `past_key_values`, renamed to `cache` in transformers 5.24.

The stock models pass the name of their version; callers may give either, as transformers lets them.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers.models.t5.modeling_t5 import T5Stack

_OLD, _NEW = "past_key_values", "cache"
CACHE = _NEW if _NEW in inspect.signature(T5Stack.forward).parameters else _OLD


def renamed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` with a cache under the name `CACHE`."""
    if CACHE == _OLD or _OLD not in kwargs:
        return kwargs
    others = {name: value for name, value in kwargs.items() if name != _OLD}
    return {CACHE: kwargs[_OLD], **others}
