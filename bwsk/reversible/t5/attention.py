"""T5's attention sublayer, x + dropout(o(attention(norm(x)))): its forward, and its backward from what was saved.

    q, k, v = W n(x);  P = softmax(q kᵀ + bias + mask);  out = dropout(P) v;  y = x + dropout(W_o out)

Shapes: B sequences, L queries, S keys (L in self-attention), H heads of width D, hidden states of width d.

S-phases between two matrix products are recomputed from their input. Of the K-operations only the residue is saved: one
bit per element for the two dropouts, one statistic per row for the norm. Every operator runs on the same operands, in
the same layout and order as in transformers' eager T5 and in autograd's derivative of it, so the gradients are
bit-identical. Contributions that autograd adds one by one (k and v of the encoder states; residual, product and
square of the norm) are returned separately, and autograd adds them in its own order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bwsk._compat import softmax_backward_out
from bwsk.reversible.dropout import (
    acts_as_cuda,
    dropout_backward,
    dropout_forward,
    dropout_replay,
    random_state,
    restored_random_state,
    unpack_bits,
)
from bwsk.reversible.plan import Level
from bwsk.reversible.t5.linear import as_forward, cast, linear, linear_grad_input, linear_grad_weight
from bwsk.reversible.t5.rms_norm import rms_apply, rms_backward, rms_statistic

# (q, k, v, mask, bias) → out (B, L, H, D), for q, k and v by head.
Core = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


@dataclass
class AttentionCall:
    """One run of one attention sublayer: everything about it that is not a tensor."""

    heads: int
    width: int
    eps: float
    scaling: float
    p_core: float
    p_out: float
    dtype: torch.dtype | None
    level: str = Level.SAVE_CONTEXT
    cached: bool = False  # the stock step fills a generation cache, which leaves keys and values contiguous by head
    core: Core | None = None  # an attention implementation other than eager, rerun as a whole


@dataclass
class AttentionTape:
    """What the forward of one attention sublayer produced; its level decides what of it is saved."""

    rms_inv: Tensor | None = None  # (B, L, 1)
    q: Tensor | None = None  # (B, L, H·D)
    k: Tensor | None = None  # (B, S, H·D)
    v: Tensor | None = None  # (B, S, H·D)
    out: Tensor | None = None  # (B, L, H·D)
    core_bits: Tensor | None = None  # one bit per score; the random state where a core draws its own dropout
    out_bits: Tensor | None = None  # one bit per element of y

    def projections(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, once `_project` has filled them in."""
        assert self.q is not None
        assert self.k is not None
        assert self.v is not None
        return self.q, self.k, self.v


@dataclass
class AttentionWeights:
    """The weights of one attention sublayer."""

    norm: Tensor  # (d,)
    q: Tensor  # (H·D, d)
    k: Tensor  # (H·D, d)
    v: Tensor  # (H·D, d)
    o: Tensor  # (d, H·D)


def attention_weights(layer: nn.Module) -> AttentionWeights:
    """The five weights of a T5LayerSelfAttention or T5LayerCrossAttention."""
    modules: dict[str, Any] = layer._modules
    attention = modules["SelfAttention"] if "SelfAttention" in modules else modules["EncDecAttention"]
    inner = attention._modules
    return AttentionWeights(
        modules["layer_norm"]._parameters["weight"], *(inner[name]._parameters["weight"] for name in "qkvo")
    )


def _heads(x: Tensor, call: AttentionCall) -> Tensor:
    """A view of (B, L, H·D) as (B, H, L, D)."""
    return x.view(*x.shape[:-1], call.heads, call.width).transpose(1, 2)


def _keys(call: AttentionCall, x: Tensor) -> Tensor:
    """Keys or values by head, in the layout of the stock step, on which the rounding depends."""
    x = _heads(x, call)  # (B, H, S, D)
    return x.contiguous() if call.cached else x


def _flat(x: Tensor) -> Tensor:
    """(B, H, L, D) as (B·H, L, D); copied where the layout requires it, as in matmul."""
    return x.reshape(-1, *x.shape[-2:])


def _rows(x: Tensor) -> Tensor:
    """(B, L, n) as (B·L, n)."""
    return x.reshape(-1, x.shape[-1])


