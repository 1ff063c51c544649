"""The census of operations: every family classified, and numbers that agree with what really runs."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import BertConfig, GPT2Config, GPTNeoXConfig, ResNetConfig, T5Config, ViTConfig

from bwsk import trace
from bwsk.architecture import build
from bwsk.errors import BwskError

TINY_T5 = T5Config(d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, vocab_size=50, decoder_start_token_id=0)
FAMILIES = {
    "t5": TINY_T5,
    "bert": BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50),
    "gpt2": GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0),
    "gpt_neox": GPTNeoXConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50
    ),
    "vit": ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    ),
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], image_size=32),
}
SMALL = {"batch": 2, "input_length": 8, "target_length": 6}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("autocast", [None, "bf16", "fp16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_operation_of_the_family_is_classified(name, autocast, attention):
    if name == "resnet" and attention == "sdpa":
        attention = None
    result = trace(FAMILIES[name], autocast=autocast, attn_implementation=attention, **SMALL)
    assert result.unknown() == []
    assert result.gray == 0
    assert result.s > 0
    assert result.k > 0
    assert result.backward["operations"] > result.total / 2


@pytest.fixture(scope="module")
def t5():
    return trace(TINY_T5, attn_implementation="eager", **SMALL)


def test_softmax_residuals_reshapes_and_products_appear(t5):
    kinds = {(row["operator"], row["kind"]) for row in t5.by_operator()}
    assert {("aten::_softmax", "softmax"), ("aten::add", "merge"), ("aten::view", "reshape")} <= kinds
    assert ("aten::bmm", "product") in kinds or ("aten::matmul", "product") in kinds
    merges = [op for op in t5.data if op.operator == "aten::add" and op.kind == "merge"]
    assert len(merges) == 10  # one residual addition for each of 2 x 2 encoder and 2 x 3 decoder sublayers
    assert sum(op.kind == "softmax" and op.operator == "aten::_softmax" for op in t5.data) == 6


def test_paths_name_the_module_that_ran(t5):
    relu = [op.module for op in t5.data if op.kind == "relu"]
    assert relu[0] == "encoder.block.0.layer.1.DenseReluDense.act"
    assert len(relu) == 4


def test_roles_tell_data_from_constants(t5):
    """The position buckets are computed from constants only, however many operators that takes."""
    constants = [op for op in t5.operations if not op.on_data]
    assert {op.kind for op in constants} <= {"constant", "random"}
    assert any("relative_attention_bias" in op.module or "SelfAttention" in op.module for op in constants)
    assert all(op.on_data for op in t5.operations if op.kind == "merge")


def test_matrix_products_have_the_flops_of_the_formula():
    layer = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    result = trace(_Fed(layer), inputs={"x": torch.zeros(3, 8)})
    products = [op.flops for op in result.data if op.kind == "linear"]
    assert products == [2 * 3 * 8 * 16, 2 * 3 * 16 * 4]
    assert [op.verdict for op in result.data if op.kind == "linear"] == ["S", "K"]
    relu = next(op for op in result.data if op.kind == "relu")
    assert (relu.flops, relu.bytes) == (3 * 16, 2 * 3 * 16 * 4)
    # backward: one product for each weight and one for the hidden activation (the input needs no gradient)
    assert result.backward["by_operator"]["aten::mm"] == 3


class _Fed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("config", [TINY_T5, FAMILIES["bert"], FAMILIES["gpt2"]], ids=["t5", "bert", "gpt2"])
def test_saved_bytes_are_those_of_a_real_step(config):
    """The same step on real tensors, without dropout (whose masks CPU and CUDA keep in different types)."""
    for name in (
        "dropout_rate",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
    ):
        if hasattr(config, name):
            config = type(config)(**{**config.to_dict(), name: 0.0})
    model = build(config, device="cpu", attn_implementation="eager")
    traced = trace(model, **SMALL)
    ids = torch.zeros(2, 8, dtype=torch.long)
    feed = {"input_ids": ids, "labels": ids, "use_cache": False}
    if config.is_encoder_decoder:
        target = torch.zeros(2, 6, dtype=torch.long)
        feed |= {"decoder_input_ids": target, "labels": target}
    if config.model_type == "bert":
        feed.pop("use_cache")
    owned = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    owned |= {t.untyped_storage().data_ptr() for t in feed.values() if isinstance(t, torch.Tensor)}
    kept: dict[int, int] = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(**feed)
    assert out.loss.requires_grad
    # Alone among these, storages that hold no elements or a single index constant may be shared differently.
    assert traced.saved_bytes == pytest.approx(sum(kept.values()), rel=0.01)


def test_tracing_leaves_the_model_alone():
    model = build(TINY_T5, device="cpu")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    identity = [id(p) for p in model.parameters()]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    trace(model, **SMALL)
    assert torch.equal(state, torch.get_rng_state())
    assert [id(p) for p in model.parameters()] == identity
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None and not m._forward_hooks for m in model.modules() for p in m.parameters(recurse=False))


def test_autocast_casts_appear():
    plain, lowered = (trace(TINY_T5, autocast=a, **SMALL) for a in (None, "bf16"))
    assert not any(op.kind == "narrowing_cast" for op in plain.data)
    assert any(op.kind == "narrowing_cast" and op.verdict == "K" for op in lowered.data)
    assert lowered.setting["autocast"] == "bf16"


def test_dropout_disappears_in_eval():
    assert any(op.kind == "dropout" for op in trace(TINY_T5, **SMALL).data)
    assert not any(op.kind == "dropout" for op in trace(TINY_T5, training=False, **SMALL).data)


def test_dropout_of_everything_erases():
    assert [op.verdict for op in trace(nn.Dropout(1.0), inputs={"input": torch.ones(2, 3)}).data] == ["K"]


def test_published_rules_decide_where_they_speak(t5):
    published = trace(TINY_T5, attn_implementation="eager", rules="published", **SMALL)
    by_strict = {op.index: op for op in t5.data}
    for op in published.data:
        assert op.verdict == (op.published or op.strict)
        assert op.strict == by_strict[op.index].verdict
    assert any(op.kind == "softmax" and op.verdict == "K" for op in published.data)
    assert any(op.kind == "merge" and op.published is None for op in published.data)


class _Fourier(_Fed):
    def forward(self, x):
        return torch.fft.rfft(self.layer(x)).abs()


def test_an_unknown_operator_is_gray_and_listed_by_name():
    result = trace(_Fourier(nn.Linear(8, 8)), inputs={"x": torch.zeros(2, 8)})
    assert result.unknown() == ["aten::_fft_r2c"]
    assert result.gray == 1


class _Slices(_Fed):
    """Fills a buffer slice by slice, as sliding windows do, then goes on with the buffer."""

    def forward(self, x):
        y = self.layer(x)
        buffer = torch.zeros_like(y)
        buffer[:, :4] = y[:, 4:]
        buffer[:, 4:] = y[:, :4]
        return buffer.relu().sum()


def test_what_is_written_through_a_view_is_followed():
    result = trace(_Slices(nn.Linear(8, 8)), inputs={"x": torch.zeros(2, 8)})
    by_index = {op.index: op for op in result.data}
    (relu,) = (op for op in result.data if op.kind == "relu")
    seen, waiting = set(), [relu.index]
    while waiting:
        at = waiting.pop()
        if at in by_index and at not in seen:
            seen.add(at)
            waiting += [source for source, _ in by_index[at].inputs]
    copies = {op.index for op in result.data if op.operator == "aten::copy_"}
    assert len(copies) == 2
    assert copies <= seen
    assert any(by_index[index].kind == "linear" for index in seen)


class _Overwritten(_Fed):
    def forward(self, x):
        y = self.layer(x)
        y[:, :4] = self.layer.bias[:4]
        return y


def test_writing_over_an_activation_erases():
    result = trace(_Overwritten(nn.Linear(8, 8)), inputs={"x": torch.zeros(2, 8)})
    assert [op.verdict for op in result.data if op.operator == "aten::copy_"] == ["K"]


def test_to_dict_is_strict_json(t5):
    value = json.loads(json.dumps(t5.to_dict(), allow_nan=False))
    assert value["s"] + value["k"] + value["gray"] == value["total"]
    assert sum(row["count"] for row in value["by_operator"]) == value["total"]
    assert sum(row["saved_bytes"] for row in value["by_operator"]) <= value["saved_bytes"]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"autocast": "int8"}, "autocast"),
        ({"batch": 0}, "batch 0"),
        ({"rules": "lenient"}, "no such rule set"),
    ],
)
def test_bad_arguments(arguments, what):
    with pytest.raises(BwskError, match=what):
        trace(TINY_T5, **(SMALL | arguments))


def test_bad_models():
    with pytest.raises(BwskError, match="inputs="):
        trace(nn.Linear(2, 2))
    with pytest.raises(BwskError, match="positions for 16"):
        trace(GPT2Config(n_positions=16), input_length=32)

    class Branching(_Fed):
        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(BwskError, match="cannot be traced without values"):
        trace(Branching(nn.Linear(2, 2)), inputs={"x": torch.zeros(1, 2)})
