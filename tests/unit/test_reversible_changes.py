"""A reversible model that is changed afterwards, or run in unusual ways, still has the stock bits or says why not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from bwsk import BwskError, make_reversible
from bwsk._compat import cache_argument
from bwsk.reversible.t5.policy import change
from tests.unit.test_reversible_gradients import batch, differences, pair, reversible, train


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Adapter(nn.Linear):
    """A linear layer in the place of another, with a low-rank addition."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight
        self.a = nn.Parameter(torch.full((2, base.in_features), 0.1))
        self.b = nn.Parameter(torch.full((base.out_features, 2), 0.2))

    def forward(self, x):
        return super().forward(x) + x @ self.a.t() @ self.b.t()


class OtherNorm(nn.LayerNorm):
    variance_epsilon = 1e-6


def dropouts_off(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()


def untied_head(model):
    model.lm_head.weight = nn.Parameter(1.5 * model.lm_head.weight.detach())


def untied_lookups(model):
    model.decoder.embed_tokens.weight = nn.Parameter(1.5 * model.shared.weight.detach())


def bias(model):
    model.encoder.block[1].layer[0].SelfAttention.o.bias = nn.Parameter(torch.full((32,), 0.3))


def adapter(model):
    attention = model.decoder.block[1].layer[1].EncDecAttention
    attention.k = Adapter(attention.k)


def parametrisation(model):
    parametrize.register_parametrization(model.encoder.block[0].layer[1].DenseReluDense.wi, "weight", Doubled())


def parametrised_head(model):
    parametrize.register_parametrization(model.lm_head, "weight", Doubled())


def other_activation(model):
    model.encoder.block[0].layer[1].DenseReluDense.act = nn.Tanh()


def other_norm(model):
    model.decoder.block[0].layer[2].layer_norm = OtherNorm(32)


def other_dropout(model):
    model.decoder.block[0].layer[0].dropout = nn.Dropout(0.7)


def wrapped_layer(model):
    layer = model.encoder.block[1].layer[1]
    layer.forward = lambda x, inner=layer.forward: 1.5 * inner(x)


CHANGES = [
    dropouts_off,
    untied_head,
    untied_lookups,
    bias,
    adapter,
    parametrisation,
    parametrised_head,
    other_activation,
    other_norm,
    other_dropout,
    wrapped_layer,
]


def gradients(model, run):
    torch.manual_seed(1)
    run(model.train())
    return [{n: p.grad for n, p in model.named_parameters() if p.grad is not None}]


def compare(run, level="max", **changes):
    """What is not the same bits after `run(model)`, which also does the backward."""
    stock, ours = pair(**changes)
    reversible(ours, level)
    return differences(gradients(stock, run), gradients(ours, run))


@pytest.mark.parametrize("level", ["fast", "max"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_afterwards(change, level):
    stock, ours = pair(attention="sdpa")
    reversible(ours, level)
    for model in (stock, ours):
        change(model.train())

    def run(model):
        model(**batch(1)).loss.backward()

    def steps(model):
        torch.manual_seed(1)
        run(model)
        return [{n: p.grad for n, p in model.named_parameters() if p.grad is not None}]

    assert differences(steps(stock), steps(ours)) == []


def decoder_in_eval(model):
    model.decoder.eval()


def attentions_asked_for(model):
    model.config.output_attentions = model.decoder.config.output_attentions = True


@pytest.mark.parametrize("level", ["fast", "max"])
@pytest.mark.parametrize("change", [adapter, decoder_in_eval, attentions_asked_for], ids=lambda change: change.__name__)
def test_stock_sublayers_beside_the_default_cache(change, level):
    """The cache itself is not made, but the sublayers that run their stock forward lay out their keys by it too."""
    stock, ours = pair()
    reversible(ours, level)
    for model in (stock, ours):
        change(model.train())

    def steps(model):
        found = []
        for step in range(3):
            torch.manual_seed(step)
            model.zero_grad()
            model(**{**batch(step, padded=True), "use_cache": None}).loss.backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return found

    assert differences(steps(stock), steps(ours)) == []


@pytest.mark.parametrize("level", ["fast", "max"])
def test_checkpointing_switched_on_afterwards(level):
    """It makes zeros of the cross-attention require a gradient, by which kernels are chosen."""

    def run(model):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**batch(1)).loss.backward()

    assert compare(run, level, attention="sdpa", dropout_rate=0.0) == []


@pytest.mark.parametrize("level", ["fast", "max"])
def test_a_mask_that_learns_gets_its_gradient(level):
    def run(model):
        mask = nn.Parameter(torch.zeros(3, 1, 1, 11))
        model.register_parameter("soft", mask)
        model(**{**batch(1), "attention_mask": mask}).loss.backward()

    assert compare(run, level) == []


@pytest.mark.parametrize("level", ["fast", "max"])
@pytest.mark.parametrize("place", ["inputs_embeds", "encoder_outputs"])
def test_hidden_states_in_another_layout(place, level):
    def run(model):
        states = torch.randn(1, 32, 5, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
        given = {place: (states,) if place == "encoder_outputs" else states}
        model(**given, labels=batch(1)["labels"][:1], use_cache=False).loss.backward()

    assert compare(run, level, d_kv=7) == []


@pytest.mark.parametrize("level", ["fast", "max", "save_input", "save_qkv"])
@pytest.mark.parametrize("form", ["relu", "gated-gelu"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_backward_under_another_autocast_than_its_forward(attention, form, level):
    def run(model):
        loss = model(**batch(1)).loss
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()

    assert compare(run, level, attention=attention, feed_forward_proj=form) == []


@pytest.mark.parametrize("level", ["fast", "max"])
@pytest.mark.parametrize("narrow", ["norms under autocast", "all but wo"])
def test_weights_of_mixed_precision(narrow, level):
    def run(model):
        for name, parameter in model.named_parameters():
            if ("layer_norm" in name) if narrow != "all but wo" else (".wo." not in name):
                parameter.data = parameter.data.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow != "all but wo"):
            loss = model(**batch(1)).loss
        loss.backward()

    assert compare(run, level) == []


@pytest.mark.parametrize("level", ["fast", "max"])
def test_a_pickled_model_trains_itself(level):
    stock, ours = pair()
    reversible(ours, level)
    twin = pickle.loads(pickle.dumps(ours))
    for parameter in ours.parameters():
        parameter.data.zero_()
    assert differences(train(stock), train(twin)) == []


def test_undo_leaves_a_wrapper_that_came_later():
    stock, ours = pair()
    handle = reversible(ours, "max")
    for model in (stock, ours):
        inner = model.encoder.block[0]
        inner.forward = lambda *args, call=inner.forward, **kwargs: (1.5 * call(*args, **kwargs)[0], None, None)
    assert differences(train(stock, steps=1), train(ours, steps=1)) == []
    handle.undo()
    assert [name for name, m in ours.named_modules() if "forward" in m.__dict__] == ["encoder.block.0"]
    assert differences(train(stock), train(ours)) == []


def test_hooks_for_all_modules_fire_as_often():
    counts = []

    def run(model):
        calls = []
        hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: calls.append(module))
        try:
            model(**batch(1)).loss.backward()
        finally:
            hook.remove()
        counts.append(len(calls))

    assert compare(run) == []
    assert counts[0] == counts[1]


def test_asking_for_hidden_states_once_does_not_switch_blocks_off():
    _, ours = pair()
    reversible(ours, "max")
    ours.train()(**batch(1), output_hidden_states=True)
    assert ours.encoder.block[0].layer[0]._forward_hooks
    assert not change(ours.encoder.block[0]._bwsk)
    assert len(ours(**batch(1), output_attentions=True).cross_attentions) == 2


def test_a_second_backward_is_refused_where_pytorch_cannot_see_it():
    _, ours = pair()
    reversible(ours, "fast")
    with torch.autograd.graph.save_on_cpu():
        loss = ours.train()(**batch(1)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(BwskError, match="second backward"):
        loss.backward()


def test_tuples_keep_their_places_without_the_cache():
    stock, ours = pair()
    reversible(ours, "fast")
    inputs = {key: value for key, value in batch(1).items() if key != "use_cache"}
    torch.manual_seed(1)
    one = stock.train()(**inputs, return_dict=False)
    torch.manual_seed(1)
    other = ours.train()(**inputs, return_dict=False)
    assert len(one) == len(other)
    assert other[2] is None
    assert torch.equal(one[3], other[3])


@pytest.mark.parametrize("level", ["fast", "max"])
@pytest.mark.parametrize("name", sorted({"past_key_values", cache_argument()}))
def test_a_cache_that_is_given_is_filled(name, level):
    """Whatever the version of transformers calls it; the sublayers then run their stock forward."""
    found = []
    for model in pair():
        if found:
            reversible(model, level)
        given = {key: value for key, value in batch(1).items() if key != "use_cache"}
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        torch.manual_seed(1)
        model.train()(**given, **{name: cache}).loss.backward()
        found.append((cache, [p.grad for p in model.parameters()]))
    (filled, expected), (ours, gradients) = found
    for part in ("self_attention_cache", "cross_attention_cache"):
        stock_layers, our_layers = getattr(filled, part).layers, getattr(ours, part).layers
        assert len(our_layers) == len(stock_layers) > 0
        for one, other in zip(stock_layers, our_layers, strict=True):
            assert torch.equal(one.keys, other.keys)
            assert torch.equal(one.values, other.values)
    assert all(torch.equal(one, other) for one, other in zip(expected, gradients, strict=True))


def test_balanced_learns_nothing_from_a_batch_without_labels():
    _, ours = pair()
    reversible(ours, "balanced")
    inputs = batch(1)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    ours.train()(**inputs, decoder_input_ids=torch.ones_like(inputs["labels"])).loss.backward()
    assert all(not p.grad.any() for p in ours.parameters())


def test_two_forwards_before_one_backward_differ_in_the_table_by_rounding():
    stock, ours = pair()
    reversible(ours, "fast")
    found = []
    for model in (stock, ours):
        found += gradients(model, lambda model: (model(**batch(1)).loss + model(**batch(2)).loss).backward())
    assert differences(found[:1], found[1:]) == ["0:shared.weight"]
    assert torch.allclose(found[0]["shared.weight"], found[1]["shared.weight"], rtol=1e-4, atol=1e-6)


def test_what_would_be_replaced_or_forgotten_is_refused_by_name():
    _, ours = pair()
    ours.encoder.block[1].forward = ours.encoder.block[1].forward
    with pytest.raises(BwskError, match=r"encoder\.block\.1 has been replaced"):
        reversible(ours, "max")
    _, ours = pair()
    ours.forward = copy.copy(ours.forward)
    with pytest.raises(BwskError, match="the model has been replaced"):
        make_reversible(ours)
    _, ours = pair(feed_forward_proj="prelu")
    with pytest.raises(BwskError, match="activation with weights"):
        make_reversible(ours)
    _, ours = pair()
    ours.encoder.block[0].layer[0].layer_norm = OtherNorm(32)
    with pytest.raises(BwskError, match=r"layer\.0\.layer_norm is OtherNorm"):
        make_reversible(ours)
    assert not any(hasattr(module, "_bwsk") for module in ours.modules())
