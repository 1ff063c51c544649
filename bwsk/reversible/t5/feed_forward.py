"""T5's feed-forward sublayer, x + dropout(W_o dropout(f(W_i n(x)))), forward and backward from what a policy keeps.

ReLU (v1.0) erases the negative half and dropout a tenth; both erasures can be read off the one tensor that the next
matrix product needs anyway, h = dropout(relu(a)): the gradient passes where h > 0. So h alone is saved, in place of
relu(a), h and a mask. The gated form (v1.1), f = act(a₀)·a₁, keeps a₀ and a₁ and recomputes the product.
"""

from __future__ import annotations

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
    act: Any
    gated: bool
    rectified: bool
    dtype: torch.dtype | None
    out_dtype: torch.dtype | None  # of W_o: as dtype, or None where it steps out of autocast
    level: str = Level.SAVE_CONTEXT


@dataclass
class FeedForwardTape:
    rms_inv: Tensor | None = None
    a: Tensor | None = None  # the pre-activation; None for ReLU once h is there
    b: Tensor | None = None  # the second, linear branch of the gated form
    h: Tensor | None = None
    hidden_bits: Tensor | None = None
    out_bits: Tensor | None = None


@dataclass
class FeedForwardWeights:
    norm: Tensor
    first: Tensor
    second: Tensor | None
    o: Tensor


def feedforward_weights(layer: nn.Module) -> FeedForwardWeights:
    """The weights of a T5LayerFF; `second` is None in the ungated form."""
    dense = layer._modules["DenseReluDense"]._modules
    norm = layer._modules["layer_norm"]._parameters["weight"]
    if "wi" in dense:
        return FeedForwardWeights(norm, dense["wi"]._parameters["weight"], None, dense["wo"]._parameters["weight"])
    names = ("wi_0", "wi_1", "wo")
    return FeedForwardWeights(norm, *(dense[name]._parameters["weight"] for name in names))


def _activate(call: FeedForwardCall, a: Tensor, b: Tensor | None) -> Tensor:
    """f of the pre-activations, under the autocast state that the forward ran in."""
    with as_forward(call.dtype, a.device.type):
        return call.act(a) if b is None else call.act(a) * b


def feedforward_forward(
    call: FeedForwardCall,
    w: FeedForwardWeights,
    x: Tensor,
    tape: FeedForwardTape | None = None,
    finish: bool = True,
) -> tuple[Tensor | None, FeedForwardTape]:
    """y (B, L, d) and the tape. With a tape of saved residues the forward is recomputed; `finish=False` stops at h."""
    again = tape is not None
    tape = tape if again else FeedForwardTape()
    if tape.rms_inv is None:
        tape.rms_inv = rms_statistic(x, call.eps)
    normed = cast(rms_apply(x, tape.rms_inv, w.norm), call.dtype)
    with as_forward(call.dtype, x.device.type):
        a = linear(normed, w.first, call.dtype)
        b = linear(normed, w.second, call.dtype) if call.gated else None
    if call.rectified:
        a = call.act(a)
        tape.h = a
    else:
        tape.a, tape.b = a, b
        tape.h = _activate(call, a, b)
    del normed, a, b
    if again:
        tape.h = dropout_replay(tape.h, tape.hidden_bits, call.p_hidden)
    else:
        tape.h, tape.hidden_bits = dropout_forward(tape.h, call.p_hidden)
    if not finish:
        return None, tape
    entering = _entering(call, tape.h, w.o)
    with as_forward(call.out_dtype, x.device.type):
        projected = linear(entering, w.o, call.out_dtype)
    del entering
    if again:
        projected = dropout_replay(projected, tape.out_bits, call.p_out)
    else:
        projected, tape.out_bits = dropout_forward(projected, call.p_out)
    return x + projected, tape


def _entering(call: FeedForwardCall, h: Tensor, weight: Tensor) -> Tensor:
    """h in the dtype that W_o is computed in."""
    return cast(h, weight.dtype if call.out_dtype is None else call.out_dtype)


def _hidden_gradient(call: FeedForwardCall, tape: FeedForwardTape, g: Tensor):
    """Gradients of the two pre-activations from g, the gradient of dropout's output, which is overwritten."""
    if call.rectified:
        # Dropped elements and negative ones are both zero in h: one comparison stands for both masks.
        g = rescale_(g, call.p_hidden)
        return threshold_backward_out(g, tape.h, 0, grad_input=g), None
    g = dropout_backward(g, tape.hidden_bits, call.p_hidden, own=True)
    with torch.enable_grad():
        a = tape.a.detach().requires_grad_()
        b = tape.b.detach().requires_grad_() if call.gated else None
        f = _activate(call, a, b)
        grads = torch.autograd.grad(f, [a, b] if call.gated else [a], g)
    return grads[0], grads[1] if call.gated else None


def feedforward_backward(
    call: FeedForwardCall, w: FeedForwardWeights, tape: FeedForwardTape, x: Tensor, g: Tensor, wants: tuple[bool, ...]
):
    """Gradients from g, the gradient of y. `wants`: which of (norm, first, second, o) need one.

    Returns (residual, product, square) of x and (norm, first, second, o); None where not wanted.
    """
    wants_norm, wants_first, wants_second, wants_o = wants
    if tape.rms_inv is None:
        tape.rms_inv = rms_statistic(x, call.eps)
    if tape.h is None:
        if tape.a is None:
            feedforward_forward(call, w, x, tape, finish=False)
        else:
            tape.h = dropout_replay(_activate(call, tape.a, tape.b), tape.hidden_bits, call.p_hidden)
    h = tape.h
    entering = _entering(call, h, w.o)
    g_o = _flat_rows(dropout_backward(cast(g, entering.dtype), tape.out_bits, call.p_out))
    gw_o = linear_grad_weight(g_o, _flat_rows(entering), w.o) if wants_o else None
    g_h = cast(linear_grad_input(g_o, w.o, call.out_dtype).view(h.shape), h.dtype)
    del g_o, entering
    g_a, g_b = _hidden_gradient(call, tape, g_h)
    del g_h, h
    tape.h = None
    normed = rms_apply(x, tape.rms_inv, w.norm)
    through, normed = normed.dtype, cast(normed, call.dtype)
    rows = _flat_rows(normed)
    g_a = _flat_rows(g_a)
    gw_first = linear_grad_weight(g_a, rows, w.first) if wants_first else None
    g_normed = cast(linear_grad_input(g_a, w.first, call.dtype), through)
    gw_second = None
    if call.gated:
        g_b = _flat_rows(g_b)
        gw_second = linear_grad_weight(g_b, rows, w.second) if wants_second else None
        g_normed = cast(linear_grad_input(g_b, w.second, call.dtype), through).add_(g_normed)
    del g_a, g_b, rows, normed
    g_product, g_square, gw_norm = rms_backward(g_normed.view(x.shape), x, tape.rms_inv, w.norm, wants_norm)
    return (cast(g, x.dtype), g_product, g_square), (gw_norm, gw_first, gw_second, gw_o)


def _flat_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
