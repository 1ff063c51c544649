"""Count what a training step allocates, storage by storage, on tensors that have no memory.

The step runs for real (model, autograd, engine) under PyTorch's `FakeTensorMode`: shapes and lifetimes are true, values
do not exist. A dispatch mode notes each new storage and a weak reference notes its end; the log is replayed afterwards,
when it is known which storages turned out to be gradients. Sizes are rounded up to 512 bytes, as CUDA's caching
allocator does. What the operators allocate inside themselves (cuBLAS workspaces, sort scratch) is not seen.

The tensors say "cpu" because a CPU build of PyTorch cannot run autograd on anything else; `cuda_rules` puts CUDA's
choices in place of the CPU's where they differ in size.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

MIB = 1 << 20
ROUND = 512
_OUT_OF_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm}
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


@dataclass
class Log:
    """Allocations (positive) and releases (negative) in order, and where each phase begins."""

    events: list[tuple[int, int]] = field(default_factory=list)  # (storage number, bytes)
    marks: list[tuple[str, int]] = field(default_factory=list)  # (phase, index of its first event)
    sizes: dict[int, int] = field(default_factory=dict)


class Tracker(TorchDispatchMode):
    """Within it, every storage that an operator returns is counted until it dies."""

    def __init__(self) -> None:
        super().__init__()
        self.log = Log()
        self._alive: dict[int, tuple[weakref.ref, int]] = {}
        self._count = 0
        self.flops = 0

    def number(self, tensor: Tensor) -> int | None:
        """The number under which the storage of `tensor` is known, or None."""
        entry = self._alive.get(tensor.untyped_storage()._cdata)
        return entry[1] if entry else None

    def adopt(self, tensor: Tensor) -> int:
        """Count a storage that existed before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return self._alive[key][1]
        size = -(-storage.nbytes() // ROUND) * ROUND
        self._count += 1
        number = self._count

        def ended(_: weakref.ref) -> None:
            if self._alive.pop(key, None) is not None:
                self.log.events.append((number, -size))

        self._alive[key] = (weakref.ref(storage, ended), number)
        self.log.sizes[number] = size
        self.log.events.append((number, size))
        return number

    def stop(self) -> None:
        """Log nothing from here on."""
        self.log = Log(list(self.log.events), list(self.log.marks), dict(self.log.sizes))
        self._alive = {}

    def mark(self, phase: str) -> None:
        """A phase of the step begins."""
        self.log.marks.append((phase, len(self.log.events)))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        formula = flop_registry.get(packet) or flop_registry.get(_OUT_OF_PLACE.get(packet))
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for item in (result,) if isinstance(result, Tensor) else tree_iter(result):
            if isinstance(item, Tensor):
                self.adopt(item)
        return result


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
