"""When two tensors are the same, bit by bit, and how far apart they are where not."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def identical(x: Tensor | None, y: Tensor | None) -> bool:
    """Whether two tensors are the same: `torch.equal`, where NaNs with equal bits are equal too; or both are None."""
    if x is None or y is None:
        return x is y
    if x.dtype is not y.dtype or x.shape != y.shape:
        return False
    x, y = dense(x), dense(y)
    return torch.equal(x, y) or torch.equal(_bits(x), _bits(y))


def fingerprint(x: Tensor | None) -> bytes | None:
    """A digest that two tensors of one dtype and shape share exactly if they are `identical`."""
    return None if x is None else hashlib.sha256(_bits(dense(x)).cpu().numpy().data).digest()


def _bits(x: Tensor) -> Tensor:
    """The bytes of a tensor, those of -0 as those of 0: to `torch.equal` they are the same number."""
    return x.detach().masked_fill(x == 0, 0).reshape(-1).view(torch.uint8)


def dense(x: Tensor) -> Tensor:
    """The tensor, or its dense form if it is sparse."""
    return x if x.layout is torch.strided else x.to_dense()


def norm(x: Tensor) -> float:
    """The Euclidean norm, summed in float64."""
    return torch.linalg.vector_norm(dense(x), dtype=torch.float64).item()


def distance(x: Tensor, y: Tensor) -> float:
    """The norm of the difference, in float64."""
    return norm(dense(x).double() - dense(y).double())


def ratio(size: float, scale: float) -> float | None:
    """`size` relative to `scale`; None where that is no number."""
    if size == 0.0:
        return 0.0
    return size / scale if scale > 0.0 and math.isfinite(size) and math.isfinite(scale) else None
