"""Linear layers without bias, forward and backward, under autocast or not.

    y = x Wᵀ,   dx = dy W,   dW = dyᵀ x

Under autocast the reference casts the weight once per region and autograd saves that copy; for T5-small this is
115 MiB. Here the cast is made where it is used and again in the backward, which gives the same bits.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes linear layers in, or None where autocast is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def as_forward(dtype: torch.dtype | None, kind: str):
    """The autocast state that gave `dtype` in the forward, for a recomputation, which may run under another."""
    enabled = torch.is_autocast_enabled(kind)
    if (torch.get_autocast_dtype(kind) if enabled else None) is dtype:
        return nullcontext()
    return torch.autocast(kind, dtype=dtype or torch.get_autocast_dtype(kind), enabled=dtype is not None)


def cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x in the compute dtype; x itself where there is none."""
    return x if dtype is None or x.dtype is dtype else x.to(dtype)


def linear(x: Tensor, weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x Wᵀ for x (..., in) already in the compute dtype and W (out, in)."""
    return F.linear(x, cast(weight, dtype))


def linear_grad_input(g: Tensor, weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """g W for g (rows, out): gradient of the input, (rows, in)."""
    return g.mm(cast(weight, dtype))


def linear_grad_weight(g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """gᵀ x for g (rows, out) and x (rows, in): gradient of the weight, in the weight's own dtype."""
    return cast(g.t().mm(x), weight.dtype)
