"""The T5 family (T5, flan-T5, v1.1, mT5): stock modules, their forward replaced while they train.

Each sublayer's `forward` becomes one autograd node (`sublayer`), the lookups and the output projection pass the tied
table on (`embedding`), the loss head keeps one copy of the logits (`loss`). Modules, parameters, names and classes stay
the stock ones: `forward` is set on the instance and deleted again by undo. In eval mode, without gradients, with a
cache, with attentions asked for, or with hooks on a module inside a sublayer, the stock forward runs.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bwsk.errors import BwskError
from bwsk.faults import OutOfFloat16
from bwsk.reversible.attention import AttentionCall, attention_weights
from bwsk.reversible.dropout import dropout
from bwsk.reversible.embedding import Chain, LookupNode, ProjectionNode
from bwsk.reversible.feedforward import FeedForwardCall, feedforward_weights
from bwsk.reversible.guard import refuse_double_backward
from bwsk.reversible.linear import autocast_dtype
from bwsk.reversible.loss import chunked_cross_entropy, cross_entropy
from bwsk.reversible.norm import rms_apply, rms_backward, rms_statistic
from bwsk.reversible.sublayer import AttentionNode, BlockCall, BlockNode, FeedForwardNode

FAMILY = ("t5", "mt5")


@dataclass
class Rule:
    """What one module is to keep, and the modules inside it that its stock forward would have called."""

    level: str
    inner: tuple[nn.Module, ...] = ()
    chain: Chain | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def _hooked(rule: Rule) -> bool:
    return any(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or ("forward" in m.__dict__ and not _ours(m) and not _leaves_float16(m))
        for m in rule.inner
    )


def _ours(module: nn.Module) -> bool:
    return hasattr(module, "_bwsk")


def _leaves_float16(module: nn.Module) -> bool:
    """Whether this is a projection that `bwsk.faults` keeps out of float16 autocast."""
    return isinstance(module.__dict__.get("forward"), OutOfFloat16)


def _engaged(module: nn.Module, x: Tensor, **kwargs: Any) -> bool:
    """Whether this call is a training step that the rule covers; otherwise the stock forward runs."""
    if not module.training or not torch.is_grad_enabled():
        return False
    if kwargs.get("past_key_values") is not None or kwargs.get("output_attentions"):
        return False
    attention = module._bwsk.facts.get("attention")
    if attention is not None and getattr(attention.config, "output_attentions", False):
        return False
    if x.dtype is not torch.float32 and torch.is_autocast_enabled(x.device.type):
        return False
    return not _hooked(module._bwsk)


def _stock(module: nn.Module):
    return type(module).forward.__get__(module)


@torch.compiler.disable
def _eagerly(method: Any, *args: Any, **kwargs: Any) -> Any:
    return method(*args, **kwargs)


def outside_compile(method: Any) -> Any:
    """Run `method` eagerly when torch.compile meets it: the engine's own order of operators is what it promises."""

    @functools.wraps(method)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return _eagerly(method, self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return run


# ---------------------------------------------------------------------------------------------------- sublayers


def _attention_call(layer: nn.Module, x: Tensor, level: str) -> AttentionCall:
    facts = layer._bwsk.facts
    attention = facts["attention"]
    return AttentionCall(
        heads=attention.n_heads,
        width=attention.key_value_proj_dim,
        eps=facts["norm"].variance_epsilon,
        scaling=getattr(attention, "scaling", 1.0),
        p_core=attention.dropout if attention.training else 0.0,
        p_out=facts["dropout"].p,
        crossed=facts["crossed"],
        dtype=autocast_dtype(x),
        level=level,
        core=_core(attention),
        cached=layer._bwsk.chain is not None and layer._bwsk.chain.cached,
    )


def _core(attention: nn.Module):
    """None for eager attention, which is followed operator by operator; otherwise the implementation, to be rerun."""
    name = attention.config._attn_implementation
    if name == "eager":
        return None
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(name, None)
    p = attention.dropout if attention.training else 0.0

    def core(q, k, v, mask, bias):
        return interface(attention, q, k, v, mask, dropout=p, scaling=attention.scaling, position_bias=bias)[0]

    return core


def _zero_bias(layer: nn.Module, x: Tensor, states: Tensor) -> Tensor | None:
    """The zeros that stock cross-attention adds: they change no bit, but other kernels choose by their presence."""
    attention = layer._bwsk.facts["attention"]
    if attention.config._attn_implementation == "eager":
        return None
    dtype = autocast_dtype(x) or attention.q.weight.dtype
    return torch.zeros((1, attention.n_heads, x.shape[1], states.shape[1]), device=x.device, dtype=dtype)


def _own_bias(layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor | None:
    """The relative position bias: the given one, or computed by the first layer; without a table it would be zeros."""
    attention = layer._bwsk.facts["attention"]
    if bias is None and attention.has_relative_attention_bias:
        return attention.compute_bias(x.shape[1], x.shape[1], device=x.device)
    return bias


@outside_compile
def self_attention(self, hidden_states, attention_mask=None, position_bias=None, past_key_values=None, **kwargs):
    """T5LayerSelfAttention.forward while training."""
    if not _engaged(self, hidden_states, past_key_values=past_key_values, **kwargs):
        return _stock(self)(
            hidden_states,
            attention_mask=attention_mask,
            position_bias=position_bias,
            past_key_values=past_key_values,
            **kwargs,
        )
    bias = _own_bias(self, hidden_states, position_bias)
    w = attention_weights(self)
    call = _attention_call(self, hidden_states, self._bwsk.level)
    x = hidden_states
    y = AttentionNode.apply(call, x, x, x, None, None, bias, attention_mask, w.norm, w.q, w.k, w.v, w.o)
    return y, bias, None


@outside_compile
def cross_attention(
    self, hidden_states, key_value_states, attention_mask=None, position_bias=None, past_key_values=None, **kwargs
):
    """T5LayerCrossAttention.forward while training. The stock bias of zeros is neither made nor added."""
    if not _engaged(self, hidden_states, past_key_values=past_key_values, **kwargs):
        return _stock(self)(
            hidden_states,
            key_value_states,
            attention_mask=attention_mask,
            position_bias=position_bias,
            past_key_values=past_key_values,
            **kwargs,
        )
    w = attention_weights(self)
    call = _attention_call(self, hidden_states, self._bwsk.level)
    x, states = hidden_states, key_value_states
    if position_bias is None:
        position_bias = _zero_bias(self, x, states)
    y = AttentionNode.apply(call, x, x, x, states, states, position_bias, attention_mask, w.norm, w.q, w.k, w.v, w.o)
    return y, position_bias, None


def _feed_call(layer: nn.Module, x: Tensor, level: str) -> FeedForwardCall:
    facts = layer._bwsk.facts
    dense, dtype = facts["dense"], autocast_dtype(x)
    exempt = dtype is torch.float16 and _leaves_float16(dense.wo)
    return FeedForwardCall(
        eps=facts["norm"].variance_epsilon,
        p_hidden=dense.dropout.p,
        p_out=facts["dropout"].p,
        act=dense.act,
        gated=facts["gated"],
        rectified=facts["rectified"],
        dtype=dtype,
        out_dtype=None if exempt else dtype,
        level=level,
    )


@outside_compile
def feed_forward(self, hidden_states):
    """T5LayerFF.forward while training."""
    if not _engaged(self, hidden_states):
        return _stock(self)(hidden_states)
    w = feedforward_weights(self)
    call = _feed_call(self, hidden_states, self._bwsk.level)
    x = hidden_states
    return FeedForwardNode.apply(call, x, x, x, w.norm, w.first, w.second, w.o)


@outside_compile
def block(
    self,
    hidden_states,
    attention_mask=None,
    position_bias=None,
    encoder_hidden_states=None,
    encoder_attention_mask=None,
    encoder_decoder_position_bias=None,
    past_key_values=None,
    **kwargs,
):
    """T5Block.forward while training, where the whole block is redone from its input."""
    x, states = hidden_states, encoder_hidden_states
    own, *middle, feed = self.layer
    plain = (
        _engaged(self, x, past_key_values=past_key_values, **kwargs)
        and x.dtype is not torch.float16  # the stock block clamps float16 between its sublayers
        and (encoder_decoder_position_bias is None or not encoder_decoder_position_bias.requires_grad)
        and len(middle) == (states is not None)
    )
    if not plain:
        return _stock(self)(
            x,
            attention_mask,
            position_bias,
            states,
            encoder_attention_mask,
            encoder_decoder_position_bias,
            past_key_values=past_key_values,
            **kwargs,
        )
    bias = _own_bias(own, x, position_bias)
    calls = BlockCall(
        _attention_call(own, x, "entry"),
        _attention_call(middle[0], x, "entry") if middle else None,
        _feed_call(feed, x, "entry"),
    )
    w = attention_weights(own)
    weights = [w.norm, w.q, w.k, w.v, w.o]
    if middle:
        w = attention_weights(middle[0])
        weights += [w.norm, w.q, w.k, w.v, w.o]
    w = feedforward_weights(feed)
    weights += [w.norm, w.first, w.second, w.o]
    cross_bias = encoder_decoder_position_bias
    cross_mask = encoder_attention_mask if middle else None
    if middle and cross_bias is None:
        cross_bias = _zero_bias(middle[0], x, states)
    y = BlockNode.apply(calls, x, x, x, states, states, bias, attention_mask, cross_bias, cross_mask, *weights)
    return y, bias, cross_bias


class _NormNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, _x1: Tensor, weight: Tensor, eps: float):
        r = rms_statistic(x, eps)
        ctx.save_for_backward(x, r, weight)
        return rms_apply(x, r, weight)

    @staticmethod
    def backward(ctx, g: Tensor):
        refuse_double_backward()
        g_product, g_square, g_weight = rms_backward(g, *ctx.saved_tensors, ctx.needs_input_grad[2])
        return g_product, g_square, g_weight, None


@outside_compile
def norm(self, hidden_states):
    """T5LayerNorm.forward while training (the final norm of a stack)."""
    if not _engaged(self, hidden_states):
        return _stock(self)(hidden_states)
    return _NormNode.apply(hidden_states, hidden_states, self.weight, self.variance_epsilon)


@outside_compile
def drop(self, input):
    """nn.Dropout.forward while training (the dropouts at both ends of a stack)."""
    if not _engaged(self, input) or self.inplace:
        return _stock(self)(input)
    return dropout(input, self.p)


# ------------------------------------------------------------------------------------- table, projection and loss


@outside_compile
def lookup(self, input):
    """nn.Embedding.forward inside a training forward of the whole model."""
    chain = self._bwsk.chain
    if not chain.active or not torch.is_grad_enabled() or not self.weight.requires_grad:
        return _stock(self)(input)
    table = self.weight if chain.table is None else chain.table
    vectors, chain.table = LookupNode.apply(table, input, -1 if self.padding_idx is None else self.padding_idx)
    return vectors


@outside_compile
def projection(self, input):
    """The output projection (nn.Linear without bias) inside a training forward of the whole model."""
    chain = self._bwsk.chain
    if not chain.active or not torch.is_grad_enabled():
        return _stock(self)(input)
    if chain.skip_projection:
        return input
    return ProjectionNode.apply(input, _table(self))


def _table(head: nn.Module) -> Tensor:
    chain = head._bwsk.chain
    return chain.table if head._bwsk.facts["tied"] and chain.table is not None else head.weight


@outside_compile
def conditional(self, *args, **kwargs):
    """T5ForConditionalGeneration.forward while training."""
    stock = _stock(self)
    rule: Rule = self._bwsk
    if not self.training or not torch.is_grad_enabled() or _hooked(rule):
        return stock(*args, **kwargs)
    if args:
        bound = inspect.signature(stock).bind(*args, **kwargs)
        kwargs = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        kwargs.pop("kwargs", None)
    labels = kwargs.pop("labels", None)
    as_dict = kwargs.pop("return_dict", None)
    chain = rule.chain
    chain.start()
    try:
        outputs = _with_loss(self, stock, labels, kwargs)
    finally:
        chain.stop()
    as_dict = getattr(self.config, "return_dict", True) if as_dict is None else as_dict
    return outputs if as_dict else outputs.to_tuple()


def _with_loss(model: nn.Module, stock: Any, labels: Tensor | None, kwargs: dict[str, Any]):
    if labels is None:
        return stock(**kwargs, return_dict=True)
    rule: Rule = model._bwsk
    if kwargs.get("decoder_input_ids") is None and kwargs.get("decoder_inputs_embeds") is None:
        kwargs["decoder_input_ids"] = model._shift_right(labels)
    if kwargs.get("past_key_values") is None:
        # Training has no use for a cache, but the stock step lays out its keys by it; that layout is kept.
        asked = kwargs.get("use_cache")
        rule.chain.cached = bool(model.decoder.config.use_cache if asked is None else asked)
        kwargs["use_cache"] = False
    head = model.lm_head
    narrow = torch.is_autocast_enabled(labels.device.type) or head.weight.dtype is not torch.float32
    chunked = rule.level == "chunked" and not narrow
    rule.chain.skip_projection = chunked
    outputs = stock(**kwargs, return_dict=True)
    labels = labels.to(outputs.logits.device).view(-1)
    found = dict(outputs.items())
    if chunked:
        loss = chunked_cross_entropy(found.pop("logits"), _table(head), labels)
    else:
        loss = cross_entropy(found["logits"], labels, head.in_features)
    return type(outputs)(loss=loss, **found)


# ------------------------------------------------------------------------------------------------ installation


def is_family(model: nn.Module) -> bool:
    """Whether the model is built of T5 stacks that this engine knows."""
    return getattr(getattr(model, "config", None), "model_type", None) in FAMILY and bool(_stacks(model))


def _stacks(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ in ("T5Stack", "MT5Stack") and _is_stock(m)]


def _is_stock(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.models.")


def prefix(model: nn.Module) -> str:
    """What the module names of the stacks begin with: "" or, under a classification head, "transformer."."""
    names = {id(m): n for n, m in model.named_modules()}
    return min(names[id(stack)] for stack in _stacks(model)).removesuffix("encoder").removesuffix("decoder")


def sublayers(model: nn.Module) -> dict[str, nn.Module]:
    """The sublayers of every stack by their module name, in forward order."""
    names = {id(m): n for n, m in model.named_modules()}
    found: dict[str, nn.Module] = {}
    for stack in _stacks(model):
        for item in stack.block:
            for layer in item.layer:
                found[names[id(layer)]] = layer
    return found


def _check_linear(name: str, module: nn.Module) -> None:
    if type(module) is not nn.Linear or module.bias is not None or "weight" not in module._parameters:
        raise BwskError(
            f"make_reversible: {name} is {type(module).__name__}, not a plain nn.Linear without bias; "
            "apply make_reversible before adapters, quantisation or parametrisations, or leave them out"
        )


def _rule_of_attention(name: str, layer: nn.Module, level: str, chain: Chain | None) -> Rule:
    crossed = hasattr(layer, "EncDecAttention")
    attention = layer.EncDecAttention if crossed else layer.SelfAttention
    for part in "qkvo":
        _check_linear(f"{name}.{part}", getattr(attention, part))
    inner = (layer.layer_norm, layer.dropout, attention, attention.q, attention.k, attention.v, attention.o)
    facts = {"attention": attention, "norm": layer.layer_norm, "dropout": layer.dropout, "crossed": crossed}
    if attention.has_relative_attention_bias:
        inner += (attention.relative_attention_bias,)
    return Rule(level, inner, chain, facts)


def _rule_of_feed(name: str, layer: nn.Module, level: str) -> Rule:
    dense = layer.DenseReluDense
    gated = hasattr(dense, "wi_0")
    linears = [dense.wi_0, dense.wi_1, dense.wo] if gated else [dense.wi, dense.wo]
    for module in linears:
        _check_linear(f"{name}.DenseReluDense", module)
    rectified = not gated and type(dense.act) is nn.ReLU
    facts = {"dense": dense, "norm": layer.layer_norm, "dropout": layer.dropout, "gated": gated}
    facts["rectified"] = rectified
    return Rule(level, (layer.layer_norm, layer.dropout, dense, dense.act, dense.dropout, *linears), facts=facts)


def install(model: nn.Module, levels: dict[str, str], head: str) -> list[nn.Module]:
    """Set the forwards. `levels`: sublayer or block name to level; `head`: "exact", "chunked" or "stock".

    Returns the modules touched. Raises `BwskError`, before touching anything, on modules that are
    not stock.
    """
    todo: list[tuple[nn.Module, Any, Rule]] = []
    names = {id(m): n for n, m in model.named_modules()}
    chain = Chain()
    for stack in _stacks(model):
        for item in stack.block:
            as_block = levels.get(names[id(item)]) == "block"
            inner: tuple[nn.Module, ...] = ()
            for layer in item.layer:
                name = names[id(layer)]
                level = "entry" if as_block else levels.get(name, "core")
                if level == "stock":
                    continue
                if hasattr(layer, "DenseReluDense"):
                    rule, method = _rule_of_feed(name, layer, level), feed_forward
                else:
                    rule = _rule_of_attention(name, layer, level, chain if stack.is_decoder else None)
                    method = cross_attention if rule.facts["crossed"] else self_attention
                inner += (layer, *rule.inner)
                todo.append((layer, method, rule))
            if as_block:
                todo.append((item, block, Rule("block", inner)))
        todo.append((stack.final_layer_norm, norm, Rule("core")))
        todo.append((stack.dropout, drop, Rule("core")))
    if type(model).__name__ in ("T5ForConditionalGeneration", "MT5ForConditionalGeneration") and head != "stock":
        todo += _head_rules(model, head, chain)
    for module, method, rule in todo:
        module._bwsk = rule
        module.forward = MethodType(method, module)
    return [module for module, _, _ in todo]


def _head_rules(model: nn.Module, head: str, chain: Chain) -> list[tuple[nn.Module, Any, Rule]]:
    _check_linear("lm_head", model.lm_head)
    found: list[tuple[nn.Module, Any, Rule]] = []
    lookups = []
    for stack in (model.encoder, model.decoder):
        table = stack.embed_tokens
        if type(table) is not nn.Embedding or table.max_norm is not None or table.sparse or table.scale_grad_by_freq:
            raise BwskError(
                f"make_reversible: embed_tokens is {type(table).__name__} with options that T5 does not use; "
                "use a plain nn.Embedding"
            )
        lookups.append(table)
    shared = lookups[0].weight is lookups[1].weight
    if shared:
        seen = {id(table): table for table in lookups}
        found += [(table, lookup, Rule("core", chain=chain)) for table in seen.values()]
    tied = shared and model.lm_head.weight is lookups[0].weight
    found.append((model.lm_head, projection, Rule("core", chain=chain, facts={"tied": tied})))
    method = functools.wraps(type(model).forward)(conditional)
    found.append((model, method, Rule(head, (model.lm_head,), chain=chain)))
    return found


def uninstall(modules: list[nn.Module]) -> None:
    """Take the forwards off again."""
    for module in modules:
        module.__dict__.pop("forward", None)
        module.__dict__.pop("_bwsk", None)
