"""Dynamic erasure: right numbers, and training that does not notice."""

from __future__ import annotations

import json
import math
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from bwsk.classification.erasure import ErasureMeter


def _t5(attention: str = "sdpa", dropout: float = 0.1) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        d_model=32,
        d_ff=64,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        vocab_size=100,
        decoder_start_token_id=0,
        dropout_rate=dropout,
    )
    return T5ForConditionalGeneration._from_config(config, attn_implementation=attention)


def _batch(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 100, (2, 2, 16), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids[0], "labels": ids[1]}


class Net(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=inplace)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return F.softmax(self.drop(self.relu(x * 1.0)), -1)


@pytest.mark.parametrize("inplace", [False, True])
def test_counts_by_hand(inplace):
    x = torch.cat([torch.full((4, 30), -1.0), torch.ones(4, 10)], 1)
    net = Net(inplace)
    result = ErasureMeter(net).measure({"x": x})
    relu, drop = result["kinds"]["relu"], result["kinds"]["dropout"]
    assert (relu["operations"], relu["elements"], relu["zeroed"]) == (1, 160, 0.75)
    assert relu["bits_kept"] == pytest.approx((40 * 32 + 120) / (160 * 32))
    assert 0 < drop["zeroed"] < 0.25  # half of the quarter that was not zero before
    assert drop["bits_kept"] == pytest.approx(1 - drop["zeroed"])
    assert result["overall"]["operations"] == 3


def test_entropy_of_known_attention():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Parameter(torch.ones(1))

        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    result = ErasureMeter(Attend()).measure({"q": torch.zeros(1, 1, 8, 4)})["kinds"]["attention"]
    expected = sum(math.log2(n) for n in range(1, 9)) / 8  # row n weighs n visible keys equally
    assert result["entropy_bits"] == pytest.approx(expected, rel=1e-5)
    assert result["entropy_bits_uniform"] == pytest.approx(expected, rel=1e-5)
    assert result["zeroed"] == 0
    assert result["rows"] == 8


def test_fused_and_eager_attention_have_the_same_entropy():
    """Without dropout both compute the same weights, and only one of them shows them."""
    fused, eager = (ErasureMeter(_t5(a, 0.0)).measure(_batch())["kinds"]["attention"] for a in ("sdpa", "eager"))
    for key in ("entropy_bits", "entropy_bits_uniform"):
        assert fused[key] == pytest.approx(eager[key], rel=1e-4)
    assert fused["operations"] == eager["operations"] == 6
    assert 0 < fused["entropy_bits"] <= fused["entropy_bits_uniform"] + 1e-6


def test_dropout_inside_fused_attention_is_told_and_not_invented():
    fused, eager = (ErasureMeter(_t5(a)).measure(_batch())["kinds"] for a in ("sdpa", "eager"))
    assert fused["attention"]["fused_dropout_rate"] == pytest.approx(0.1)
    assert eager["attention"]["fused_dropout_rate"] is None
    assert eager["dropout"]["operations"] - fused["dropout"]["operations"] == 6


def test_nothing_of_a_kind_is_absent_and_not_zero():
    result = ErasureMeter(nn.Linear(2, 2)).measure({"input": torch.ones(1, 2)})
    assert result["kinds"] == {}
    assert result["overall"]["zeroed"] is None
    assert result["overall"]["bits_kept"] is None


def test_gelu_keeps_all_but_a_bit_of_the_negatives():
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=100, bos_token_id=0, eos_token_id=0)
    ids = _batch()["input_ids"]
    gelu = ErasureMeter(GPT2LMHeadModel(config)).measure({"input_ids": ids, "labels": ids})["kinds"]["gelu"]
    assert gelu["operations"] == 1
    assert 1 - 1 / 32 < gelu["bits_kept"] < 1


class Sequence(nn.Sequential):
    def forward(self, x):
        return super().forward(x)


def test_what_is_no_row_of_weights_is_not_measured_as_one():
    x = torch.randn(2, 4, 6)
    for layer in (nn.LogSoftmax(-1), nn.Softmax(1), nn.Softmax2d()):
        assert ErasureMeter(Sequence(layer)).measure({"x": x})["kinds"] == {}
    assert ErasureMeter(Sequence(nn.Softmax(-1))).measure({"x": x})["kinds"]["attention"]["rows"] == 8


def test_pooling_that_gives_out_more_than_it_takes_keeps_no_more_than_all():
    pooling = ErasureMeter(Sequence(nn.AdaptiveAvgPool2d(4))).measure({"x": torch.randn(1, 1, 2, 2)})
    assert pooling["kinds"]["pooling"]["bits_kept"] == 1


def test_all_is_strict_json():
    json.dumps(ErasureMeter(_t5()).measure(_batch()), allow_nan=False)


def _train(measure: bool, autocast: bool, evaluate: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    model = _t5()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    meter = ErasureMeter(model)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    losses = []
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        for step in range(4):
            model.train()
            if measure and step in (0, 2):  # at 0 no weight cast is cached yet
                if evaluate:
                    model.eval()
                mode = model.training
                meter.measure(_batch(9))
                assert model.training == mode
                assert all(module.training == mode for module in model.modules())
                model.train()
            loss = model(**_batch(step)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    draws = torch.tensor([float(torch.rand(1)), random.random(), np.random.rand()])
    return [*losses, *(p.detach() for p in model.parameters())], draws


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_training_is_bit_identical_with_and_without_measuring(autocast, evaluate):
    """One autocast region around it all: a weight cast that leaked from the measurement would lose its gradient."""
    with_it, draws = _train(True, autocast, evaluate)
    without, expected = _train(False, autocast, evaluate)
    assert torch.equal(draws, expected)
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))


def test_running_statistics_and_hooks_are_put_back():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    ErasureMeter(net).measure({"input": torch.randn(5, 3)})
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert not any("_bwsk_before" in vars(module) for module in net.modules())


def test_a_failing_forward_puts_everything_back():
    model = _t5().eval()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="input_ids"):
        ErasureMeter(model).measure({"no_such_input": torch.ones(1)})
    assert not model.training
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_autocast_cache_enabled()
    assert not any(module._forward_hooks for module in model.modules())


def test_large_attention_is_sampled(monkeypatch):
    monkeypatch.setattr("bwsk.classification.erasure._SCORES", 64)
    result = ErasureMeter(_t5("sdpa", 0.0)).measure(_batch())["kinds"]["attention"]
    assert result["rows"] < 2 * 4 * 16 * 6
    assert result["entropy_bits"] > 0
