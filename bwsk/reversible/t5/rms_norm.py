"""T5's RMS norm, forward and backward, from its input and one statistic per row.

    r = rsqrt(mean(x²) + eps),  y = w · (x · r)

Autograd saves x, x·r and y (for the linear layers), which are three copies of the residual stream. Here only x, which
the residual stream holds anyway, and r (4 bytes a row) are saved; x·r and y are elementwise and recomputed bit for bit.
The backward is autograd's own derivative of that chain, operator by operator (PyTorch, derivatives.yaml).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bwsk.reversible.t5.linear import cast


def rms_statistic(x: Tensor, eps: float) -> Tensor:
    """rsqrt(mean(x²) + eps) per row of x (..., d), in float32."""
    return torch.rsqrt(cast(x, torch.float32).pow(2).mean(-1, keepdim=True) + eps)  # (..., 1)


def rms_apply(x: Tensor, r: Tensor, weight: Tensor) -> Tensor:
    """w·(x·r) for x (..., d), r (..., 1) and w (d,), in the dtype that T5LayerNorm returns."""
    h = x * r  # (..., d)
    if weight.dtype in (torch.float16, torch.bfloat16):
        h = h.to(weight.dtype)
    return weight * h


def rms_backward(
    g: Tensor, x: Tensor, r: Tensor, weight: Tensor, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients (of x through x·r, of x through r, of the weight) from g (..., d), the gradient of y.

    The two contributions to x are returned separately, because autograd adds them to the residual stream one after the
    other and floating-point addition does not associate.
    """
    h = x * r  # (..., d)
    wide = h.dtype
    if weight.dtype in (torch.float16, torch.bfloat16):
        h = h.to(weight.dtype)
    g_weight = (g * h).sum_to_size(weight.shape) if wants_weight else None  # (d,)
    del h
    g_h = cast(g * weight, wide)
    g_r = cast((g_h * x).sum_to_size(r.shape), r.dtype)  # (..., 1)
    g_product = cast(g_h * r, x.dtype)  # (..., d)
    del g_h
    g_variance = -0.5 * g_r * r.pow(3)
    wide_x = cast(x, torch.float32)
    g_square = (g_variance / x.shape[-1]) * (2.0 * wide_x)  # (..., d)
    return g_product, cast(g_square, x.dtype), g_weight
