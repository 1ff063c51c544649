"""Memory-saving backprop for stock Hugging Face models, with the same gradients.

`make_reversible(model, budget=…)` changes what a training step keeps for its backward, not what it computes: weights,
names, evaluation and generation are untouched.
"""

from __future__ import annotations

__all__: list[str] = []
