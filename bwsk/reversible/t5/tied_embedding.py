"""The gradient of a tied embedding, without a dense copy per use.

T5's token table E (V, d) is used three times: encoder lookup, decoder lookup, output projection. Autograd makes one
dense gradient per use and adds them out of place, with three tables alive at once (T5-small: +125.5 MiB at the very end
of the backward). Here each lookup passes the table on:

    encoder lookup → table₁ → decoder lookup → table₂ → output projection

so the backward carries one dense gradient back through the lookups, each of which adds its few rows in place. The order
of addition, ((projection + decoder) + encoder), is the stock graph's. Duplicate tokens are summed first, on renumbered
tokens, by the operator that stock autograd uses, so the result is bit-identical. Since the chain is part of the graph,
partial backward passes, accumulation and DistributedDataParallel see an ordinary gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bwsk._compat import embedding_backward
from bwsk.reversible.guard import refuse_double_backward
from bwsk.reversible.t5.linear import autocast_dtype, cast, linear, linear_grad_input, linear_grad_weight


def touched_rows(g: Tensor, tokens: Tensor, padding_idx: int) -> tuple[Tensor, Tensor]:
    """Sum g (n, d) over equal tokens (n,): rows (n, d) and the table row that each belongs to (n,).

    There is no synchronisation with the host: the number of distinct tokens is not read, unused rows are zero and
    belong to row 0. `embedding_dense_backward` sums each token's rows in an order that depends on where the token
    occurs, not on its number.
    """
    ordered, order = torch.sort(tokens, stable=True)  # (n,) each
    starts = torch.ones_like(ordered)
    starts[1:] = ordered[1:] != ordered[:-1]
    rank = starts.cumsum(0).sub_(1)
    renamed = torch.empty_like(tokens).scatter_(0, order, rank)
    names = torch.zeros_like(tokens).scatter_(0, rank, ordered)
    rows = embedding_backward(g, renamed, tokens.numel(), -1, False)  # (n, d)
    if padding_idx >= 0:
        rows = rows.masked_fill_((names == padding_idx).unsqueeze(1), 0)
    return rows, names


class LookupNode(torch.autograd.Function):
    """Embedding lookup that passes the table on: (table, tokens) → (vectors, table)."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, tokens: Tensor, padding_idx: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(tokens)
        ctx.padding_idx, ctx.size = padding_idx, table.shape[0]
        return torch.nn.functional.embedding(tokens, table), table.detach()  # (B, L, d), (V, d)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_table: Tensor | None) -> tuple[Tensor | None, None, None]:
        refuse_double_backward()
        (tokens,) = ctx.saved_tensors
        if g is None or not ctx.needs_input_grad[0]:
            return g_table, None, None
        if g_table is None:
            return embedding_backward(g, tokens, ctx.size, ctx.padding_idx, False), None, None
        if tokens.numel() < ctx.size:
            rows, names = touched_rows(g.reshape(tokens.numel(), -1), tokens.reshape(-1), ctx.padding_idx)  # (B·L, d)
            g_table.index_add_(0, names, rows)
        else:
            g_table.add_(embedding_backward(g, tokens, ctx.size, ctx.padding_idx, False))
        return g_table, None, None


class ProjectionNode(torch.autograd.Function):
    """logits = x Wᵀ, saving x and W themselves rather than autocast's copies of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.dtype = autocast_dtype(x)
        ctx.save_for_backward(x, table)
        return linear(cast(x, ctx.dtype), table, ctx.dtype)  # (B, L, V)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        refuse_double_backward()
        x, table = ctx.saved_tensors
        g = g.reshape(-1, g.shape[-1])  # (B·L, V)
        g_x = linear_grad_input(g, table, ctx.dtype).view(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None
        wide = cast(x, ctx.dtype).reshape(-1, x.shape[-1])  # (B·L, d)
        return g_x, linear_grad_weight(g, wide, table) if ctx.needs_input_grad[1] else None


class TiedTable:
    """What the modules of one model share during a training forward: the table as its next use should see it."""

    def __init__(self) -> None:
        self.stop()

    def __reduce__(self) -> tuple[type[TiedTable], tuple[()]]:
        return TiedTable, ()  # a copy made during a forward, by a hook, is of no forward itself

    def start(self) -> None:
        """A training forward begins."""
        self.stop()
        self.active = True

    def stop(self) -> None:
        """From here on every module of the chain runs its stock forward."""
        self._weight: Tensor | None = None
        self._table: Tensor | None = None
        self.active = False
        self.skip_projection = False
        self.cached = False  # the stock decoder would have filled a generation cache

    def current(self, weight: Tensor) -> Tensor:
        """The table that the last lookup in `weight` passed on; `weight` itself if there was no such lookup."""
        return self._table if self._table is not None and self._weight is weight else weight

    def advance(self, weight: Tensor, table: Tensor) -> None:
        """A lookup in `weight` has passed `table` on."""
        self._weight, self._table = weight, table
