"""T5's RMS norm, forward and backward, from its input and one statistic per row.

    r = rsqrt(mean(x²) + eps),  y = w · (x · r)

Autograd keeps x, x·r and y (for the linear layers): three copies of the residual stream. Here only x, which the
residual stream holds anyway, and r (4 bytes a row) are saved; x·r and y are elementwise and recomputed bit for bit.
The backward is autograd's own derivative of that chain, operator by operator (PyTorch, derivatives.yaml).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bwsk.reversible.t5.linear import cast


def rms_statistic(x: Tensor, eps: float) -> Tensor:
    """rsqrt(mean(x²) + eps) per row, float32, shape (..., 1)."""
    return torch.rsqrt(cast(x, torch.float32).pow(2).mean(-1, keepdim=True) + eps)


def rms_apply(x: Tensor, r: Tensor, weight: Tensor) -> Tensor:
    """w·(x·r), shape of x, in the dtype that T5LayerNorm returns."""
    h = x * r
    if weight.dtype in (torch.float16, torch.bfloat16):
        h = h.to(weight.dtype)
    return weight * h


def rms_backward(g: Tensor, x: Tensor, r: Tensor, weight: Tensor, wants_weight: bool):
    """Gradients (through x·r, through r, of the weight) from g, the gradient of y.

    The two contributions to x come back apart, because autograd adds them to the residual stream one after the other
    and floating-point addition does not associate.
    """
    h = x * r
    wide = h.dtype
    if weight.dtype in (torch.float16, torch.bfloat16):
        h = h.to(weight.dtype)
    g_weight = (g * h).sum_to_size(weight.shape) if wants_weight else None
    del h
    g_h = cast(g * weight, wide)
    g_r = cast((g_h * x).sum_to_size(r.shape), r.dtype)
    g_product = cast(g_h * r, x.dtype)
    del g_h
    g_variance = -0.5 * g_r * r.pow(3)
    wide_x = cast(x, torch.float32)
    g_square = (g_variance / x.shape[-1]) * (2.0 * wide_x)
    return g_product, cast(g_square, x.dtype), g_weight
