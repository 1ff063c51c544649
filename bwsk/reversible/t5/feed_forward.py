"""T5's feed-forward sublayer, x + dropout(W_o dropout(f(W_i n(x)))): its forward, and its backward from what was saved.

Shapes: B sequences of L tokens, hidden states of width d, hidden activations of width f.

ReLU (v1.0) erases the negative half and dropout a tenth. Both erasures can be read off the one tensor that the next
matrix product needs anyway, h = dropout(relu(a)), because the gradient passes where h > 0. So h alone is saved, in
place of relu(a), h and a mask. The gated form (v1.1), f = act(a₀)·a₁, saves a₀ and a₁ and recomputes the product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bwsk._compat import threshold_backward_out
from bwsk.reversible.dropout import dropout_backward, dropout_forward, dropout_replay, rescale_
from bwsk.reversible.plan import Level
from bwsk.reversible.t5.linear import as_forward, cast, linear, linear_grad_input, linear_grad_weight
from bwsk.reversible.t5.rms_norm import rms_apply, rms_backward, rms_statistic


@dataclass
class FeedForwardCall:
    """One run of one feed-forward sublayer: everything about it that is not a tensor."""

    eps: float
    p_hidden: float
    p_out: float
    act: Callable[[Tensor], Tensor]
    rectified: bool
    dtype: torch.dtype | None
    out_dtype: torch.dtype | None  # of W_o: as dtype, or None where it runs outside autocast
    level: str = Level.SAVE_CONTEXT


@dataclass
class FeedForwardTape:
    """What the forward of one feed-forward sublayer produced; its level decides what of it is saved."""

    rms_inv: Tensor | None = None  # (B, L, 1)
    a: Tensor | None = None  # (B, L, f), the pre-activation; None for ReLU
    b: Tensor | None = None  # (B, L, f), the second, linear branch of the gated form
    h: Tensor | None = None  # (B, L, f), what W_o multiplies
    hidden_bits: Tensor | None = None  # one bit per element of h
    out_bits: Tensor | None = None  # one bit per element of y


@dataclass
class FeedForwardWeights:
    """The weights of one feed-forward sublayer; `second` is the linear branch of the gated form."""

    norm: Tensor  # (d,)
    first: Tensor  # (f, d)
    second: Tensor | None  # (f, d)
    o: Tensor  # (d, f)


def feedforward_weights(layer: nn.Module) -> FeedForwardWeights:
    """The weights of a T5LayerFF; `second` is None in the ungated form."""
    modules: dict[str, Any] = layer._modules
    dense = modules["DenseReluDense"]._modules
    norm = modules["layer_norm"]._parameters["weight"]
    if "wi" in dense:
        return FeedForwardWeights(norm, dense["wi"]._parameters["weight"], None, dense["wo"]._parameters["weight"])
    names = ("wi_0", "wi_1", "wo")
    return FeedForwardWeights(norm, *(dense[name]._parameters["weight"] for name in names))


def _activate(call: FeedForwardCall, a: Tensor, b: Tensor | None = None) -> Tensor:
    """f of the pre-activations, under the autocast state of the forward."""
    with as_forward(call.dtype, a.device.type):
        return call.act(a) if b is None else call.act(a) * b


def feedforward_forward(call: FeedForwardCall, w: FeedForwardWeights, x: Tensor) -> tuple[Tensor, FeedForwardTape]:
    """y (B, L, d) of x (B, L, d), and the tape."""
    tape = FeedForwardTape()
    tape.h, tape.hidden_bits = dropout_forward(_hidden(call, w, x, tape), call.p_hidden)
    entering = _entering(call, tape.h, w.o)
    with as_forward(call.out_dtype, x.device.type):
        projected = linear(entering, w.o, call.out_dtype)  # (B, L, d)
    del entering
    projected, tape.out_bits = dropout_forward(projected, call.p_out)
    return x + projected, tape


def _hidden(call: FeedForwardCall, w: FeedForwardWeights, x: Tensor, tape: FeedForwardTape) -> Tensor:
    """f(W_i n(x)), before dropout; fills in rms_inv and, where the gradient needs them, a and b of the tape."""
    if tape.rms_inv is None:
        tape.rms_inv = rms_statistic(x, call.eps)  # (B, L, 1)
    normed = cast(rms_apply(x, tape.rms_inv, w.norm), call.dtype)  # (B, L, d)
    with as_forward(call.dtype, x.device.type):
        a = linear(normed, w.first, call.dtype)  # (B, L, f)
        b = None if w.second is None else linear(normed, w.second, call.dtype)
    if call.rectified:
        return call.act(a)
    tape.a, tape.b = a, b
    return _activate(call, a, b)


def _entering(call: FeedForwardCall, h: Tensor, weight: Tensor) -> Tensor:
    """h in the dtype that W_o is computed in."""
    return cast(h, weight.dtype if call.out_dtype is None else call.out_dtype)


def _hidden_gradient(call: FeedForwardCall, tape: FeedForwardTape, g: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of the pre-activations a and b from g, the gradient of dropout's output, which is overwritten."""
    if call.rectified:
        # Dropped elements and negative ones are both zero in h, so one comparison replaces both masks.
        g = rescale_(g, call.p_hidden)
        return threshold_backward_out(g, tape.h, 0, grad_input=g), None
    g = dropout_backward(g, tape.hidden_bits, call.p_hidden, own=True)
    with torch.enable_grad():
        leaves = [branch.detach().requires_grad_() for branch in (tape.a, tape.b) if branch is not None]
        g_a, *g_b = torch.autograd.grad(_activate(call, *leaves), leaves, g)
    return g_a, g_b[0] if g_b else None


