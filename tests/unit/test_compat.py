"""Every private name of torch and transformers that bwsk stands on does what bwsk takes it to do.

One test a name or family: where one fails on a new release, what is built on that name is wrong there.
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from bwsk import BwskError, _compat
from bwsk.study.provenance import PACKAGE

EXERCISED: set[str] = set()


def exercises(*names: str) -> Callable[[Any], Any]:
    """Marks the test of these names of `bwsk._compat`."""
    EXERCISED.update(names)
    return lambda test: test


def small_t5(cls: type = T5ForConditionalGeneration, config: type = T5Config, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return cls(config(**sizes, decoder_start_token_id=0, **options))


def small_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2))


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Tensor:
    """What autograd makes of g, the gradient of `function(x)`."""
    x = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(function(x), x, g)
    return found


def dispatched(function: Callable[[], Any]) -> list[Any]:
    """The operators that a function runs."""
    seen = []

    class Mode(_compat.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        function()
    return seen


# --- operators, tensors without values, trees ---


@exercises("TorchDispatchMode", "operator_name")
def test_a_dispatch_mode_sees_each_operator_by_its_name() -> None:
    linear = nn.Linear(2, 3)
    seen = dispatched(lambda: linear(torch.ones(4, 2)).sum().backward())
    names = [_compat.operator_name(func) for func in seen]
    assert "aten::addmm" in names
    assert names.count("aten::mm") >= 1  # of the backward
    assert seen[0].overloadpacket is torch.ops.aten.ones


@exercises("mutates")
def test_operators_that_write_into_an_argument_are_told() -> None:
    assert _compat.mutates(torch.ops.aten.add_.Tensor)
    assert _compat.mutates(torch.ops.aten.mm.out)
    assert not _compat.mutates(torch.ops.aten.add.Tensor)


@exercises("is_view")
def test_operators_that_only_look_are_told() -> None:
    assert _compat.is_view(torch.ops.aten.transpose.int)
    assert not _compat.is_view(torch.ops.aten.mm.default)


@exercises("FakeTensorMode", "FakeTensor")
def test_fake_tensors_have_shapes_and_gradients_and_no_values() -> None:
    outside = torch.ones(3)
    with _compat.FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 3, requires_grad=True)
        y = (x * outside).sum()
        y.backward()
    assert isinstance(x, _compat.FakeTensor)
    assert isinstance(y, _compat.FakeTensor)
    assert x.grad.shape == (2, 3)
    assert not isinstance(outside, _compat.FakeTensor)


@exercises("DataDependentOutputException", "DynamicOutputShapeException", "fake_tensor_log")
def test_what_depends_on_values_is_refused_on_fake_tensors() -> None:
    with _compat.FakeTensorMode():
        x = torch.empty(3)
        with pytest.raises(_compat.DataDependentOutputException):
            x.sum().item()
        with pytest.raises(_compat.DynamicOutputShapeException):
            x.nonzero()


@exercises("fake_tensor_log")
def test_what_fails_on_fake_tensors_is_told_to_that_log() -> None:
    assert _compat.fake_tensor_log() is sys.modules[_compat.FakeTensorMode.__module__].log
    assert isinstance(_compat.fake_tensor_log(), logging.Logger)


@exercises("tree_leaves", "tree_iter", "tree_map_only")
def test_trees_of_tensors_are_walked_in_order() -> None:
    x, y, z = torch.zeros(1), torch.ones(1), torch.ones(2)
    tree = ((x, [y]), {"k": z, "n": None})
    assert [leaf for leaf in _compat.tree_leaves(tree) if leaf is not None] == [x, y, z]
    assert [leaf for leaf in _compat.tree_iter(tree) if leaf is not None] == [x, y, z]
    doubled = _compat.tree_map_only(Tensor, lambda t: 2 * t, {"a": y, "b": "text"})
    assert doubled["a"].item() == 2
    assert doubled["b"] == "text"


@exercises("flop_registry")
def test_products_have_a_formula_of_their_flops() -> None:
    formula = _compat.flop_registry[torch.ops.aten.mm]
    a, b = torch.ones(2, 3), torch.ones(3, 5)
    assert formula(a, b, out_val=a @ b) == 2 * 2 * 3 * 5
    assert torch.ops.aten.add not in _compat.flop_registry


@exercises("WeakIdKeyDictionary")
def test_tensors_as_keys_are_told_by_identity_and_held_by_nobody() -> None:
    x, y = torch.ones(2), torch.ones(2)
    found = _compat.WeakIdKeyDictionary()
    found[x] = 1
    assert y not in found
    assert found.get(x) == 1
    del x
    assert len(found) == 0


@exercises("storage_key")
def test_tensors_that_share_memory_have_the_same_key_and_others_have_not() -> None:
    x = torch.zeros(4)
    y = torch.zeros(4)
    assert _compat.storage_key(x) == _compat.storage_key(x[1:]) == _compat.storage_key(x.detach())
    assert _compat.storage_key(x) != _compat.storage_key(y)
    with _compat.FakeTensorMode():
        x, y = torch.zeros(4), torch.zeros(4)
        assert _compat.storage_key(x) == _compat.storage_key(x.view(2, 2)) != _compat.storage_key(y)


@exercises("storage_holders")
def test_an_alias_is_one_more_holder_of_the_memory() -> None:
    x = torch.zeros(4)
    alone = _compat.storage_holders(x)
    assert alone > 0
    alias = x.detach()
    assert _compat.storage_holders(x) == alone + 1
    del alias
    assert _compat.storage_holders(x) == alone


@exercises("current_backward")
def test_a_backward_has_a_number() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    for _ in range(2):
        y = x * 2 * 3
        for node in (y.grad_fn, y.grad_fn.next_functions[0][0]):
            node.register_prehook(lambda g: seen.append(_compat.current_backward()))
        y.sum().backward()
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert _compat.current_backward() == -1 not in seen


@exercises("tensor_version")
def test_a_tensor_counts_what_is_written_to_it() -> None:
    x = torch.zeros(4)
    before = _compat.tensor_version(x)
    x + 1
    assert _compat.tensor_version(x) == before
    x[1:].add_(1)
    assert _compat.tensor_version(x) == before + 1


@exercises("inside_compiled")
def test_the_model_inside_a_compiled_one() -> None:
    model = nn.Linear(2, 2)
    assert _compat.inside_compiled(torch.compile(model)) is model
    assert _compat.inside_compiled(model) is None


# --- autograd's operators: the same bits as autograd ---


@exercises("native_dropout", "native_dropout_backward")
def test_dropout_with_a_mask() -> None:
    x, g = torch.randn(50, 7), torch.randn(50, 7)
    y, mask = _compat.native_dropout(x, 0.25, True)
    assert mask.dtype is torch.bool
    assert 0 < mask.sum() < mask.numel()
    assert torch.equal(y, x * mask * (1 / 0.75))
    assert torch.equal(_compat.native_dropout_backward(g, mask, 1 / 0.75), g * mask * (1 / 0.75))


@exercises("softmax_backward_out")
def test_softmax_backward_in_place() -> None:
    x, g = torch.randn(5, 7), torch.randn(5, 7)
    p = x.softmax(-1)
    found = g.clone()
    out = _compat.softmax_backward_out(found, p, -1, p.dtype, grad_input=found)
    assert out.data_ptr() == found.data_ptr()
    assert torch.equal(found, gradient(lambda x: x.softmax(-1), x, g))


@exercises("log_softmax_backward")
def test_log_softmax_backward() -> None:
    x, g = torch.randn(5, 7), torch.randn(5, 7)
    found = _compat.log_softmax_backward(g, x.log_softmax(-1), -1, x.dtype)
    assert torch.equal(found, gradient(lambda x: x.log_softmax(-1), x, g))


@exercises("threshold_backward_out")
def test_relu_backward_in_place() -> None:
    x, g = torch.randn(5, 7), torch.randn(5, 7)
    found = g.clone()
    assert _compat.threshold_backward_out(found, x.relu(), 0, grad_input=found).data_ptr() == found.data_ptr()
    assert torch.equal(found, gradient(torch.relu, x, g))


@exercises("embedding_backward")
def test_embedding_backward_sums_equal_tokens_and_leaves_padding_out() -> None:
    tokens, g, table = torch.tensor([[1, 3, 1, 0]]), torch.randn(1, 4, 2), torch.randn(5, 2)
    found = _compat.embedding_backward(g, tokens, 5, 0, False)
    assert torch.equal(found, gradient(lambda w: nn.functional.embedding(tokens, w, 0), table, g))
    assert not found[0].any()
    assert torch.equal(found[1], g[0, 0] + g[0, 2])


@exercises("nll_loss_forward", "nll_loss_backward")
def test_the_mean_of_the_losses_and_its_gradient() -> None:
    scores, labels = torch.randn(6, 4).log_softmax(-1), torch.tensor([0, 1, -100, 3, 3, 2])
    loss, weight = _compat.nll_loss_forward(scores, labels, None, 1, -100)
    assert weight == 5
    assert torch.equal(loss, nn.functional.nll_loss(scores, labels))
    g = torch.tensor(2.0)
    found = _compat.nll_loss_backward(g, scores, labels, None, 1, -100, weight)
    assert torch.equal(found, gradient(lambda x: nn.functional.nll_loss(x, labels), scores, g))


@exercises("mm_out")
def test_a_product_into_given_memory() -> None:
    a, b, out = torch.randn(3, 4), torch.randn(4, 5), torch.empty(3, 5)
    assert _compat.mm_out(a, b, out=out).data_ptr() == out.data_ptr()
    assert torch.equal(out, a @ b)


@exercises("onednn_linear")
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_a_product_by_onednn() -> None:
    a, w = torch.randn(30, 40), torch.randn(50, 40)
    found = _compat.onednn_linear()(a, w, None, "none", [], "")
    assert torch.allclose(found, a @ w.t(), atol=1e-4)


# --- modules ---

LAYERS = {
    "AdaptiveAvgPoolNd": nn.AdaptiveAvgPool2d(1),
    "AdaptiveMaxPoolNd": nn.AdaptiveMaxPool1d(1),
    "AvgPoolNd": nn.AvgPool3d(2),
    "LPPoolNd": nn.LPPool2d(2, 2),
    "MaxPoolNd": nn.MaxPool1d(2),
    "BatchNorm": nn.SyncBatchNorm(2),
    "InstanceNorm": nn.InstanceNorm3d(2),
    "ConvNd": nn.ConvTranspose2d(2, 2, 1),
    "DropoutNd": nn.AlphaDropout(),
    "Loss": nn.CrossEntropyLoss(),
}


@exercises(*LAYERS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_their_base_class_alone(name: str) -> None:
    assert [layer for layer in LAYERS if isinstance(LAYERS[name], getattr(_compat, layer))] == [name]


@exercises("globally_hooked")
def test_hooks_for_all_modules_are_seen() -> None:
    module = nn.modules.module
    assert not _compat.globally_hooked()
    for register in (
        module.register_module_forward_hook,
        module.register_module_forward_pre_hook,
        module.register_module_full_backward_hook,
        module.register_module_full_backward_pre_hook,
    ):
        handle = register(lambda *args: None)
        assert _compat.globally_hooked(), register
        handle.remove()
    assert not _compat.globally_hooked()


def test_a_modules_own_dictionaries_hold_what_it_is_made_of() -> None:
    layer = nn.Linear(2, 2)
    outer = nn.Sequential(layer, nn.BatchNorm1d(2))
    assert outer._modules["0"] is layer
    assert layer._parameters["weight"] is layer.weight
    assert outer[1]._buffers["running_mean"] is outer[1].running_mean
    for register, hooks in (
        (layer.register_forward_hook, layer._forward_hooks),
        (layer.register_forward_pre_hook, layer._forward_pre_hooks),
        (layer.register_full_backward_hook, layer._backward_hooks),
        (layer.register_full_backward_pre_hook, layer._backward_pre_hooks),
    ):
        assert not hooks
        handle = register(lambda *args: None)
        assert len(hooks) == 1
        handle.remove()


# --- transformers ---


@exercises("attention_kind", "set_attention_kind", "ALL_ATTENTION_FUNCTIONS")
def test_a_config_names_the_function_that_computes_attention() -> None:
    model = small_gpt2().eval()
    assert _compat.attention_kind(model.config) == "sdpa"
    tokens, calls = torch.ones(1, 4, dtype=torch.long), []
    plain = _compat.ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return plain(*args, **kwargs)

    expected = model(tokens).logits
    _compat.ALL_ATTENTION_FUNCTIONS.register("counted", counted)
    attention = next(module for module in model.modules() if _compat.looks_up_attention(module))
    attention.config = copy.copy(attention.config)
    _compat.set_attention_kind(attention.config, "counted")
    assert _compat.attention_kind(attention.config) == "counted"
    assert _compat.attention_kind(model.config) == "sdpa"
    assert torch.equal(model(tokens).logits, expected)
    assert len(calls) == 1


@exercises("experts_kind")
def test_a_config_names_the_function_that_computes_experts() -> None:
    config = MixtralConfig()
    config._experts_implementation = "eager"
    assert _compat.experts_kind(config) == "eager"


@exercises("looks_up_attention")
def test_attention_modules_that_ask_for_their_function_are_known_by_their_code() -> None:
    model = small_gpt2()
    assert [name for name, m in model.named_modules() if _compat.looks_up_attention(m)] == ["transformer.h.0.attn"]
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=32, hidden_size=8, n_layer=1, n_head=2))
    assert not any(map(_compat.looks_up_attention, bloom.modules()))

    def default() -> None: ...

    assert _compat.ALL_ATTENTION_FUNCTIONS.get_interface("eager", default) is default


@exercises("GradientCheckpointingLayer")
def test_a_models_blocks_are_checkpointing_layers() -> None:
    for model, names in (
        (small_gpt2(), ["transformer.h.0"]),
        (small_t5(), ["encoder.block.0", "decoder.block.0"]),
    ):
        layers = [name for name, m in model.named_modules() if isinstance(m, _compat.GradientCheckpointingLayer)]
        assert layers == names


@exercises("routes_to_experts")
def test_modules_with_experts_are_told_by_their_class() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)
    mixture = transformers.MixtralForCausalLM(config)
    assert any(_compat.routes_to_experts(module) for module in mixture.model.layers[0].modules())
    assert not any(_compat.routes_to_experts(module) for module in small_gpt2().modules())


@exercises("DynamicLayer", "DynamicSlidingWindowLayer")
def test_a_cache_has_a_layer_of_its_kind_for_each_block() -> None:
    keys = torch.ones(1, 2, 3, 4)
    plain = DynamicCache()
    plain.update(keys, keys, 0)
    assert type(plain.layers[0]) is _compat.DynamicLayer
    assert plain.get_seq_length(0) == 3
    sliding = DynamicCache(config=transformers.MistralConfig(num_hidden_layers=1, sliding_window=2))
    assert type(sliding.layers[0]) is _compat.DynamicSlidingWindowLayer


@exercises("LOSS_MAPPING", "ForCausalLMLoss", "own_loss", "set_loss")
def test_a_causal_models_loss_is_the_shared_one_and_can_be_its_own() -> None:
    model, tokens = small_gpt2(), torch.tensor([[1, 2, 3, 4]])
    assert _compat.LOSS_MAPPING["ForCausalLM"] is _compat.ForCausalLMLoss
    assert _compat.LOSS_MAPPING.get(model.loss_type, _compat.ForCausalLMLoss) is _compat.ForCausalLMLoss
    outputs = model.eval()(tokens, labels=tokens)
    logits = outputs.logits[:, :-1].reshape(-1, 32)
    assert torch.equal(outputs.loss, nn.functional.cross_entropy(logits, tokens[:, 1:].reshape(-1)))
    assert torch.equal(outputs.loss, _compat.ForCausalLMLoss(outputs.logits, tokens, 32, None, -100, None))
    assert _compat.own_loss(model) is None

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        return torch.tensor(7.0)

    _compat.set_loss(model, loss)
    assert _compat.own_loss(model) is loss
    assert model(tokens, labels=tokens).loss == 7
    _compat.set_loss(model, None)
    assert _compat.own_loss(model) is None
    assert torch.equal(model(tokens, labels=tokens).loss, outputs.loss)


@exercises("CONFIG_MAPPING", "CONFIG_MAPPING_NAMES")
def test_a_model_type_names_its_config_class() -> None:
    assert _compat.CONFIG_MAPPING_NAMES["t5"] == "T5Config"
    config = _compat.CONFIG_MAPPING["t5"].from_dict({"model_type": "t5", "d_model": 8})
    assert (type(config), config.d_model) == (T5Config, 8)
    assert "no such" not in _compat.CONFIG_MAPPING_NAMES


CLASSES = {
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": ("t5", "T5ForConditionalGeneration"),
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": ("whisper", "WhisperForConditionalGeneration"),
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": ("bert", "BertForMaskedLM"),
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": ("gpt2", "GPT2LMHeadModel"),
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": ("vit", "ViTForImageClassification"),
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES": ("wav2vec2", "Wav2Vec2ForSequenceClassification"),
    "MODEL_MAPPING_NAMES": ("t5", "T5Model"),
}


@exercises(*CLASSES, "HEADS")
@pytest.mark.parametrize("head", CLASSES)
def test_a_model_type_names_its_class_for_each_task(head: str) -> None:
    kind, name = CLASSES[head]
    assert getattr(_compat, head)[kind] == name
    assert head in _compat.HEADS


@exercises("from_config")
def test_a_model_is_built_from_a_config_alone() -> None:
    config = small_t5().config
    with torch.device("meta"):
        model = _compat.from_config(T5ForConditionalGeneration)(copy.deepcopy(config), attn_implementation="eager")
    assert _compat.attention_kind(model.config) == "eager"
    assert model.shared.weight.is_meta
    assert model.lm_head.weight is model.shared.weight


@exercises("output_capturing", "collects_outputs")
def test_transformers_own_hooks_are_told_from_others() -> None:
    """Asked for in every way that there is: what no hook is made for needs none told."""
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    model.set_attn_implementation("eager")
    model(torch.ones(1, 4, dtype=torch.long), output_hidden_states=True, output_attentions=True)
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert hooks
    assert all(map(_compat.collects_outputs, hooks))
    assert not _compat.collects_outputs(lambda *args: None)
    assert _compat.output_capturing.__name__ == hooks[0].__module__


FAMILY = [(T5ForConditionalGeneration, T5Config), (MT5ForConditionalGeneration, MT5Config)]


@exercises("cache_argument", "with_cache_argument")
def test_a_cache_has_the_name_that_stock_models_give_it() -> None:
    name = _compat.cache_argument()
    assert name in inspect.signature(T5ForConditionalGeneration.forward).parameters
    cache = DynamicCache()
    for given in (name, "past_key_values"):
        assert _compat.with_cache_argument({given: cache, "use_cache": True}) == {name: cache, "use_cache": True}
    assert _compat.with_cache_argument({"use_cache": True}) == {"use_cache": True}


@exercises("enable_checkpointing")
@pytest.mark.filterwarnings("error")
def test_checkpointing_is_switched_on_by_the_name_of_this_version() -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    for reentrant in (False, True):
        _compat.enable_checkpointing(model, use_reentrant=reentrant)
        assert model.encoder.block[0].gradient_checkpointing
        assert model.encoder.block[0]._gradient_checkpointing_func.keywords["use_reentrant"] is reentrant


@exercises("REPLICATE")
def test_data_parallel_makes_replicas_by_a_method_of_the_module() -> None:
    layer = nn.Linear(2, 2)
    setattr(layer, _compat.REPLICATE, lambda: "ours")
    assert getattr(layer, _compat.REPLICATE)() == "ours"
    replica = getattr(nn.Linear, _compat.REPLICATE)(layer)
    assert type(replica) is nn.Linear
    assert replica is not layer


@exercises("create_causal_mask")
def test_the_mask_of_a_decoder_without_padding_is_the_causal_one() -> None:
    config = small_t5().decoder.config
    config._attn_implementation = "eager"
    like = torch.empty(2, 5, 0)
    mask = _compat.create_causal_mask(config=config, inputs_embeds=like, attention_mask=None, past_key_values=None)
    assert torch.equal(mask[0, 0] == 0, torch.ones(5, 5).tril().bool())


@exercises("LabelSmoother")
def test_the_trainers_smoothed_loss_is_cross_entropys() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[1, 2, 3, -100, 4], [0, 0, 6, 5, -100]])
    for shifts in (False, True):
        scores, ids = (logits[:, :-1], labels[:, 1:]) if shifts else (logits, labels)
        wanted = nn.functional.cross_entropy(scores.flatten(0, 1), ids.flatten(), label_smoothing=0.2)
        found = _compat.LabelSmoother(0.2)({"logits": logits}, labels, shift_labels=shifts)
        torch.testing.assert_close(found, wanted)


@exercises("masking_utils")
def test_masks_are_left_out_by_what_this_module_calls_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of ones is left out in an ordinary step, but not while transformers believes that it is being traced."""
    stack, found = small_t5().encoder, []
    block = stack.block[0]
    block.register_forward_pre_hook(
        lambda module, args, kwargs: found.append([*args, *kwargs.values()]), with_kwargs=True
    )
    tokens = torch.ones(1, 4, dtype=torch.long)
    stack(tokens, attention_mask=tokens)
    monkeypatch.setattr(_compat.masking_utils, "is_tracing", lambda tensor=None: True)
    stack(tokens, attention_mask=tokens)
    ordinary, traced = (sum(isinstance(one, torch.Tensor) for one in call) for call in found)
    assert traced == ordinary + 1


