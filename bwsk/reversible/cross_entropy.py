"""The vocabulary loss without three copies of the logits.

Stock cross-entropy holds logits, log-probabilities, the gradient of the loss and the gradient of the softmax, each
(n, V) for n tokens and a vocabulary of V: 125.5 MiB apiece for T5-small at 4 x 256 tokens.

`cross_entropy` saves the logits alone. The log-probabilities are an S-phase of them, recomputed in blocks of rows, and
the gradient is written over the logits block by block. The two matrix products stay whole, and the results are
bit-identical to the stock loss. If somebody else still holds the logits when the backward runs, the gradient gets
memory of its own instead.

`chunked_cross_entropy` never makes the full logits: it goes through the rows once, in the forward, and saves the
gradients of the hidden states and of the table. Its sums are ordered differently from the stock loss, so it is equally
exact but not bit-identical, and there are no logits to return. The idea is Liger Kernel's fused linear cross-entropy.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from bwsk._compat import FakeTensor, log_softmax_backward, nll_loss_backward, nll_loss_forward, storage_holders
from bwsk.errors import BwskError
from bwsk.reversible.dropout import acts_as_cuda
from bwsk.reversible.guard import refuse_double_backward, refuse_second_backward

# Upper limit on the number of row blocks; for larger batches the blocks grow instead.
MOST_BLOCKS = 64
# Rows of one chunk of the head without logits: 128 rows of a T5 vocabulary are 16 MiB, of which two are alive.
CHUNK_ROWS = 128


class _HolderCalibration(torch.autograd.Function):
    """Notes, in a backward, how many holders `storage_holders` counts for a saved tensor."""

    seen = -1

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.detach())
        return x.sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        _HolderCalibration.seen = storage_holders(x)
        return g.expand(x.shape)


@cache
def _sole_holders() -> int:
    """What `storage_holders` returns, inside a backward, for a saved tensor that nobody else holds (measured)."""
    with torch.enable_grad(), torch.device("cpu"):
        _HolderCalibration.apply(torch.ones(2, 2, requires_grad=True) * 2.0).backward()
    return _HolderCalibration.seen


class CrossEntropyNode(torch.autograd.Function):
    """Negative log-likelihood of (..., V) logits, their mean or sum; the backward overwrites the logits if nobody else
    holds them.

    It saves an alias of the logits, not the tensor that the caller gets. An alias counts as one more holder of the
    memory, which distinguishes a caller who still holds the logits from one who dropped them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        whole: Tensor,
        labels: Tensor,
        ignore_index: int,
        scores_dtype: torch.dtype,
        wide: bool,
        width: int,
        reduction: int,
    ) -> Tensor:
        saved = whole.detach()
        logits = saved.view(-1, saved.shape[-1])  # (n, V)
        n = logits.shape[0]
        ctx.rows = block_rows(n, width)
        picked = torch.empty((n, 1), dtype=scores_dtype, device=logits.device)
        safe = torch.where(labels == ignore_index, 0, labels)  # (n,)
        for rows in _blocks(n, ctx.rows):
            scores = torch.log_softmax(logits[rows].to(scores_dtype), -1)  # (rows, V)
            picked[rows] = scores.gather(1, safe[rows, None])
            del scores
        if wide:
            picked = picked.to(torch.float32)
        column = torch.where(labels == ignore_index, ignore_index, 0)
        loss, weight = nll_loss_forward(picked, column, None, reduction, ignore_index)
        ctx.save_for_backward(saved, labels, weight)
        ctx.ignore_index, ctx.dtype, ctx.wide, ctx.reduction = ignore_index, scores_dtype, wide, reduction
        ctx.overwritten = False
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        refuse_second_backward(ctx, "hold outputs.logits until the last one, which are then left alone")
        saved, labels, weight = ctx.saved_tensors
        ctx.overwritten = isinstance(saved, FakeTensor) or 0 <= storage_holders(saved) <= _sole_holders()
        result = saved if ctx.overwritten else torch.empty_like(saved)
        logits, out = saved.view(-1, saved.shape[-1]), result.view(-1, saved.shape[-1])  # (n, V)
        n = logits.shape[0]
        for rows in _blocks(n, ctx.rows):
            scores = torch.log_softmax(logits[rows].to(ctx.dtype), -1)  # (rows, V)
            wide = scores.to(torch.float32) if ctx.wide else scores
            g_scores = nll_loss_backward(g, wide, labels[rows], None, ctx.reduction, ctx.ignore_index, weight)
            del wide
            g_logits = log_softmax_backward(g_scores.to(ctx.dtype), scores, -1, ctx.dtype)
            del g_scores, scores
            out[rows] = g_logits
            del g_logits
        return result, None, None, None, None, None, None


