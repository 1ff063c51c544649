"""Dropout whose residue is one bit per element.

Dropout is K-type: it erases the elements it drops, and which ones it drops is not a function of its input. All that is
lost is the mask m, so one bit per element is the whole residue; from it y = x·m/(1-p) is recomputed bit for bit.

The two devices draw and scale differently, and both are followed exactly (PyTorch, aten/src/ATen/native/Dropout.cpp
and cuda/Dropout.cu). CUDA saves a boolean mask and multiplies x·m·s, where s is 1/(1-p) rounded in the accumulation
type in the forward and in double in the backward. The CPU draws a noise tensor of x's own dtype, m/(1-p), and
multiplies by that in both directions.

Bits are packed eight to a byte with one multiplication of a 64-bit word, which needs no host synchronisation and no
random state, so that a CUDA graph can record it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bwsk._compat import native_dropout, native_dropout_backward
from bwsk.memory.cuda_rules import accounts_for_cuda

# Byte k of a word holds mask element k as 0 or 1. Times the sum of 2**(9j), j = 0..7, element k lands on bit 63-k: the
# top byte is the packed octet, and no two partial products share a bit. The same factor spreads an octet out again.
_SPREAD = 0x8040201008040201 - (1 << 64)
_TOPS = 0x8080808080808080 - (1 << 64)


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a boolean mask of n elements, any shape, into ceil(n/8) bytes (uint8, one dimension)."""
    flat = mask.reshape(-1)
    if flat.numel() % 8:
        flat = torch.nn.functional.pad(flat, (0, 8 - flat.numel() % 8))
    return flat.view(torch.int64).mul(_SPREAD).view(torch.uint8)[7::8].clone(memory_format=torch.contiguous_format)


def unpack_bits(bits: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The boolean mask of `shape` that `pack_bits` packed; a mask that is already unpacked is returned unchanged."""
    if bits.dtype is torch.bool:
        return bits
    flat = bits.to(torch.int64).mul_(_SPREAD).bitwise_and_(_TOPS).view(torch.uint8) != 0
    count = 1
    for size in shape:
        count *= size
    return (flat if flat.numel() == count else flat[:count]).view(shape)


def acts_as_cuda(x: Tensor) -> bool:
    """Whether CUDA's operators and rules apply to x: it is on CUDA, or its sizes are accounted as if it were."""
    return x.is_cuda or accounts_for_cuda()


def _forward_scale(x: Tensor, p: float) -> float:
    if x.dtype is torch.float64:
        return 1.0 / (1.0 - p)
    return float(np.float32(1.0) / np.float32(1.0 - p))


def dropout_forward(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    """`F.dropout(x, p, training=True)`, bit-identical, and its residue (packed bits, or None where p is 0)."""
    if p == 0.0 or x.numel() == 0:
        return x, None
    if p >= 1.0:
        mask = torch.zeros_like(x, dtype=torch.bool)
        return x * mask, pack_bits(mask)
    if acts_as_cuda(x):
        y, mask = native_dropout(x, p, True)
        return y, pack_bits(mask)
    noise = torch.empty_like(x).bernoulli_(1.0 - p).div_(1.0 - p)
    return x * noise, pack_bits(noise != 0)


def dropout_replay(x: Tensor, bits: Tensor | None, p: float) -> Tensor:
    """Dropout of x again, with the mask saved in `bits`; bit-identical to the forward."""
    if bits is None:
        return x
    mask = unpack_bits(bits, x.shape)
    if p >= 1.0:
        return x * mask
    if acts_as_cuda(x):
        return native_dropout_backward(x, mask, _forward_scale(x, p))
    return x * mask.to(x.dtype).div_(1.0 - p)


def dropout_backward(g: Tensor, bits: Tensor | None, p: float, own: bool = False) -> Tensor:
    """Gradient of dropout's input, from the gradient g of its output; with `own`, g may be overwritten."""
    if bits is None:
        return g
    mask = unpack_bits(bits, g.shape)
    if p >= 1.0:
        return g.mul_(mask) if own else g * mask
    if not acts_as_cuda(g):
        noise = mask.to(g.dtype).div_(1.0 - p)
        return g.mul_(noise) if own else g * noise
    scale = 1.0 / (1.0 - p)
    if own:  # (g·m)·s in two steps: the first one is exact, so both round once
        return g.mul_(mask).mul_(scale)
    return native_dropout_backward(g, mask, scale)


def rescale_(g: Tensor, p: float) -> Tensor:
    """Dropout's gradient in place as if nothing had been dropped, with the rounding of `dropout_backward`."""
    if p == 0.0 or g.numel() == 0:
        return g
    if p >= 1.0:
        return g.zero_()
    if acts_as_cuda(g):
        return g.mul_(1.0 / (1.0 - p))
    return g.mul_(torch.ones((), dtype=g.dtype).div_(1.0 - p))


def random_state(device: torch.device) -> Tensor:
    """The state of the random generator of `device`."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def restored_random_state(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Run the block from the generator's earlier `state`, then restore the current one; with None, change nothing."""
    if state is None:
        yield
        return
    current = random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(current, device)


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        y, bits = dropout_forward(x, p)
        ctx.p = p
        ctx.save_for_backward(bits)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        from bwsk.reversible.guard import refuse_double_backward

        refuse_double_backward()
        (bits,) = ctx.saved_tensors
        return dropout_backward(g, bits, ctx.p), None


def dropout(x: Tensor, p: float) -> Tensor:
    """Differentiable `F.dropout(x, p, training=True)` that saves one bit per element."""
    return x if p == 0.0 else _Dropout.apply(x, p)
