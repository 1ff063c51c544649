"""BWSK: classify the operations of a neural network as S-type or K-type, and train with less memory by it.

The public names are imported on first use, so that `import bwsk` costs nothing:

- `classify(model)`: census of the leaf modules by S-type, K-type and GRAY.
- `trace(model, ...)`: the same for every operation that a training step really runs.
- `make_reversible(model, budget=...)`: memory-saving backward, bit-identical gradients.
- `predict_memory(model, ...)`: peak memory of a training step, without a GPU.
- `BwskError`: what all of them raise on input they cannot use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "classify": "bwsk.classification.census",
    "Census": "bwsk.classification.census",
    "trace": "bwsk.classification.trace",
    "make_reversible": "bwsk.reversible.handle",
    "predict_memory": "bwsk.memory.prediction",
    "BwskError": "bwsk.errors",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bwsk' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
