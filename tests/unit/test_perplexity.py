"""Perplexity: the published protocol against a loop written out, and no dependence on the batch size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from bwsk import make_reversible
from bwsk.errors import BwskError
from bwsk.study.params import EvaluateParams
from bwsk.study.perplexity import perplexity, published_perplexity

WINDOW, STRIDE = 16, 4


@pytest.fixture(scope="module")
def model() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=90, decoder_start_token_id=0
    )  # fmt: skip
    config._attn_implementation = "eager"
    return T5ForConditionalGeneration(config)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(2).integers(1, 90, 150).astype(np.uint16)


def published_by_hand(model: T5ForConditionalGeneration, tokens: np.ndarray) -> float:
    """The publication's loop: one window at a time, the model's own loss, the mean of the windows' means."""
    model.eval()
    losses = []
    start = 0
    while start < len(tokens) - WINDOW:
        window = torch.from_numpy(tokens[start : start + WINDOW].astype(np.int64))[None]
        with torch.no_grad():
            losses.append(model(input_ids=window[:, :8], labels=window[:, 8:]).loss.item())
        start += STRIDE
    return math.exp(sum(losses) / len(losses))


def test_the_published_protocol_is_the_plain_loop(model: T5ForConditionalGeneration, tokens: np.ndarray) -> None:
    found = published_perplexity(model, tokens, window=WINDOW, stride=STRIDE, params=EvaluateParams(batch_size=7))
    assert found == pytest.approx(published_by_hand(model, tokens), rel=1e-5)


@pytest.mark.parametrize("rows", [1, 16, 30, 10**6])  # one window at a time, two, three, all
def test_the_windows_that_are_projected_together_do_not_change_the_result(
    model: T5ForConditionalGeneration, tokens: np.ndarray, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bwsk.study.perplexity.ROWS_AT_ONCE", rows)
    test_the_published_protocol_is_the_plain_loop(model, tokens)


@pytest.mark.parametrize("batch_size", [2, 5, 32])
def test_the_batch_size_does_not_change_the_result(
    model: T5ForConditionalGeneration, tokens: np.ndarray, batch_size: int
) -> None:
    options = {"n_bytes": 600, "window": WINDOW, "stride": STRIDE}
    one = perplexity(model, tokens, params=EvaluateParams(batch_size=1), **options)
    many = perplexity(model, tokens, params=EvaluateParams(batch_size=batch_size), **options)
    for name in ("published_perplexity", "token_perplexity", "bits_per_byte", "nll_per_token"):
        assert getattr(many, name) == pytest.approx(getattr(one, name), rel=1e-5), name
    assert (many.n_windows, many.n_target_tokens) == (one.n_windows, one.n_target_tokens) == (34, 72)


def test_the_plain_perplexity_counts_every_target_once(model: T5ForConditionalGeneration, tokens: np.ndarray) -> None:
    found = perplexity(model, tokens, 600, window=WINDOW, stride=STRIDE, params=EvaluateParams())
    total, count = 0.0, 0
    for start in range(0, len(tokens) - WINDOW, WINDOW):
        window = torch.from_numpy(tokens[start : start + WINDOW].astype(np.int64))[None]
        with torch.no_grad():
            total += 8 * model(input_ids=window[:, :8], labels=window[:, 8:]).loss.item()
        count += 8
    assert found.token_perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(total / count * len(tokens) / 600 / math.log(2), rel=1e-5)


def test_the_model_is_left_in_its_mode_and_its_random_state(
    model: T5ForConditionalGeneration, tokens: np.ndarray
) -> None:
    model.train()
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    with_dropout_off = published_perplexity(model, tokens, window=WINDOW, stride=STRIDE, params=EvaluateParams())
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert with_dropout_off == pytest.approx(published_by_hand(model, tokens), rel=1e-5)


def test_broken_weights_are_named_with_their_window(tokens: np.ndarray) -> None:
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=90, decoder_start_token_id=0)
    broken = T5ForConditionalGeneration(config)
    with torch.no_grad():
        broken.shared.weight[int(tokens[40])] = float("nan")
    with pytest.raises(BwskError, match="the loss is not finite on the window at token"):
        published_perplexity(broken, tokens, window=WINDOW, stride=STRIDE, params=EvaluateParams())


def test_evaluating_leaves_the_model_as_it_was(model: T5ForConditionalGeneration, tokens: np.ndarray) -> None:
    """The output projection runs window by window meanwhile; the reversible engine's own forward of it comes back."""
    options = {"window": WINDOW, "stride": STRIDE, "params": EvaluateParams(batch_size=4)}
    expected = published_perplexity(model, tokens, **options)
    assert "forward" not in model.lm_head.__dict__
    handle = make_reversible(model, "max")
    engine = model.lm_head.__dict__["forward"]
    assert published_perplexity(model, tokens, **options) == expected
    assert model.lm_head.__dict__["forward"] is engine
    handle.undo()
    broken = tokens.copy()
    broken[2] = 120  # beyond the vocabulary
    with pytest.raises(IndexError):
        published_perplexity(model, broken, **options)
    assert "forward" not in model.lm_head.__dict__


def test_a_model_whose_logits_are_not_the_last_product(tokens: np.ndarray) -> None:
    """BART adds a bias to them: it is evaluated as it is."""
    config = BartConfig(
        vocab_size=90, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
    )  # fmt: skip
    bart = BartForConditionalGeneration(config)
    bart.final_logits_bias.uniform_(-3, 3)
    found = published_perplexity(bart, tokens, window=WINDOW, stride=STRIDE, params=EvaluateParams(batch_size=7))
    assert found == pytest.approx(published_by_hand(bart, tokens), rel=1e-5)


def test_autocast_casts_a_weight_once(model: T5ForConditionalGeneration, tokens: np.ndarray) -> None:
    """Not at each window; and what it keeps, without a gradient, does not outlive the evaluation."""
    params = EvaluateParams(batch_size=7, precision="bf16")
    casts: list[torch.Size] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and isinstance(args[0], torch.nn.Parameter):
                casts.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with Count():
            published_perplexity(model, tokens, window=WINDOW, stride=STRIDE, params=params)
        batch = torch.from_numpy(tokens[None, :8].astype(np.int64))
        model(input_ids=batch, labels=batch).loss.backward()
    linears = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(casts) == len(linears)
    assert all(weight.grad is not None for weight in linears)
    model.zero_grad()
