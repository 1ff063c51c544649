"""Memory-saving backprop for stock Hugging Face models, with the same gradients.

`make_reversible(model, budget=…)` changes what a training step keeps for its backward, not what it computes: weights,
names, evaluation and generation are untouched. What "reversible" means here: stock weights do not make invertible
layers, so nothing is inverted; S-phases are redone bit for bit from the tensors kept at their entry, and of K-type
operations only the residue (a bit, a row statistic) is kept.
"""

from bwsk.reversible.handle import Reversible, make_reversible
from bwsk.reversible.plan import Plan

__all__ = ["Plan", "Reversible", "make_reversible"]
