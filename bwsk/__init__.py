"""BWSK: classify the operations of a neural network as S-type or K-type, and use that to train with less memory.

The public names are imported on first use, so that `import bwsk` costs nothing:

- `classify(model)`: census of the leaf modules by S-type, K-type and GRAY.
- `trace(model, ...)`: the same for every operation that a training step really runs.
- `make_reversible(model, budget=...)`: training steps that save less, with bit-identical gradients.
- `undo(model)`: the stock model again; of a copy too, which has no handle.
- `plan(model, budget=...)`: what `make_reversible` would save and recompute, without a model in memory.
- `same_gradients(model, batch, a, b)`: whether two set-ups of a model give the same bits, loss and every gradient.
- `predict_memory(model, ...)`: peak memory of a training step, without a GPU; `largest_batch`: what fits.
- `BwskError`: raised by all of the above for invalid or unsupported input.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bwsk.classification.census import Census, classify
    from bwsk.classification.rules.rule import RuleSet
    from bwsk.classification.trace import Trace, trace
    from bwsk.errors import BwskError
    from bwsk.memory.prediction import Prediction, largest_batch, predict_memory
    from bwsk.reversible.handle import Reversible, make_reversible, plan, undo
    from bwsk.reversible.plan import Plan
    from bwsk.reversible.verification.gradient_check import same_gradients
    from bwsk.reversible.verification.gradient_comparison import GradientComparison

__version__ = "0.1.0"
__all__ = [
    "BwskError",
    "Census",
    "GradientComparison",
    "Plan",
    "Prediction",
    "Reversible",
    "RuleSet",
    "Trace",
    "__version__",
    "classify",
    "largest_batch",
    "make_reversible",
    "plan",
    "predict_memory",
    "same_gradients",
    "trace",
    "undo",
]

_HOMES = {
    "bwsk.classification.census": ("Census", "classify"),
    "bwsk.classification.rules.rule": ("RuleSet",),
    "bwsk.classification.trace": ("Trace", "trace"),
    "bwsk.errors": ("BwskError",),
    "bwsk.memory.prediction": ("Prediction", "largest_batch", "predict_memory"),
    "bwsk.reversible.verification.gradient_check": ("same_gradients",),
    "bwsk.reversible.verification.gradient_comparison": ("GradientComparison",),
    "bwsk.reversible.handle": ("Reversible", "make_reversible", "plan", "undo"),
    "bwsk.reversible.plan": ("Plan",),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'bwsk' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
