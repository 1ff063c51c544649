"""When two computations of the same perplexity agree: training's own and the one from the saved weights.

They may differ by rounding alone, from other batches or other attention kernels. A larger difference means that the
weights on disk are not those of the run.
"""

from __future__ import annotations

TOLERANCE = 1e-4  # relative


def agree(found: float, recorded: float) -> bool:
    """Whether the perplexity `found` is the `recorded` one up to rounding."""
    return abs(found - recorded) <= TOLERANCE * recorded