def block_rows(n: int, width: int) -> int:
    """Rows per block.

    The three temporaries of a block (rows, V) take no more than the gradient of the table (V, width) that follows them,
    so they cost nothing at the peak. It is a multiple of 8, so that each row of a block is aligned to 16 bytes as in
    the whole tensor, whatever V is. CUDA's row sums start at an aligned address, so their order, and with it their
    rounding, depends on that.
    """
    return max(8, width // 24 * 8, -(-n // (8 * MOST_BLOCKS)) * 8)


def chunk_rows(n: int) -> int:
    """Rows per chunk of the head without logits."""
    return max(CHUNK_ROWS, -(-n // MOST_BLOCKS))


def _blocks(n: int, step: int) -> list[slice]:
    """Slices of `step` rows that cover n."""
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


# PyTorch's numbers for the reductions of a loss.
_REDUCTIONS = {"mean": 1, "sum": 2}


def cross_entropy(
    logits: Tensor, labels: Tensor, width: int, ignore_index: int = -100, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """`F.cross_entropy(…)` of contiguous logits (..., V) and labels (n,): the same bits, one copy of the logits.

    `width` is that of the hidden states that the logits come from; blocks are as large as costs no memory
    (`block_rows`).

    Under autocast the stock loss depends on the device, and this one follows it: on CUDA it rounds the
    log-probabilities to the logits' dtype before summing them in float32, on the CPU it works in float32 throughout.
    """
    dtype, wide = logits.dtype, False
    if torch.is_autocast_enabled(logits.device.type) and dtype in (torch.float16, torch.bfloat16):
        wide = True
        if not acts_as_cuda(logits) or _widens_first(logits.device, dtype):
            dtype = torch.float32
    return CrossEntropyNode.apply(logits, labels, ignore_index, dtype, wide, width, _REDUCTIONS[reduction])


@cache
def _widens_first(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether autocast on this device casts the logits to float32, not the log-probabilities; read off its graph."""
    with torch.enable_grad():
        probe = torch.zeros((1, 2), dtype=dtype, device=device).requires_grad_()
        loss = torch.nn.functional.cross_entropy(probe, torch.zeros(1, dtype=torch.long, device=device))
    node: Any = loss.grad_fn
    return "LogSoftmax" in node.next_functions[0][0].name()


class ChunkedNode(torch.autograd.Function):
    """Loss and its gradients in one pass over blocks of rows: (x, table, labels) → loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        rows_x, labels = x.reshape(-1, x.shape[-1]), labels.reshape(-1)  # (n, d), (n,)
        valid = labels != ignore_index
        count = valid.sum().to(torch.float32)
        safe = torch.where(valid, labels, 0)
        g_x = torch.empty_like(rows_x)
        g_table = torch.zeros_like(table)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        chunk = chunk_rows(rows_x.shape[0])
        numbers = torch.arange(chunk, device=x.device)
        for rows in _blocks(rows_x.shape[0], chunk):
            logits = rows_x[rows].mm(table.t())  # (rows, V)
            top = logits.amax(1, keepdim=True)  # (rows, 1)
            picked = logits.gather(1, safe[rows, None])
            mass = logits.sub_(top).exp_().sum(1, keepdim=True)
            nll = (mass.log() + top - picked).squeeze(1)  # (rows,)
            total += torch.where(valid[rows], nll, 0).sum()
            logits.div_(mass)
            # Not scatter_add_: to be deterministic on CUDA, some releases of torch copy strides from the host in it,
            # which a CUDA graph cannot record.
            logits[numbers[: logits.shape[0]], safe[rows]] -= 1.0
            logits.mul_(torch.where(valid[rows], 1.0 / count, 0.0).unsqueeze(1))
            torch.mm(logits, table, out=g_x[rows])
            g_table.addmm_(logits.t(), rows_x[rows])
            del logits
        ctx.save_for_backward(g_x.view(x.shape), g_table)
        ctx.overwritten = False
        return total / count

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        refuse_second_backward(ctx, "use another budget than balanced")
        ctx.overwritten = True
        g_x, g_table = ctx.saved_tensors
        return g_x.mul_(g), g_table.mul_(g), None, None


def chunked_cross_entropy(x: Tensor, table: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Cross-entropy of x·tableᵀ for float32 x (..., d), table (V, d) and labels (...), without ever making the logits.

    Raises `BwskError` for another dtype.
    """
    if x.dtype is not torch.float32 or table.dtype is not torch.float32:
        raise BwskError(f"chunked loss head: needs float32, found {x.dtype} and {table.dtype}; use budget='fast'")
    return ChunkedNode.apply(x, table, labels, ignore_index)
