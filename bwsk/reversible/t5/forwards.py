"""The forwards that T5's modules get while they train.

Each sublayer's `forward` becomes one autograd node (`nodes`), the lookups and the output projection pass the tied
table on (`tied_embedding`), and the loss head saves one copy of the logits (`cross_entropy`). The stock forward runs in
eval mode, without gradients, with a generation cache, if attentions are asked for, and if a module inside a sublayer
has hooks or has been replaced since `make_reversible` (`policy.engaged`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from bwsk._compat import ALL_ATTENTION_FUNCTIONS, attention_kind, cache_argument, shift_right, with_cache_argument
from bwsk.reversible.cross_entropy import chunked_cross_entropy, cross_entropy
from bwsk.reversible.dropout import dropout
from bwsk.reversible.guard import refuse_double_backward
from bwsk.reversible.patching import stock_forward
from bwsk.reversible.plan import Level
from bwsk.reversible.status import fell_back
from bwsk.reversible.t5.attention import AttentionCall, Core, attention_weights
from bwsk.reversible.t5.autocast_region import watch_uses
from bwsk.reversible.t5.feed_forward import FeedForwardCall, feedforward_weights
from bwsk.reversible.t5.float16 import OutOfFloat16
from bwsk.reversible.t5.linear import autocast_dtype
from bwsk.reversible.t5.nodes import AttentionNode, BlockCall, BlockNode, FeedForwardNode
from bwsk.reversible.t5.policy import change, engaged, policy_of
from bwsk.reversible.t5.rms_norm import rms_apply, rms_backward, rms_statistic
from bwsk.reversible.t5.tied_embedding import LookupNode, ProjectionNode, TiedTable

CACHE = cache_argument()


# ---------------------------------------------------------------------------------------------------- sublayers


def _rate(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0


def _attention_call(layer: nn.Module, x: Tensor, level: str) -> AttentionCall:
    policy = policy_of(layer)
    attention, tied = policy.facts["attention"], policy.tied
    return AttentionCall(
        heads=attention.n_heads,
        width=attention.key_value_proj_dim,
        eps=policy.facts["norm"].variance_epsilon,
        scaling=getattr(attention, "scaling", 1.0),
        p_core=attention.dropout if attention.training else 0.0,
        p_out=_rate(policy.facts["dropout"]),
        dtype=autocast_dtype(x),
        level=level,
        core=_core(attention),
        cached=tied is not None and tied.cached,
    )


def _core(attention: Any) -> Core | None:
    """None for eager attention, which is followed operator by operator; for any other, the implementation to rerun."""
    name = attention_kind(attention.config)
    if name == "eager":
        return None
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(name, None)
    p = attention.dropout if attention.training else 0.0

    def core(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        return interface(attention, q, k, v, mask, dropout=p, scaling=attention.scaling, position_bias=bias)[0]

    return core


def _zero_bias(layer: nn.Module, x: Tensor, states: Tensor) -> Tensor | None:
    """The bias (1, H, L, S) of zeros that stock cross-attention adds, for x (B, L, d) and states (B, S, d).

    It changes no bit by itself, but which kernel runs can depend on its presence.
    """
    attention = policy_of(layer).facts["attention"]
    if attention_kind(attention.config) == "eager":
        return None
    dtype = autocast_dtype(x) or attention.q.weight.dtype
    return torch.zeros((1, attention.n_heads, x.shape[1], states.shape[1]), device=x.device, dtype=dtype)


def _own_bias(layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor | None:
    """The relative position bias: the given one, or the first layer's own; None where stock would add zeros."""
    attention = policy_of(layer).facts["attention"]
    if bias is None and attention.has_relative_attention_bias:
        return attention.compute_bias(x.shape[1], x.shape[1], device=x.device)  # (1, H, L, L)
    return bias


def _stock_cache(layer: nn.Module) -> DynamicCache | None:
    """An empty cache for a stock forward, so that keys and values get the layout that they have in the stock step.

    None where the stock step has no cache either; under gradient checkpointing transformers removes it.
    """
    policy = policy_of(layer)
    tied = policy.tied
    if tied is None or not tied.cached or policy.facts["attention"].gradient_checkpointing:
        return None
    return DynamicCache()