@exercises("T5_ATTENTIONS", "T5_STACKS")
@pytest.mark.parametrize(("cls", "config"), FAMILY)
def test_a_t5_is_built_of_the_classes_and_modules_that_the_engine_names(cls: type, config: type) -> None:
    model = small_t5(cls, config)
    stacks = [name for name, module in model.named_modules() if type(module).__name__ in _compat.T5_STACKS]
    assert stacks == ["encoder", "decoder"]
    kinds = [type(module).__name__ for module in model.modules() if hasattr(module, "relative_attention_num_buckets")]
    assert set(kinds) <= set(_compat.T5_ATTENTIONS)
    assert kinds
    wi = "wi" if cls is T5ForConditionalGeneration else "wi_0"
    names = dict(model.named_modules())
    for name in (
        "encoder.block.0.layer.0.SelfAttention.q",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        f"encoder.block.0.layer.1.DenseReluDense.{wi}",
        "decoder.block.0.layer.1.EncDecAttention.o",
        "decoder.block.0.layer.2.DenseReluDense.wo",
        "decoder.block.0.layer.2.layer_norm",
        "decoder.final_layer_norm",
    ):
        assert name in names


@exercises("shift_right")
def test_decoder_inputs_are_the_labels_one_later() -> None:
    found = _compat.shift_right(small_t5(pad_token_id=0))(torch.tensor([[5, 6, -100]]))
    assert found.tolist() == [[0, 5, 6]]


