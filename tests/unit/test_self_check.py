"""The self-check of make_reversible: it notices a broken engine wherever it is broken, and leaves no trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from bwsk import BwskError, make_reversible
from bwsk.reversible import checkpointed, cross_entropy
from bwsk.reversible.t5 import attention, feed_forward, forwards, nodes, tied_embedding
from tests.unit.test_reversible_stock import SHAPE, llama, step, tiny, tokens


def scaled(function: Callable[..., Any], factor: float = 1 + 2**-20) -> Callable[..., Any]:
    """The same, and one in a million more."""

    def run(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        return (found[0] * factor, *found[1:]) if isinstance(found, tuple) else found * factor

    return run


def one_bit_flipped(mask: Tensor) -> Tensor:
    packed = pack(mask)
    packed[0] ^= 128
    return packed


pack = attention.dropout_forward.__globals__["pack_bits"]


def without_own_bias(*args: Any) -> None:
    return None


def states_swapped(*args: Any, **kwargs: Any) -> Any:
    """The gradients of the encoder's states in the other order."""
    g_x, g_bias, g_states, g_weights = attention_backward(*args, **kwargs)
    return g_x, g_bias, (g_states[0], None if g_states[1] is None else g_states[1] * 2), g_weights


attention_backward = nodes.attention_backward


def another_order(g: Tensor, x: Tensor, r: Tensor, weight: Tensor, wants: bool) -> Any:
    g_product, g_square, g_weight = rms_backward(g, x, r, weight, wants)
    return g_product + g_square, torch.zeros_like(g_square), g_weight


rms_backward = attention.rms_backward


def other_rows(g: Tensor, names: Tensor, padding_idx: int) -> tuple[Tensor, Tensor]:
    rows, tokens = touched_rows(g, names, padding_idx)
    return rows, torch.where(tokens == names.min(), tokens + 1, tokens)


touched_rows = tied_embedding.touched_rows

# Where, which name, what stands there instead, and the budget under which the plan runs it.
MUTATIONS = {
    "the norm is scaled": (attention, "rms_apply", scaled(attention.rms_apply), "fast"),
    "the norm's gradients are added in another order": (attention, "rms_backward", another_order, "fast"),
    "one bit of a mask is flipped": (attention.dropout_forward, "pack_bits", one_bit_flipped, "fast"),
    "one bit of a block's masks is flipped": (attention.dropout_forward, "pack_bits", one_bit_flipped, "max"),
    "the softmax is another operator": (attention, "_probabilities", scaled(attention._probabilities), "fast"),
    "ReLU passes everything": (feed_forward, "threshold_backward_out", lambda g, h, n, grad_input: g, "fast"),
    "the hidden gradient is scaled": (feed_forward, "rescale_", lambda g, p: g, "fast"),
    "there is no position bias": (forwards, "_own_bias", without_own_bias, "fast"),
    "the states' gradient is doubled": (nodes, "attention_backward", states_swapped, "max"),
    "a token's gradient goes to another row": (tied_embedding, "touched_rows", other_rows, "fast"),
    "the loss ignores another label": (forwards, "cross_entropy", scaled(cross_entropy.cross_entropy), "fast"),
    "a weight's gradient is scaled": (attention, "linear_grad_weight", scaled(attention.linear_grad_weight), "max"),
}


@pytest.mark.parametrize("mutation", list(MUTATIONS))
def test_a_broken_engine_is_refused_wherever_it_is_broken(monkeypatch: pytest.MonkeyPatch, mutation: str) -> None:
    home, name, instead, budget = MUTATIONS[mutation]
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(home, name, instead) if not callable(home) else monkeypatch.setitem(
        home.__globals__, name, instead
    )
    with pytest.raises(BwskError, match=r"^make_reversible: .*(stock model's|returns something else)") as refusal:
        make_reversible(model, budget, **SHAPE)
    assert "\n" not in str(refusal.value)
    assert not any(hasattr(module, "_bwsk") or "forward" in module.__dict__ for module in model.modules())
    make_reversible(model, budget, verify=False, **SHAPE)
    monkeypatch.undo()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("make", [llama, lambda: BertForMaskedLM(BertConfig(**SIZES)).train()], ids=["llama", "bert"])
