"""Architectures without an engine of their own: the same guarantees by redoing regions of the stock graph."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from bwsk import BwskError, make_reversible
from bwsk.reversible import checkpointed as general
from bwsk.reversible.report import rows
from tests.unit.test_reversible_gradients import batch, differences, pair

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
MODELS = {
    "bert": (BertForMaskedLM, BertConfig(vocab_size=96, **SIZES)),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=96, bos_token_id=0, eos_token_id=0),
    ),
    "gpt_neox": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig(vocab_size=96, attention_dropout=0.1, hidden_dropout=0.1, **SIZES),
    ),
    "vit": (
        ViTForImageClassification,
        ViTConfig(image_size=32, patch_size=8, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, **SIZES),
    ),
}


def inputs_of(name: str, seed: int):
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(3, 3, 32, 32, generator=generator), "labels": torch.tensor([0, 1, 0])}
    tokens = torch.randint(0, 90, (3, 9), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    cache = {} if name == "bert" else {"use_cache": False}
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask, **cache}


def train(model: nn.Module, name: str, amp: bool):
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    found = []
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = model.train()(**inputs_of(name, step)).loss
        loss.backward()
        found.append(
            {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", list(MODELS))
def test_every_gradient_is_the_same_bits(name, attention, amp):
    cls, config = MODELS[name]
    torch.manual_seed(0)
    stock = cls._from_config(copy.deepcopy(config), attn_implementation=attention)
    for budget in ("fast", "max"):
        ours = copy.deepcopy(stock)
        reference = train(copy.deepcopy(stock), name, amp)
        handle = make_reversible(ours, budget, batch=3, input_length=9)
        assert set(handle.plan.levels.values()) <= {"checkpoint_attention", "checkpoint_block"}
        assert differences(reference, train(ours, name, amp)) == []
        handle.undo()
        assert not any(hasattr(module, "_bwsk") or "forward" in module.__dict__ for module in ours.modules())
        assert ours.config._attn_implementation == attention


@pytest.mark.parametrize("budget", ["fast", "max"])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_a_generation_cache_changes_nothing(name, budget):
    """A cache changes the layout of the keys and with it the rounding; the step asked for is matched."""
    cls, config = MODELS[name]
    torch.manual_seed(0)
    stock = cls._from_config(copy.deepcopy(config), attn_implementation="eager")
    ours = copy.deepcopy(stock)
    make_reversible(ours, budget, batch=3, input_length=9)
    found = []
    for model in (stock, ours):
        torch.manual_seed(1)
        model.train()(**{**inputs_of(name, 1), "use_cache": True}).loss.backward()
        found.append([{n: p.grad for n, p in model.named_parameters()}])
    assert differences(*found) == []


def test_a_cache_of_other_states_than_keys_and_values():
    """Such blocks run their stock forward: the cache of a recomputed one would have no place for those states."""
    layers = {"layer_types": ["conv", "full_attention", "conv"], "num_key_value_heads": 2}
    torch.manual_seed(0)
    stock = Lfm2ForCausalLM(Lfm2Config(vocab_size=96, **SIZES, **layers)).train()
    ours = copy.deepcopy(stock)
    general.install_levels(ours, dict.fromkeys(general.blocks(ours), "checkpoint_block"))
    found = []
    for model in (stock, ours):
        tokens = inputs_of("gpt2", 1)["input_ids"]
        model(input_ids=tokens, labels=tokens).loss.backward()
        found.append([{n: p.grad for n, p in model.named_parameters()}])
    assert differences(*found) == []


def test_the_plan_frees_memory_and_names_verdicts():
    cls, config = MODELS["bert"]
    model = cls._from_config(copy.deepcopy(config), attn_implementation="eager")
    fast = make_reversible(model, "fast", batch=8, input_length=64)
    saved = fast.plan.saved
    assert any(row.verdict.startswith("S") for row in rows(fast.plan))
    fast.undo()
    assert make_reversible(model, "max", batch=8, input_length=64).plan.saved < saved


def test_what_cannot_be_done_is_refused_by_name():
    experts = MixtralForCausalLM(
        MixtralConfig(num_key_value_heads=2, num_local_experts=2, vocab_size=96, **{**SIZES, "num_hidden_layers": 1})
    )
    with pytest.raises(BwskError, match=r"mixtral.*experts"):
        make_reversible(experts, batch=2, input_length=8)
    bert = BertForMaskedLM(BertConfig(vocab_size=96, **SIZES))
    bert.bert.encoder.layer[0].register_forward_hook(lambda module, args, output: None)
    with pytest.raises(BwskError, match=r"bert.*hook"):
        make_reversible(bert, batch=2, input_length=8)


def test_compiled_models_run_the_engine_eagerly():
    stock, ours = pair()
    make_reversible(ours, "fast")
    compiled = torch.compile(ours.train(), backend="eager")
    found = []
    for model, parameters in ((stock.train(), stock), (compiled, ours)):
        torch.manual_seed(1)
        model(**batch(1)).loss.backward()
        found.append([{n: p.grad for n, p in parameters.named_parameters()}])
    torch.compiler.reset()
    assert differences(*found) == []


def whole_blocks(name: str, attention: str = "eager"):
    """A stock model and a copy of it whose every block is recomputed as a whole."""
    cls, config = MODELS[name]
    torch.manual_seed(0)
    stock = cls._from_config(copy.deepcopy(config), attn_implementation=attention).train()
    ours = copy.deepcopy(stock)
    general.install_levels(ours, dict.fromkeys(general.blocks(ours), "checkpoint_block"))
    return stock, ours


def test_weights_changed_before_the_backward_are_reported():
    """Redone with other weights, a block would give gradients of no step at all."""
    _, ours = whole_blocks("bert")
    loss = ours(**inputs_of("bert", 1)).loss
    with torch.no_grad():
        ours.bert.encoder.layer[1].intermediate.dense.bias.add_(1.0)
    with pytest.raises(BwskError, match="changed in place"):
        loss.backward()
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in ours.named_parameters()}
    loss = torch.func.functional_call(ours, weights, (), inputs_of("bert", 1)).loss
    with pytest.raises(BwskError, match="other weights"):
        loss.backward()


def test_hooks_that_come_later_fire_once():
    found, counts = [], []
    for model in whole_blocks("gpt2"):
        calls = []
        model.transformer.h[1].mlp.c_fc.register_forward_hook(lambda module, args, output, c=calls: c.append(module))
        found.append(train(model, "gpt2", False))
        counts.append(len(calls))
    assert differences(*found) == []
    assert counts == [3, 3]


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_causal_models_keep_one_copy_of_the_logits(name):
    """GPT2LMHeadModel names no loss; transformers falls back on the causal one for it."""
    loss = whole_blocks(name)[1](**inputs_of(name, 1)).loss
    assert "CrossEntropyNode" in loss.grad_fn.name()


def test_another_ignored_label_is_respected():
    found = []
    for model in whole_blocks("gpt_neox"):
        torch.manual_seed(1)
        tokens = inputs_of("gpt_neox", 1)["input_ids"]
        model(input_ids=tokens, labels=tokens, ignore_index=int(tokens[0, 3])).loss.backward()
        found.append([{n: p.grad for n, p in model.named_parameters()}])
    assert differences(*found) == []


def test_another_attention_implementation_set_later_is_followed():
    cls, config = MODELS["bert"]
    torch.manual_seed(0)
    stock = cls._from_config(copy.deepcopy(config), attn_implementation="eager")
    ours = copy.deepcopy(stock)
    make_reversible(ours, "fast", batch=3, input_length=9)
    found = []
    for model in (stock, ours):
        model.set_attn_implementation("sdpa")
        found.append(train(model, "bert", False))
    assert differences(*found) == []


def test_pickled_models_train_themselves():
    stock, ours = whole_blocks("vit")
    twin = pickle.loads(pickle.dumps(ours))
    assert differences(train(stock, "vit", False), train(twin, "vit", False)) == []


def test_layers_dropped_at_random_are_refused_by_name():
    sizes = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_layerdrop": 0.3}
    bart = BartForConditionalGeneration(BartConfig(vocab_size=96, d_model=32, **sizes, **layers))
    with pytest.raises(BwskError, match=r"BartForConditionalGeneration.*values"):
        make_reversible(bart, batch=2, input_length=8)