@exercises("relative_position_bucket")
def test_position_buckets_of_a_t5() -> None:
    attention = small_t5().decoder.block[0].layer[0].SelfAttention
    bucket = _compat.relative_position_bucket(attention)
    found = bucket(torch.tensor([[3, 0, -3, -500]]), bidirectional=False, num_buckets=8, max_distance=16)
    assert found.tolist() == [[0, 0, 3, 7]]
    assert _compat.relative_position_bucket(nn.Linear(2, 2), None) is None


# --- the file itself ---


def test_each_name_has_its_test() -> None:
    public = {name for name in vars(_compat) if not name.startswith("_")}
    imported = {name for name in public if getattr(vars(_compat)[name], "__module__", None) != "bwsk._compat"}
    own = {
        name for name in public if name in ("HEADS", "REPLICATE", "T5_ATTENTIONS", "T5_STACKS") or name not in imported
    }
    machinery = {"Missing", "missing"}
    assert {*_compat._OBJECTS, *own} - machinery == EXERCISED


def test_nothing_is_missing_here() -> None:
    assert _compat.missing() == []


@contextmanager
def without(owner: Any, name: str) -> Iterator[None]:
    """An attribute taken away, as if this version had none."""
    value = vars(owner)[name]
    delattr(owner, name)
    try:
        yield
    finally:
        setattr(owner, name, value)


