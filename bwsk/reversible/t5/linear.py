"""Linear layers without bias, forward and backward, under autocast or not.

    y = x Wᵀ,   dx = dy W,   dW = dyᵀ x

Under autocast, stock linear layers cast the weight once per region and autograd saves that copy; for T5-small this is
115 MiB. Here the weight is cast where it is used and again in the backward, with bit-identical results.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes linear layers, or None where autocast is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def as_forward(dtype: torch.dtype | None, kind: str) -> AbstractContextManager[Any]:
    """The autocast state in which the forward got `dtype`; a recomputation may be entered under a different one."""
    enabled = torch.is_autocast_enabled(kind)
    if (torch.get_autocast_dtype(kind) if enabled else None) is dtype:
        return nullcontext()
    return torch.autocast(kind, dtype=dtype or torch.get_autocast_dtype(kind), enabled=dtype is not None)


def cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x in `dtype`; x itself for None."""
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