def self_attention(
    self: nn.Module,
    hidden_states: Tensor,  # (B, L, d)
    attention_mask: Tensor | None = None,  # broadcasts to (B, H, L, L)
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """T5LayerSelfAttention.forward while training."""
    kwargs = with_cache_argument(kwargs)
    if not engaged(self, hidden_states, None, attention_mask, **kwargs):
        outputs = stock_forward(self)(
            hidden_states,
            attention_mask=attention_mask,
            position_bias=position_bias,
            **{**kwargs, CACHE: _stock_cache(self) if kwargs.get(CACHE) is None else kwargs[CACHE]},
        )
        watch_uses((self,), outputs[0], engine=False)
        return outputs
    bias = _own_bias(self, hidden_states, position_bias)
    w = attention_weights(self)
    call = _attention_call(self, hidden_states, policy_of(self).level)
    x = hidden_states
    y = AttentionNode.apply(call, x, x, x, None, None, bias, attention_mask, w.norm, w.q, w.k, w.v, w.o)
    watch_uses((self,), y, engine=True)
    return y, bias, None


def cross_attention(
    self: nn.Module,
    hidden_states: Tensor,  # (B, L, d)
    key_value_states: Tensor,  # (B, S, d)
    attention_mask: Tensor | None = None,  # broadcasts to (B, H, L, S)
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """T5LayerCrossAttention.forward while training. Eager attention leaves out stock's bias of zeros."""
    kwargs = with_cache_argument(kwargs)
    if not engaged(self, hidden_states, key_value_states, attention_mask, **kwargs):
        outputs = stock_forward(self)(
            hidden_states,
            key_value_states,
            attention_mask=attention_mask,
            position_bias=position_bias,
            **{**kwargs, CACHE: _stock_cache(self) if kwargs.get(CACHE) is None else kwargs[CACHE]},
        )
        watch_uses((self,), outputs[0], engine=False)
        return outputs
    w = attention_weights(self)
    call = _attention_call(self, hidden_states, policy_of(self).level)
    x, states = hidden_states, key_value_states
    if position_bias is None:
        position_bias = _zero_bias(self, x, states)
    y = AttentionNode.apply(call, x, x, x, states, states, position_bias, attention_mask, w.norm, w.q, w.k, w.v, w.o)
    watch_uses((self,), y, engine=True)
    return y, position_bias, None


def _feed_call(layer: nn.Module, x: Tensor, level: str) -> FeedForwardCall:
    facts = policy_of(layer).facts
    dense, dtype = facts["dense"], autocast_dtype(x)
    exempt = dtype is torch.float16 and isinstance(dense.wo.__dict__.get("forward"), OutOfFloat16)
    return FeedForwardCall(
        eps=facts["norm"].variance_epsilon,
        p_hidden=_rate(dense.dropout),
        p_out=_rate(facts["dropout"]),
        act=dense.act,
        rectified=facts["rectified"],
        dtype=dtype,
        out_dtype=None if exempt else dtype,
        level=level,
    )


def feed_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """T5LayerFF.forward while training."""
    if not engaged(self, hidden_states, None):
        y = stock_forward(self)(hidden_states)
        watch_uses((self,), y, engine=False)
        return y
    w = feedforward_weights(self)
    call = _feed_call(self, hidden_states, policy_of(self).level)
    x = hidden_states
    y = FeedForwardNode.apply(call, x, x, x, w.norm, w.first, w.second, w.o)
    watch_uses((self,), y, engine=True)
    return y


def block(
    self: Any,
    hidden_states: Tensor,  # (B, L, d)
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,  # (B, S, d)
    encoder_attention_mask: Tensor | None = None,
    encoder_decoder_position_bias: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """T5Block.forward while training, where the whole block is recomputed from its input."""
    kwargs = with_cache_argument(kwargs)
    x, states = hidden_states, encoder_hidden_states
    own, *middle, feed = self.layer
    plain = engaged(
        self, x, states, attention_mask, encoder_attention_mask, encoder_decoder_position_bias, **kwargs
    ) and len(middle) == (states is not None)
    if plain and x.dtype is torch.float16:
        plain = False
        fell_back(self, "the stock block clamps float16 between its sublayers")
    if not plain:
        return stock_forward(self)(
            x,
            attention_mask,
            position_bias,
            states,
            encoder_attention_mask,
            encoder_decoder_position_bias,
            **kwargs,
        )
    bias = _own_bias(own, x, position_bias)
    calls = BlockCall(
        _attention_call(own, x, Level.SAVE_INPUT),
        _attention_call(middle[0], x, Level.SAVE_INPUT) if middle else None,
        _feed_call(feed, x, Level.SAVE_INPUT),
    )
    weights: list[Tensor | None] = []
    for attention in (own, *middle):
        w = attention_weights(attention)
        weights += [w.norm, w.q, w.k, w.v, w.o]
    f = feedforward_weights(feed)
    weights += [f.norm, f.first, f.second, f.o]
    cross_bias = encoder_decoder_position_bias
    cross_mask = encoder_attention_mask if middle else None
    if states is not None and cross_bias is None:
        cross_bias = _zero_bias(middle[0], x, states)
    y = BlockNode.apply(calls, x, x, x, states, states, bias, attention_mask, cross_bias, cross_mask, *weights)
    watch_uses((own, *middle, feed), y, engine=True)
    return y, bias, cross_bias


class _NormNode(torch.autograd.Function):
    """RMS norm alone. Inputs: x twice, weight, eps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _x1: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = rms_statistic(x, eps)
        ctx.save_for_backward(x, r, weight)
        return rms_apply(x, r, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        refuse_double_backward()
        x, r, weight = ctx.saved_tensors
        g_product, g_square, g_weight = rms_backward(g, x, r, weight, ctx.needs_input_grad[2])
        return g_product, g_square, g_weight, None


def norm(self: Any, hidden_states: Tensor) -> Tensor:
    """T5LayerNorm.forward while training (the final norm of a stack)."""
    if not engaged(self, hidden_states, None):
        return stock_forward(self)(hidden_states)
    return _NormNode.apply(hidden_states, hidden_states, self.weight, self.variance_epsilon)


def drop(self: nn.Dropout, input: Tensor) -> Tensor:
    """nn.Dropout.forward while training (the dropouts at both ends of a stack)."""
    if not engaged(self, input, None) or self.inplace:
        return stock_forward(self)(input)
    return dropout(input, self.p)


# ------------------------------------------------------------------------------------- table, projection and loss


def _tied_of(module: nn.Module) -> TiedTable:
    """The tied table of a module on its chain."""
    tied = policy_of(module).tied
    assert tied is not None
    return tied


def lookup(self: nn.Embedding, input: Tensor) -> Tensor:
    """nn.Embedding.forward inside a training forward of the whole model."""
    tied = _tied_of(self)
    if not tied.active or not torch.is_grad_enabled() or not self.weight.requires_grad:
        return stock_forward(self)(input)
    padding = -1 if self.padding_idx is None else self.padding_idx
    vectors, table = LookupNode.apply(tied.current(self.weight), input, padding)
    tied.advance(self.weight, table)
    return vectors


def projection(self: nn.Linear, input: Tensor) -> Tensor:
    """The output projection (nn.Linear without bias) inside a training forward of the whole model."""
    tied = _tied_of(self)
    if not tied.active or not torch.is_grad_enabled():
        return stock_forward(self)(input)
    if tied.skip_projection:
        return input
    if not input.is_contiguous():
        return nn.functional.linear(input, tied.current(self.weight))
    return ProjectionNode.apply(input, tied.current(self.weight))


def conditional(self: Any, *args: Any, **kwargs: Any) -> Any:
    """T5ForConditionalGeneration.forward while training."""
    stock = stock_forward(self)
    if not self.training or not torch.is_grad_enabled():
        return stock(*args, **kwargs)
    if reason := change(policy_of(self)):
        fell_back(self, reason)
        return stock(*args, **kwargs)
    if args:
        bound = inspect.signature(stock).bind(*args, **kwargs)
        kwargs = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        kwargs.pop("kwargs", None)
    kwargs = with_cache_argument(kwargs)
    labels = kwargs.pop("labels", None)
    as_dict = kwargs.pop("return_dict", None)
    tied = _tied_of(self)
    tied.start()
    try:
        outputs = _with_loss(self, stock, tied, labels, kwargs)
        uncached = tied.cached
    finally:
        tied.stop()
    as_dict = getattr(self.config, "return_dict", True) if as_dict is None else as_dict
    if as_dict:
        return outputs
    # None stands in for the cache that the stock step would have returned, so that what follows keeps its index.
    values = [(item.name, getattr(outputs, item.name)) for item in fields(outputs)]
    return tuple(v for name, v in values if v is not None or (uncached and name == CACHE))


def _with_loss(
    model: Any, stock: Callable[..., Any], tied: TiedTable, labels: Tensor | None, kwargs: dict[str, Any]
) -> Any:
    """The stock forward's outputs, with the loss of `labels` (B, L), if there are any, by the engine's own head."""
    if labels is not None and kwargs.get("decoder_input_ids") is None and kwargs.get("decoder_inputs_embeds") is None:
        kwargs["decoder_input_ids"] = shift_right(model)(labels)
    asked = kwargs.get("use_cache")
    if kwargs.get(CACHE) is None and (labels is not None or not asked):
        # Training has no use for a cache, but filling one gives the stock step's keys a layout, which is reproduced.
        tied.cached = bool(model.decoder.config.use_cache if asked is None else asked)
        kwargs["use_cache"] = False
    if labels is None:
        return stock(**kwargs, return_dict=True)
    head = model.lm_head
    narrow = torch.is_autocast_enabled(labels.device.type) or head.weight.dtype is not torch.float32
    chunked = policy_of(model).level == "chunked" and not narrow
    tied.skip_projection = chunked
    outputs = stock(**kwargs, return_dict=True)
    labels = labels.to(outputs.logits.device).view(-1)  # (B·L,)
    found = dict(outputs.items())
    if chunked:
        loss = chunked_cross_entropy(found.pop("logits"), tied.current(head.weight), labels)
    else:
        loss = cross_entropy(found["logits"], labels, head.in_features)
    return type(outputs)(loss=loss, **found)
