"""CUDA's choices in place of the CPU's, as far as sizes go, for steps that run on fake CPU tensors."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_cuda_accounting: ContextVar[bool] = ContextVar("bwsk_cuda_accounting", default=False)


@contextmanager
def cuda_accounting():
    """Within this context CPU (fake) tensors go through CUDA's dropout operators, so that sizes are those of CUDA."""
    token = _cuda_accounting.set(True)
    try:
        yield
    finally:
        _cuda_accounting.reset(token)


def accounts_for_cuda() -> bool:
    """Whether `cuda_accounting` is on."""
    return _cuda_accounting.get()


class _FusedAttention(torch.autograd.Function):
    """The sizes of CUDA's memory-efficient attention: it keeps q, k, v, its output and one float32 per row."""

    @staticmethod
    def forward(ctx, q, k, v, bias):
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, bias, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, g):
        q, k, v, bias, _, _ = ctx.saved_tensors
        g_bias = None
        if ctx.needs_input_grad[3]:
            g_bias = bias.new_empty((*q.shape[:-1], k.shape[-2])).sum_to_size(bias.shape)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), g_bias


@contextmanager
def cuda_rules():
    """Within it, functionals do what CUDA does otherwise than the CPU, as far as sizes go.

    Dropout keeps a boolean mask; under autocast softmax is float32 and cross-entropy keeps log-probabilities in the
    logits' dtype and a float32 copy; scaled dot-product attention is the memory-efficient kernel. The functions are
    replaced, not intercepted, because recomputation inside a backward runs outside of every function mode.
    """
    if _stock.get() is not None:
        yield
        return
    functional = torch.nn.functional
    stock = {name: getattr(functional, name) for name in _REPLACED}
    token = _stock.set(stock)
    for name, function in _REPLACED.items():
        setattr(functional, name, function)
    try:
        with cuda_accounting():
            yield
    finally:
        for name, function in stock.items():
            setattr(functional, name, function)
        _stock.reset(token)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p > 0.0 else x


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    return _FusedAttention.apply(q, k, v, attn_mask)


def _softmax(x: Tensor, *args, **kwargs) -> Tensor:
    return _stock.get()["softmax"](x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)


def _cross_entropy(x: Tensor, target: Tensor, *args, ignore_index: int = -100, **kwargs) -> Tensor:
    if torch.is_autocast_enabled("cpu") and x.dtype in (torch.float16, torch.bfloat16):
        scores = torch.log_softmax(x, -1, dtype=x.dtype)
        return torch.nn.functional.nll_loss(scores.float(), target, ignore_index=ignore_index)
    return _stock.get()["cross_entropy"](x, target, *args, ignore_index=ignore_index, **kwargs)


_REPLACED = {
    "dropout": _dropout,
    "softmax": _softmax,
    "cross_entropy": _cross_entropy,
    "scaled_dot_product_attention": _attention,
}
_stock: ContextVar[dict | None] = ContextVar("bwsk_stock_functionals", default=None)