def test_what_a_version_lacks_is_told_in_one_line_by_what_needs_it() -> None:
    model = small_t5().train()
    with without(type(model).__mro__[1], "_shift_right"), pytest.raises(BwskError) as caught:
        _compat.shift_right(model)
    assert str(caught.value) == (
        f"transformers {transformers.__version__}: has no transformers.T5ForConditionalGeneration._shift_right, "
        "needed by make_reversible; install a transformers from 5.17 to 5.24"
    )
    with without(sys.modules["torch.utils._pytree"], "tree_iter"):
        _compat.__dict__.pop("tree_iter", None)
        with pytest.raises(BwskError, match=r"^torch .*: has no torch.utils._pytree.tree_iter, needed by predict"):
            _compat.tree_iter  # noqa: B018
        (fault,) = _compat.missing()
        assert not fault.optional
    with without(torch._C, "_storage_Use_Count"):
        (fault,) = _compat.missing()
        assert fault.optional
        assert _compat.storage_holders(torch.ones(1)) == -1
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_kind'"):
        _compat.nothing_of_the_kind  # noqa: B018


BREAKS = {
    "a class of torch": (
        "import transformers.modeling_utils, torch._subclasses.fake_tensor as m; del m.DynamicOutputShapeException",
        "torch._subclasses.fake_tensor.DynamicOutputShapeException",
        ("memory", "plan"),
    ),
    "an operator": (
        "import torch; del torch._log_softmax_backward_data",
        "torch._log_softmax_backward_data",
        ("plan",),
    ),
    "an attribute": (
        "import transformers; del transformers.PreTrainedModel._from_config",
        "transformers.PreTrainedModel._from_config",
        ("classify", "memory"),
    ),
    "a table": (
        "import transformers.models.auto.modeling_auto as m; del m.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        "transformers.models.auto.modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        ("classify",),
    ),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_commands_and_the_doctor_tell_in_one_line_what_a_version_lacks(broken: str, tmp_path: Path) -> None:
    prelude, path, commands = BREAKS[broken]
    config = tmp_path / "config.json"
    config.write_text(json.dumps(small_t5().config.to_dict()))
    for command in commands:
        done = bwsk(prelude, command, str(config), cwd=tmp_path)
        assert done.returncode == 1, done.stdout
        (line,) = done.stderr.splitlines()
        assert line.startswith("bwsk: error: ")
        assert f": has no {path}, needed by " in line
    done = bwsk(prelude, "doctor", cwd=tmp_path)
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if "has no" in line]
    assert line.startswith("fail library ")
    assert path in line