def _probabilities(
    call: AttentionCall, q3: Tensor, kt3: Tensor, batch: int, bias: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, torch.dtype]:
    """softmax(q kᵀ + bias + mask) of q3 (B·H, L, D) and kt3 (B·H, D, S), and the dtype of the raw scores."""
    with as_forward(call.dtype, q3.device.type):
        scores = q3.bmm(kt3)  # (B·H, L, S)
    raw = scores.dtype
    scores = scores.view(batch, call.heads, *scores.shape[-2:])  # (B, H, L, S)
    if call.scaling != 1.0:
        scores = scores * call.scaling
    for term in (bias, mask):
        if term is not None:
            in_place = torch.result_type(scores, term) == scores.dtype
            scores = scores.add_(term) if in_place else scores + term
    if call.dtype is not None and acts_as_cuda(scores):
        # Autocast's rule for softmax, which the CPU does not have. From float16 it is a single kernel on CUDA, which
        # sums long rows in another order than the float32 one.
        if scores.is_cuda and scores.dtype is torch.float16:
            return torch.softmax(scores, dim=-1, dtype=torch.float32), raw
        scores = scores.to(torch.float32)
    return torch.softmax(scores, dim=-1), raw


def _project(
    call: AttentionCall, tape: AttentionTape, w: AttentionWeights, x: Tensor, states: Tensor | None
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Fill in rms_inv, q, k and v of the tape.

    Returns the norm's output in the compute dtype, the source of k and v, and the dtype that the norm itself returned.
    """
    if tape.rms_inv is None:
        tape.rms_inv = rms_statistic(x, call.eps)  # (B, L, 1)
    normed = rms_apply(x, tape.rms_inv, w.norm)  # (B, L, d)
    own_dtype, normed = normed.dtype, cast(normed, call.dtype)
    source = normed if states is None else cast(states, call.dtype)  # (B, S, d)
    if tape.q is None:
        with as_forward(call.dtype, x.device.type):
            tape.q = linear(normed, w.q, call.dtype)  # (B, L, H·D)
            tape.k = linear(source, w.k, call.dtype)  # (B, S, H·D)
            tape.v = linear(source, w.v, call.dtype)  # (B, S, H·D)
    return normed, source, own_dtype


def attention_forward(
    call: AttentionCall,
    w: AttentionWeights,
    x: Tensor,
    states: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    tape: AttentionTape | None = None,
) -> tuple[Tensor, AttentionTape]:
    """y (B, L, d) and the tape; with a tape of saved residues, the same forward is recomputed from them.

    x: (B, L, d); states: (B, S, d) in cross-attention, else None; bias and mask broadcast to (B, H, L, S).
    """
    again = tape is not None
    if tape is None:
        tape = AttentionTape()
    _project(call, tape, w, x, states)
    if call.core is not None:
        if not again and call.p_core > 0.0:
            tape.core_bits = random_state(x.device)
        tape.out = _run_core(call, call.core, tape, bias, mask, again)[0].detach()  # (B, L, H·D)
        return _finish(call, w, x, tape.out, tape, again), tape
    q, k, v = tape.projections()
    q3, kt3 = _flat(_heads(q, call)), _flat(_keys(call, k).transpose(2, 3))  # (B·H, L, D), (B·H, D, S)
    probabilities, _ = _probabilities(call, q3, kt3, x.shape[0], bias, mask)  # (B, H, L, S)
    del q3, kt3
    if again:
        dropped = dropout_replay(probabilities, tape.core_bits, call.p_core)
    else:
        dropped, tape.core_bits = dropout_forward(probabilities, call.p_core)
    del probabilities
    tape.out = _context(call, dropped, v, x.shape)  # (B, L, H·D)
    del dropped
    return _finish(call, w, x, tape.out, tape, again), tape


def _finish(
    call: AttentionCall, w: AttentionWeights, x: Tensor, out: Tensor, tape: AttentionTape, again: bool
) -> Tensor:
    """x + dropout(W_o out)."""
    with as_forward(call.dtype, x.device.type):
        projected = linear(out, w.o, call.dtype)  # (B, L, d)
    if again:
        projected = dropout_replay(projected, tape.out_bits, call.p_out)
    else:
        projected, tape.out_bits = dropout_forward(projected, call.p_out)
    return x + projected


def _run_core(
    call: AttentionCall, core: Core, tape: AttentionTape, bias: Tensor | None, mask: Tensor | None, again: bool
) -> tuple[Tensor, list[Tensor]]:
    """Run an attention implementation with its own graph: out (B, L, H·D) and the graph's leaves.

    The leaves are q, k, v and, if it requires a gradient, the bias. The forward makes the graph too and drops it,
    because which kernel an implementation picks depends on what requires gradients. Dropout is drawn inside the kernel,
    so its residue is the state of the random generator.
    """
    q, k, v = tape.projections()
    by_head = (_heads(q, call), _keys(call, k), _keys(call, v))  # (B, H, L, D), (B, H, S, D) twice
    leaves = [t.detach().requires_grad_() for t in by_head]
    if bias is not None and bias.requires_grad:
        bias = bias.detach().requires_grad_()
        leaves.append(bias)
    device = leaves[0].device
    state = tape.core_bits if again else None
    with torch.enable_grad(), as_forward(call.dtype, device.type), restored_random_state(state, device):
        out = core(leaves[0], leaves[1], leaves[2], mask, bias)  # (B, L, H, D)
        return out.reshape(*out.shape[:2], -1).contiguous(), leaves


def _context(call: AttentionCall, dropped: Tensor, v: Tensor, shape: torch.Size) -> Tensor:
    """dropout(P) v for `dropped` (B, H, L, S), contiguous."""
    v3 = _flat(_keys(call, v))  # (B·H, S, D)
    with as_forward(call.dtype, v.device.type):
        out = _flat(cast(dropped, call.dtype)).bmm(v3).view(shape[0], call.heads, shape[1], call.width)
    return out.transpose(1, 2).contiguous().reshape(*shape[:-1], -1).contiguous()  # (B, L, H·D)


def attention_backward(
    call: AttentionCall,
    w: AttentionWeights,
    tape: AttentionTape,
    x: Tensor,
    states: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    g: Tensor,
    wants: tuple[bool, ...],
) -> tuple[
    tuple[Tensor, Tensor, Tensor], Tensor | None, tuple[Tensor | None, Tensor | None], tuple[Tensor | None, ...]
]:
    """Gradients from g (B, L, d), the gradient of y.

    `wants`: which of (bias, norm, q, k, v, o) need one. Returns those of x (residual, product, square), of the bias, of
    the encoder states (through v, through k) and of the weights (norm, q, k, v, o); None where not wanted.
    """
    wants_bias, wants_norm, wants_q, wants_k, wants_v, wants_o = wants
    normed, source, through = _project(call, tape, w, x, states)
    assert tape.rms_inv is not None
    if call.core is None:
        g_q, g_k, g_v, g_bias, gw_o = _core_backward(call, w, tape, x.shape, bias, mask, g, wants_bias, wants_o)
    else:
        g_q, g_k, g_v, g_bias, gw_o = _other_core_backward(call, call.core, w, tape, bias, mask, g, wants_o)
    source2, normed2 = _rows(source), _rows(normed)  # (B·S, d), (B·L, d)
    gw_v = linear_grad_weight(g_v, source2, w.v) if wants_v else None
    gw_k = linear_grad_weight(g_k, source2, w.k) if wants_k else None
    gw_q = linear_grad_weight(g_q, normed2, w.q) if wants_q else None
    del source2, normed2, source, normed
    from_v = cast(linear_grad_input(g_v, w.v, call.dtype), through)  # (B·S, d)
    from_k = cast(linear_grad_input(g_k, w.k, call.dtype), through)
    from_q = cast(linear_grad_input(g_q, w.q, call.dtype), through)  # (B·L, d)
    del g_v, g_k, g_q
    g_states: tuple[Tensor | None, Tensor | None] = (None, None)
    if states is None:
        g_normed = from_v.add_(from_k).add_(from_q)
    else:
        g_normed = from_q
        g_states = (cast(from_v.view(states.shape), states.dtype), cast(from_k.view(states.shape), states.dtype))
    g_product, g_square, gw_norm = rms_backward(g_normed.view(x.shape), x, tape.rms_inv, w.norm, wants_norm)
    return (cast(g, x.dtype), g_product, g_square), g_bias, g_states, (gw_norm, gw_q, gw_k, gw_v, gw_o)


def _core_backward(
    call: AttentionCall,
    w: AttentionWeights,
    tape: AttentionTape,
    shape: torch.Size,
    bias: Tensor | None,
    mask: Tensor | None,
    g: Tensor,
    wants_bias: bool,
    wants_o: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Through dropout, W_o, eager attention and the split into heads: gradients of q, k, v as rows, bias and W_o."""
    batch, length, _ = shape
    q, k, v = tape.projections()
    q3, kt3 = _flat(_heads(q, call)), _flat(_keys(call, k).transpose(2, 3))  # (B·H, L, D), (B·H, D, S)
    p, raw = _probabilities(call, q3, kt3, batch, bias, mask)  # (B, H, L, S)
    mask_bits = None if tape.core_bits is None else unpack_bits(tape.core_bits, p.shape)  # once for both directions
    dropped = dropout_replay(p, mask_bits, call.p_core)
    out = tape.out if tape.out is not None else _context(call, dropped, v, shape)  # (B, L, H·D)

    g_o = _rows(dropout_backward(cast(g, out.dtype), tape.out_bits, call.p_out))  # (B·L, d)
    gw_o = linear_grad_weight(g_o, _rows(out), w.o) if wants_o else None
    g_out = linear_grad_input(g_o, w.o, call.dtype)  # (B·L, H·D)
    del g_o, out
    g3 = _flat(g_out.view(batch, length, call.heads, call.width).transpose(1, 2))  # (B·H, L, D)
    del g_out
    g_v3 = _flat(cast(dropped, call.dtype)).transpose(1, 2).bmm(g3)  # (B·H, S, D)
    del dropped
    v3 = _flat(_keys(call, v))  # (B·H, S, D)
    g_p = cast(g3.bmm(v3.transpose(1, 2)).view(p.shape), p.dtype)  # (B, H, L, S)
    del g3, v3
    # Both in place: an elementwise product, and a row operation that reads its row before it writes it.
    g_p = dropout_backward(g_p, mask_bits, call.p_core, own=True)
    g_scores = softmax_backward_out(g_p, p, -1, p.dtype, grad_input=g_p)
    del g_p, p
    g_bias = cast(g_scores.sum_to_size(bias.shape), bias.dtype) if bias is not None and wants_bias else None
    g_scores = cast(g_scores, raw)
    if call.scaling != 1.0:
        g_scores = g_scores * call.scaling
    g_scores = _flat(g_scores)  # (B·H, L, S)
    g_q3 = g_scores.bmm(kt3.transpose(1, 2))  # (B·H, L, D)
    g_kt3 = q3.transpose(1, 2).bmm(g_scores)  # (B·H, D, S)
    del g_scores, q3, kt3

    g_v = _merge(g_v3.view(batch, call.heads, -1, call.width))  # (B·S, H·D)
    g_k = _merge(g_kt3.view(batch, call.heads, call.width, -1).transpose(2, 3))
    g_q = _merge(g_q3.view(batch, call.heads, -1, call.width))
    return g_q, g_k, g_v, g_bias, gw_o


def _merge(g: Tensor) -> Tensor:
    """(B, H, L, D) as (B·L, H·D)."""
    return _rows(g.transpose(1, 2).reshape(g.shape[0], g.shape[2], -1))


def _other_core_backward(
    call: AttentionCall,
    core: Core,
    w: AttentionWeights,
    tape: AttentionTape,
    bias: Tensor | None,
    mask: Tensor | None,
    g: Tensor,
    wants_o: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `_core_backward`, through an attention implementation that is rerun with its own graph."""
    out, leaves = _run_core(call, core, tape, bias, mask, again=True)  # (B, L, H·D)
    g_o = _rows(dropout_backward(cast(g, out.dtype), tape.out_bits, call.p_out))  # (B·L, d)
    gw_o = linear_grad_weight(g_o, _rows(out.detach()), w.o) if wants_o else None
    g_out = linear_grad_input(g_o, w.o, call.dtype).view(out.shape)  # (B, L, H·D)
    g_q, g_k, g_v, *g_bias = torch.autograd.grad(out, leaves, g_out)
    return _merge(g_q), _merge(g_k), _merge(g_v), g_bias[0] if g_bias else None, gw_o
