"""One autograd node per T5 sublayer, or per block. A level decides what is saved; the mathematics is shared.

Levels, from most saved to least:

    save_context       attention: x, rms_inv, q, k, v, out and the mask bits; feed-forward: x, rms_inv and h
                       (gated: a₀, a₁)
    save_qkv           attention only: save_context without out (one more product P v in the backward)
    save_input         the sublayer's input and the mask bits; everything else is recomputed
    checkpoint_block   the block's input and the mask bits of its sublayers

Saved tensors go through `save_for_backward`, so that PyTorch frees them during the backward and raises an error for
weights that were changed in place between forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bwsk.reversible.guard import refuse_double_backward
from bwsk.reversible.plan import Level
from bwsk.reversible.t5.attention import (
    AttentionCall,
    AttentionTape,
    AttentionWeights,
    attention_backward,
    attention_forward,
)
from bwsk.reversible.t5.feed_forward import (
    FeedForwardCall,
    FeedForwardTape,
    FeedForwardWeights,
    feedforward_backward,
    feedforward_forward,
)


class AttentionNode(torch.autograd.Function):
    """Inputs: call, x three times, states twice (k and v), bias, mask, then the weights norm, q, k, v, o.

    A tensor that autograd's own graph uses n times is passed n times, in the order in which the stock graph's
    contributions arrive. Autograd then adds them in that order, so the sums are bit-identical.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: AttentionCall,
        x: Tensor,  # (B, L, d)
        _x1: Tensor,
        _x2: Tensor,
        states: Tensor | None,  # (B, S, d)
        _states: Tensor | None,
        bias: Tensor | None,  # as the mask, broadcasts to (B, H, L, S)
        mask: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        w = AttentionWeights(*weights)
        y, tape = attention_forward(call, w, x, states, bias, mask)
        if call.level != Level.SAVE_CONTEXT:
            tape.out = None
        if call.level == Level.SAVE_INPUT:
            tape.rms_inv = tape.q = tape.k = tape.v = None
        ctx.call = call
        saved = (tape.rms_inv, tape.q, tape.k, tape.v, tape.out, tape.core_bits, tape.out_bits)
        ctx.save_for_backward(x, states, bias, mask, *saved, *weights)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        x, states, bias, mask, *rest = ctx.saved_tensors
        tape, w = AttentionTape(*rest[:7]), AttentionWeights(*rest[7:])
        need = ctx.needs_input_grad
        wants = (need[6], *need[8:])
        g_x, g_bias, g_states, g_weights = attention_backward(ctx.call, w, tape, x, states, bias, mask, g, wants)
        return None, *g_x, *g_states, g_bias, None, *g_weights


class FeedForwardNode(torch.autograd.Function):
    """Inputs: call, x three times, then the weights norm, first, second or None, o."""

    @staticmethod
    def forward(ctx: Any, call: FeedForwardCall, x: Tensor, _x1: Tensor, _x2: Tensor, *weights: Any) -> Tensor:
        w = FeedForwardWeights(*weights)
        y, tape = feedforward_forward(call, w, x)
        if call.level == Level.SAVE_INPUT:
            tape.rms_inv = tape.a = tape.b = tape.h = None
        elif call.rectified:
            tape.hidden_bits = None  # h itself says what was dropped
        else:
            tape.h = None
        ctx.call = call
        ctx.save_for_backward(x, tape.rms_inv, tape.a, tape.b, tape.h, tape.hidden_bits, tape.out_bits, *weights)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        x, *rest = ctx.saved_tensors
        tape, w = FeedForwardTape(*rest[:6]), FeedForwardWeights(*rest[6:])
        g_x, g_weights = feedforward_backward(ctx.call, w, tape, x, g, ctx.needs_input_grad[4:])
        return None, *g_x, *g_weights


@dataclass
class BlockCall:
    """One run of one block: its sublayers' calls; `cross` is None in an encoder."""

    own: AttentionCall
    cross: AttentionCall | None
    feed: FeedForwardCall


class BlockNode(torch.autograd.Function):
    """A whole block from its input and mask bits: the S-phases and the matrix products in between are recomputed once.

    Inputs: call, x three times, states twice, bias, mask, cross bias, cross mask, then the 5 weights of self-attention,
    the 5 of cross-attention if there is one, and the 4 of the feed-forward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: BlockCall,
        x: Tensor,  # (B, L, d)
        _x1: Tensor,
        _x2: Tensor,
        states: Tensor | None,  # (B, S, d)
        _states: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        cross_bias: Tensor | None,
        cross_mask: Tensor | None,
        *weights: Any,
    ) -> Tensor:
        own_w, cross_w, feed_w = _split(call, weights)
        y, own = attention_forward(call.own, own_w, x, None, bias, mask)
        own_bits = (own.core_bits, own.out_bits)
        del own
        cross_bits: tuple[Tensor | None, Tensor | None] = (None, None)
        if call.cross is not None and cross_w is not None:
            y, cross = attention_forward(call.cross, cross_w, y, states, cross_bias, cross_mask)
            cross_bits = (cross.core_bits, cross.out_bits)
            del cross
        y, feed = feedforward_forward(call.feed, feed_w, y)
        ctx.call = call
        bits = (*own_bits, *cross_bits, feed.hidden_bits, feed.out_bits)
        ctx.save_for_backward(x, states, bias, mask, cross_bias, cross_mask, *bits, *weights)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        call: BlockCall = ctx.call
        x, states, bias, mask, cross_bias, cross_mask, *rest = ctx.saved_tensors
        bits, weights = rest[:6], rest[6:]
        own_w, cross_w, feed_w = _split(call, weights)
        need = ctx.needs_input_grad
        needs = need[10:]
        own = AttentionTape(core_bits=bits[0], out_bits=bits[1])
        cross = AttentionTape(core_bits=bits[2], out_bits=bits[3])
        feed = FeedForwardTape(hidden_bits=bits[4], out_bits=bits[5])

        middle, own = attention_forward(call.own, own_w, x, None, bias, mask, own)  # (B, L, d)
        entering = middle
        if call.cross is not None and cross_w is not None:
            entering, cross = attention_forward(call.cross, cross_w, middle, states, cross_bias, cross_mask, cross)
        last = needs[-4:]
        g_x, g_feed = feedforward_backward(call.feed, feed_w, feed, entering, g, last)
        del entering, feed
        g_cross: tuple[Tensor | None, ...] = ()
        g_states: tuple[Tensor | None, Tensor | None] = (None, None)
        if call.cross is not None and cross_w is not None:
            g = (g_x[0] + g_x[1]).add_(g_x[2])
            g_x, _, g_states, g_cross = attention_backward(
                call.cross, cross_w, cross, middle, states, cross_bias, cross_mask, g, (False, *needs[5:10])
            )
        del middle, cross
        g = (g_x[0] + g_x[1]).add_(g_x[2])
        g_x, g_bias, _, g_own = attention_backward(call.own, own_w, own, x, None, bias, mask, g, (need[6], *needs[:5]))
        return None, *g_x, *g_states, g_bias, None, None, None, *g_own, *g_cross, *g_feed


def _split(
    call: BlockCall, weights: Sequence[Any]
) -> tuple[AttentionWeights, AttentionWeights | None, FeedForwardWeights]:
    """The weights of a block by sublayer."""
    cross = AttentionWeights(*weights[5:10]) if call.cross is not None else None
    return AttentionWeights(*weights[:5]), cross, FeedForwardWeights(*weights[-4:])