def test_a_recomputation_with_other_dropout_is_refused(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    plain = checkpointed.checkpoint
    monkeypatch.setattr(checkpointed, "checkpoint", lambda *a, **k: plain(*a, preserve_rng_state=False, **k))
    model = make()
    model.config.attention_dropout = 0.1
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    with pytest.raises(BwskError, match=r"gradient of .* is not the stock model's"):
        make_reversible(model, "max", batch=3, input_length=12)


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 96}


class Drawing(nn.Module):
    """Draws from a random generator that no recomputation takes back."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * torch.full_like(x, 1 + random.random())


def test_a_module_with_random_numbers_of_its_own_is_named() -> None:
    """The recomputed block would not be the one that ran."""
    model = llama()
    model.model.layers[1].mlp = Drawing(model.model.layers[1].mlp)
    with pytest.raises(BwskError, match=r"make_reversible: .*model\.layers\.1"):
        make_reversible(model, "max", batch=30, input_length=120)


def count(module: Any, args: Any) -> None:
    module.steps.add_(1)


def test_no_trace_is_left() -> None:
    seen: list[str] = []
    for make, shape in ((tiny, SHAPE), (llama, {"batch": 3, "input_length": 12})):
        model = make().train()
        model.register_buffer("steps", torch.zeros(3))
        model.register_forward_pre_hook(count)
        next(model.parameters()).register_hook(lambda g: seen.append("gradient"))
        list(model.children())[-1].eval()
        batch = {"input_ids": tokens(), "labels": tokens()}
        model(**batch).loss.backward()
        seen.clear()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        state = copy.deepcopy(model.state_dict())
        modes = [module.training for module in model.modules()]
        random_states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        make_reversible(model, "max", **shape)
        assert torch.equal(random_states[0], torch.get_rng_state())
        assert random_states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
        assert modes == [module.training for module in model.modules()]
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
        assert all(torch.equal(g, model.get_parameter(name).grad) for name, g in gradients.items())
        assert all(p.requires_grad for p in model.parameters())
        assert seen == []
        model(**batch).loss.backward()
        assert seen == ["gradient"]
        assert model.steps[0] == 2


def test_what_is_not_repeatable_is_not_compared() -> None:
    """As on CUDA without deterministic mode, where stock T5 gives other gradients each time."""

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (1 + random.SystemRandom().random())

    model = llama()
    model.lm_head = nn.Sequential(model.lm_head, Noisy())
    with pytest.warns(UserWarning, match="another loss each time"):
        handle = make_reversible(model, "fast", batch=3, input_length=12)
    assert "the stock model itself does not repeat them" in str(handle.verified)
    assert any(hasattr(module, "_bwsk") for module in model.modules())


def test_large_tables_and_frozen_weights() -> None:
    """A T5's table is cut while it is checked; everything is back afterwards, and trains."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 3000}
    stock = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).train()
    stock.encoder.block[0].requires_grad_(False)
    ours = copy.deepcopy(stock)
    table = ours.shared.weight
    make_reversible(ours, "fast", **SHAPE)
    assert ours.shared.weight is table is ours.lm_head.weight is ours.encoder.embed_tokens.weight
    batch = {"input_ids": tokens(), "labels": tokens(3, 7)}
    assert all(map(torch.equal, step(stock, **batch), step(ours, **batch)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_model_is_checked_in_its_own_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    make_reversible(tiny().to(dtype), "fast", **SHAPE)
    monkeypatch.setattr(attention, "linear_grad_weight", scaled(attention.linear_grad_weight, 1.5))
    with pytest.raises(BwskError, match="gradient of"):
        make_reversible(tiny().to(dtype), "fast", **SHAPE)


def test_a_head_that_is_not_bit_identical_is_compared_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    make_reversible(tiny(), "balanced", **SHAPE)
    monkeypatch.setattr(forwards, "chunked_cross_entropy", scaled(forwards.chunked_cross_entropy, 1.01))
    with pytest.raises(BwskError, match=r"the loss is .*, the stock model's is"):
        make_reversible(tiny(), "balanced", **SHAPE)
