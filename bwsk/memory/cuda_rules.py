"""CUDA's memory use in place of the CPU's, for steps that run on fake CPU tensors.

Functions of `torch.nn.functional` are replaced while a fake step runs. They are replaced rather than intercepted,
because recomputation inside a backward runs outside every function mode. The replacement is visible to the whole
process, so it follows CUDA only in the thread that asked for it. A training in another thread gets the stock function
and bit-identical results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from bwsk._compat import native_dropout

_cuda_accounting: ContextVar[bool] = ContextVar("bwsk_cuda_accounting", default=False)


@contextmanager
def cuda_accounting() -> Iterator[None]:
    """A context in which (fake) CPU tensors go through CUDA's dropout operators, so that their sizes are CUDA's."""
    token = _cuda_accounting.set(True)
    try:
        yield
    finally:
        _cuda_accounting.reset(token)


def accounts_for_cuda() -> bool:
    """Whether `cuda_accounting` is on."""
    return _cuda_accounting.get()


class _FusedAttention(torch.autograd.Function):
    """The sizes of CUDA's memory-efficient attention, which saves q, k, v, its output and one float32 per row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))  # (B, H, L, D)
        ctx.save_for_backward(q, k, v, bias, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, _, _ = ctx.saved_tensors
        g_bias = None
        if ctx.needs_input_grad[3]:
            g_bias = bias.new_empty((*q.shape[:-1], k.shape[-2])).sum_to_size(bias.shape)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), g_bias


@contextmanager
def cuda_rules() -> Iterator[None]:
    """A context in which this thread's `torch.nn.functional` takes the memory that it takes on CUDA.

    Dropout saves a boolean mask; under autocast softmax is float32 and cross-entropy saves log-probabilities in the
    logits' dtype and a float32 copy; scaled dot-product attention is the memory-efficient kernel.
    """
    if _active.get():
        yield
        return
    _replace()
    token = _active.set(True)
    try:
        with cuda_accounting():
            yield
    finally:
        _active.reset(token)
        _restore()


def _replace() -> None:
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            for name, rule in _RULES.items():
                _stock[name] = getattr(torch.nn.functional, name)
                setattr(torch.nn.functional, name, _in_this_thread(_stock[name], rule))


def _restore() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            for name, function in _stock.items():
                setattr(torch.nn.functional, name, function)


def _in_this_thread(stock: Callable[..., Any], rule: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(stock)
    def function(*args: Any, **kwargs: Any) -> Any:
        return rule(*args, **kwargs) if _active.get() else stock(*args, **kwargs)

    return function


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return native_dropout(x, p, True)[0] if training and p > 0.0 else x


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    return _FusedAttention.apply(q, k, v, attn_mask if attn_mask is None else _aligned(attn_mask))


def _aligned(bias: Tensor) -> Tensor:
    """The bias in a layout that the kernel accepts, contiguous rows that begin at multiples of 8, else a padded copy.

    Older transformers (5.17) pass T5's position bias as a transposed view, newer ones make it contiguous.
    """
    *strides, last = bias.stride()
    if last == 1 and not any(stride % 8 for stride in strides):
        return bias
    columns = bias.shape[-1]
    return torch.nn.functional.pad(bias, (0, 8 - columns % 8))[..., :columns]


def _softmax(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _stock["softmax"](x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)


def _cross_entropy(x: Tensor, target: Tensor, *args: Any, ignore_index: int = -100, **kwargs: Any) -> Tensor:
    if torch.is_autocast_enabled("cpu") and x.dtype in (torch.float16, torch.bfloat16):
        scores = torch.log_softmax(x, -1, dtype=x.dtype)
        return torch.nn.functional.nll_loss(scores.float(), target, ignore_index=ignore_index)
    return _stock["cross_entropy"](x, target, *args, ignore_index=ignore_index, **kwargs)


_RULES: dict[str, Callable[..., Any]] = {
    "dropout": _dropout,
    "softmax": _softmax,
    "cross_entropy": _cross_entropy,
    "scaled_dot_product_attention": _attention,
}
# The stock functions that are replaced now, and by how many threads. A thread's rules apply while `_active` is set.
_stock: dict[str, Callable[..., Any]] = {}
_users = 0
_lock = Lock()
_active: ContextVar[bool] = ContextVar("bwsk_cuda_rules", default=False)