def bwsk(prelude: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A `bwsk` command in a fresh Python that runs `prelude` first."""
    code = f"{prelude}\nimport sys\nsys.argv = ['bwsk', *{arguments!r}]\nfrom bwsk.cli import main\nmain()"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


# --- nothing private elsewhere ---

# A module's own dictionaries (see the docstring of `bwsk._compat`).
IDIOMS = {
    "_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
    "_backward_pre_hooks",
}  # fmt: skip
# Operators that specimens are evidence about.
SUBJECTS = {"_to_copy", "_softmax"}
# What torch and transformers document.
PUBLIC = re.compile(
    r"torch(\.(nn(\.(functional|parameter))?|overrides|utils\.checkpoint|optim(\.lr_scheduler)?))?"
    r"|transformers(\.utils(\.logging)?)?"
)


def own_names(trees: list[ast.AST]) -> set[str]:
    """The private names that bwsk gives itself: of functions, classes, variables, and attributes of `self`."""
    found = {"_bwsk", "_bwsk_before"}
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return found


def private_uses(tree: ast.AST, own: set[str]) -> Iterator[tuple[int, str]]:
    """Line and name of each private name of torch or transformers in a source file, in code or as a text."""

    def private(name: str) -> bool:
        return name.startswith("_") and not name.startswith("__") and name not in own | IDIOMS | SUBJECTS

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if not _public(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("bwsk"):
            names = [node.module] if not _public(node.module) else []
            names += [alias.name for alias in node.names if private(alias.name)]
            yield from ((node.lineno, name) for name in names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            path = re.fullmatch(r"(torch|transformers)(\.\w+)+", text) and not _public(text)
            if path or text in ("eager_attention_forward", *_compat.T5_STACKS, *_compat.T5_ATTENTIONS, *_compat.HEADS):
                yield node.lineno, text
        if isinstance(node, (ast.Call, ast.Compare)):
            named = getattr(getattr(node, "func", None), "id", "")
            parts = node.args if isinstance(node, ast.Call) and named.endswith("attr") else []
            parts = [node.left] if isinstance(node, ast.Compare) else parts
            for part in parts:
                if isinstance(part, ast.Constant) and isinstance(part.value, str) and private(part.value):
                    yield node.lineno, part.value


def _public(module: str) -> bool:
    return module.partition(".")[0] not in ("torch", "transformers") or bool(PUBLIC.fullmatch(module))


def test_no_private_name_of_torch_or_transformers_is_used_elsewhere() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "_compat.py"]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    own = own_names(list(trees.values()))
    found = [f"{path.name}: {name}" for path, tree in trees.items() for _, name in private_uses(tree, own)]
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "from torch._subclasses import fake_tensor",
        "import torch.utils._pytree",
        "from torch.utils.weak import WeakIdKeyDictionary",
        "from transformers.cache_utils import DynamicLayer",
        "x = tensor._version",
        "model._loss_function = f",
        "kind = getattr(config, '_attn_implementation', None)",
        "own = '_loss_function' in vars(model)",
        "f(torch.ops.aten._softmax_backward_data.out)",
        "log = logging.getLogger('torch._subclasses.fake_tensor')",
        "stack = type(module).__name__ in ('T5Stack', 'MT5Stack')",
    ],
)
def test_the_search_finds_private_names(code: str) -> None:
    assert list(private_uses(ast.parse(code), set()))