def feedforward_backward(
    call: FeedForwardCall, w: FeedForwardWeights, tape: FeedForwardTape, x: Tensor, g: Tensor, wants: tuple[bool, ...]
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, ...]]:
    """Gradients from g (B, L, d), the gradient of y. `wants`: which of (norm, first, second, o) need one.

    Returns those of x (residual, product, square) and of the weights (norm, first, second, o); None where not wanted.
    """
    wants_norm, wants_first, wants_second, wants_o = wants
    if tape.rms_inv is None:
        tape.rms_inv = rms_statistic(x, call.eps)  # (B, L, 1)
    if tape.h is None:
        tape.h = dropout_replay(
            _hidden(call, w, x, tape) if tape.a is None else _activate(call, tape.a, tape.b),
            tape.hidden_bits,
            call.p_hidden,
        )
    h = tape.h  # (B, L, f)
    entering = _entering(call, h, w.o)
    g_o = _flat_rows(dropout_backward(cast(g, entering.dtype), tape.out_bits, call.p_out))  # (B·L, d)
    gw_o = linear_grad_weight(g_o, _flat_rows(entering), w.o) if wants_o else None
    g_h = cast(linear_grad_input(g_o, w.o, call.out_dtype).view(h.shape), h.dtype)  # (B, L, f)
    del g_o, entering
    g_a, g_b = _hidden_gradient(call, tape, g_h)
    del g_h, h
    tape.h = None
    normed = rms_apply(x, tape.rms_inv, w.norm)
    through, normed = normed.dtype, cast(normed, call.dtype)
    rows = _flat_rows(normed)  # (B·L, d)
    g_a = _flat_rows(g_a)  # (B·L, f)
    gw_first = linear_grad_weight(g_a, rows, w.first) if wants_first else None
    g_normed = cast(linear_grad_input(g_a, w.first, call.dtype), through)  # (B·L, d)
    gw_second = None
    if g_b is not None and w.second is not None:
        g_b = _flat_rows(g_b)  # (B·L, f)
        gw_second = linear_grad_weight(g_b, rows, w.second) if wants_second else None
        g_normed = cast(linear_grad_input(g_b, w.second, call.dtype), through).add_(g_normed)
    del g_a, g_b, rows, normed
    g_product, g_square, gw_norm = rms_backward(g_normed.view(x.shape), x, tape.rms_inv, w.norm, wants_norm)
    return (cast(g, x.dtype), g_product, g_square), (gw_norm, gw_first, gw_second, gw_o)


def _flat_rows(x: Tensor) -> Tensor:
    """(B, L, n) as (B·L, n)."""
    return x.reshape(-1, x.shape[-1])
