"""The gradients of a reversible T5 are the stock ones, bit for bit, and the comparison can tell when they are not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, T5ForSequenceClassification

from bwsk import make_reversible
from bwsk.memory.cuda_rules import cuda_rules
from bwsk.reversible.cross_entropy import chunked_cross_entropy
from bwsk.reversible.t5.float16 import keep_projection_out_of_float16

LEVELS = ["fast", "max", "save_input", "save_qkv"]


def config(attention: str = "eager", **changes) -> T5Config:
    found = T5Config(
        **{
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "vocab_size": 96,
            "decoder_start_token_id": 0,
            **changes,
        }
    )
    found._attn_implementation = attention
    return found


def reversible(model: nn.Module, budget: str = "fast"):
    """`make_reversible` with a named budget, or with one level for every sublayer or block."""
    handle = make_reversible(
        model, budget if budget in ("fast", "balanced") else "max", batch=3, input_length=11, target_length=7
    )
    if budget in ("max", "save_input", "save_qkv"):
        from bwsk.reversible.t5.engine import install_levels, sublayers

        handle.undo()
        names = list(sublayers(model))
        if budget == "max":
            levels = {name.split(".layer.")[0]: "checkpoint_block" for name in names}
        else:
            levels = {
                name: budget if budget == "save_input" or not _is_feed(model, name) else "save_context"
                for name in names
            }
        handle._take(install_levels(model, levels, "exact"))
    return handle


def _is_feed(model: nn.Module, name: str) -> bool:
    return hasattr(model.get_submodule(name), "DenseReluDense")


def batch(seed: int, padded: bool = False, ins: int = 11, outs: int = 7):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 90, (3, ins), generator=generator)
    labels = torch.randint(1, 90, (3, outs), generator=generator)
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, ins // 2 :] = 0
        labels[0, outs // 2 :] = -100
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask if padded else None, "use_cache": False}


def train(model: nn.Module, steps: int = 3, amp: bool = False, padded: bool = False, accumulate: int = 1):
    """Losses and gradients of a few optimizer steps, dropout on."""
    model.train()
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    found = []
    for step in range(steps):
        for part in range(accumulate):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = model(**batch(10 * step + part, padded)).loss / accumulate
            loss.backward()
        found.append(
            {"loss": loss.detach().clone()}
            | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return found


def differences(one, other) -> list[str]:
    """Names of what is not the same bits, over all steps."""
    assert len(one) == len(other)
    assert all(a.keys() == b.keys() for a, b in zip(one, other, strict=True))
    return [
        f"{i}:{n}" for i, (a, b) in enumerate(zip(one, other, strict=True)) for n in a if not torch.equal(a[n], b[n])
    ]


def pair(cls=T5ForConditionalGeneration, **changes):
    torch.manual_seed(0)
    model = cls(config(**changes))
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "form", [{}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}], ids=["v1.0", "v1.1"]
)
def test_every_gradient_is_the_same_bits(form, level, amp):
    stock, ours = pair(**form)
    reversible(ours, level)
    assert differences(train(stock, amp=amp), train(ours, amp=amp)) == []


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("level", ["fast", "max"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_ignored_labels_and_sdpa(attention, level, amp):
    stock, ours = pair(attention=attention)
    reversible(ours, level)
    assert differences(train(stock, amp=amp, padded=True), train(ours, amp=amp, padded=True)) == []


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("level", ["fast", "max"])
def test_the_default_generation_cache_changes_nothing(level, attention):
    """transformers fills a cache in training unless told otherwise; its layout of the keys shows in the rounding."""
    stock, ours = pair(attention=attention)
    reversible(ours, level)
    found = []
    for model in (stock, ours):
        torch.manual_seed(1)
        inputs = {key: value for key, value in batch(1).items() if key != "use_cache"}
        model.train()(**inputs).loss.backward()
        found.append([{n: p.grad for n, p in model.named_parameters()}])
    assert differences(*found) == []


@pytest.mark.parametrize("level", ["fast", "max"])
def test_accumulated_gradients_are_the_same_bits(level):
    stock, ours = pair()
    reversible(ours, level)
    assert differences(train(stock, accumulate=3), train(ours, accumulate=3)) == []


@pytest.mark.parametrize(("level", "amp"), [("fast", False), ("fast", True), ("max", False)])
def test_the_path_of_cuda_gives_the_same_bits(level, amp):
    """CUDA's dropout operators, softmax and loss rules, on CPU tensors: the code that CUDA runs, if not its kernels.

    Not "max" in bfloat16: the CPU's kernel of `native_dropout_backward` rounds its scale to bfloat16, CUDA's does not.
    """
    stock, ours = pair()
    reversible(ours, level)
    with cuda_rules():
        assert differences(train(stock, amp=amp), train(ours, amp=amp)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout_rate": 0.0},
        {"dropout_rate": 0.5},
        {"num_heads": 1},
        {"tie_word_embeddings": False},
        {"feed_forward_proj": "silu"},
        {"feed_forward_proj": "gated-silu"},
    ],
    ids=str,
)
def test_other_configurations(changes):
    stock, ours = pair(**changes)
    reversible(ours, "max")
    assert differences(train(stock), train(ours)) == []


@pytest.mark.parametrize(("rows", "ins", "outs"), [(1, 1, 1), (1, 13, 5), (2, 17, 1), (3, 9, 9)])
def test_odd_shapes(rows, ins, outs):
    stock, ours = pair()
    reversible(ours, "fast")
    found = []
    for model in (stock, ours):
        torch.manual_seed(2)
        inputs = {k: v[:rows] if torch.is_tensor(v) else v for k, v in batch(4, False, ins, outs).items()}
        model.train()(**inputs).loss.backward()
        found.append([{n: p.grad for n, p in model.named_parameters()}])
    assert differences(*found) == []


def test_other_heads_of_the_family():
    torch.manual_seed(0)
    for cls in (T5EncoderModel, T5ForSequenceClassification):
        stock = cls(config(classifier_dropout=0.1, num_labels=2))
        ours = copy.deepcopy(stock)
        make_reversible(ours, "max")
        found = []
        for model in (stock, ours):
            torch.manual_seed(3)
            tokens = batch(1)["input_ids"].clone()
            tokens[:, -1] = 1
            tokens[:, :-1] = tokens[:, :-1].clamp(min=2)
            out = model.train()(input_ids=tokens)
            out[0].float().pow(2).mean().backward()
            found.append([{n: p.grad for n, p in model.named_parameters() if p.grad is not None}])
        assert differences(*found) == []


def test_frozen_parameters_and_frozen_table():
    stock, ours = pair()
    for model in (stock, ours):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("SelfAttention.q" in name or "wo" in name or "layer_norm" in name)
    reversible(ours, "fast")
    assert differences(train(stock), train(ours)) == []


def test_loss_on_logits_and_hidden_states_beside_the_model_loss():
    stock, ours = pair()
    reversible(ours, "fast")
    found = []
    for model in (stock, ours):
        torch.manual_seed(2)
        out = model.train()(**batch(4), output_hidden_states=True)
        z = out.logits.logsumexp(-1).pow(2).mean() + out.decoder_hidden_states[1].pow(2).mean()
        (out.loss + 1e-2 * z).backward()
        found.append([{n: p.grad for n, p in model.named_parameters()} | {"logits": out.logits.detach()}])
    assert differences(*found) == []


def test_logits_that_are_still_held_are_not_overwritten():
    _, ours = pair()
    reversible(ours, "fast")
    out = ours.train()(**batch(4))
    before = out.logits.detach().clone()
    out.loss.backward()
    assert torch.equal(out.logits, before)


def test_positional_arguments_tuples_and_encoder_outputs():
    stock, ours = pair()
    reversible(ours, "fast")
    found = []
    for model in (stock, ours):
        model.train()
        torch.manual_seed(2)
        tokens, labels = batch(4)["input_ids"], batch(4)["labels"]
        encoded = model.encoder(input_ids=tokens)
        loss, logits = model(tokens, None, encoder_outputs=encoded, labels=labels, use_cache=False, return_dict=False)[
            :2
        ]
        loss.backward()
        found.append(
            [{n: p.grad for n, p in model.named_parameters()} | {"loss": loss.detach(), "logits": logits.detach()}]
        )
    assert differences(*found) == []


@pytest.mark.parametrize("wide", [False, True], ids=["stock", "wo in float32"])
@pytest.mark.parametrize("form", [{}, {"feed_forward_proj": "gated-gelu"}], ids=["v1.0", "v1.1"])
@pytest.mark.parametrize("level", ["fast", "max"])
def test_float16_autocast_with_gradient_scaler(level, form, wide):
    stock, ours = pair(**form)
    if wide:
        keep_projection_out_of_float16(stock)
        keep_projection_out_of_float16(ours)
    reversible(ours, level)
    found = []
    for model in (stock, ours):
        torch.manual_seed(2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(3):
            with torch.autocast("cpu", torch.float16):
                loss = model.train()(**batch(step)).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            found.append({n: p.grad.clone() for n, p in model.named_parameters()})
            optimizer.zero_grad()
    assert differences(found[:3], found[3:]) == []


def test_balanced_agrees_up_to_rounding_and_makes_no_logits():
    stock, ours = pair()
    reversible(ours, "balanced")
    one, other = train(stock, steps=1)[0], train(ours, steps=1)[0]
    assert all(torch.allclose(one[n], other[n], rtol=1e-4, atol=1e-6) for n in one)
    assert ours(**batch(4)).logits is None
    assert ours.eval()(**batch(4)).logits is not None


def test_loss_head_without_logits_is_as_exact_as_the_stock_one():
    """Error to float64, over several draws and several chunks of rows, against the stock loss's."""
    errors = {"stock": 0.0, "ours": 0.0}
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(300, 64, generator=generator)
        table = torch.randn(500, 64, generator=generator) * 0.3
        labels = torch.randint(0, 500, (300,), generator=generator)
        labels[::7] = -100

        def run(head, dtype, x=x, table=table, labels=labels):
            a, b = x.clone().to(dtype).requires_grad_(), table.clone().to(dtype).requires_grad_()
            (3.0 * head(a, b, labels)).backward()
            return torch.cat([a.grad.double().flatten(), b.grad.double().flatten()])

        def stock(a, b, labels):
            return nn.functional.cross_entropy(a @ b.t(), labels)

        exact = run(stock, torch.float64)
        errors["stock"] += (run(stock, torch.float32) - exact).norm().item()
        errors["ours"] += (run(chunked_cross_entropy, torch.float32) - exact).norm().item()
    assert 0 < errors["ours"] <= 1.5 * errors["stock"]


# ------------------------------------------------------------------------------------------- negative controls


def test_control_reentrant_checkpointing_is_caught():
    stock, ours = pair(num_layers=3)
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    found = differences(train(stock, steps=1), train(ours, steps=1))
    assert found
    assert len(found) < len(list(stock.parameters()))  # rounding only: the last gradients to be made still agree


def test_control_non_reentrant_checkpointing_agrees():
    stock, ours = pair()
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert differences(train(stock, steps=1), train(ours, steps=1)) == []


def test_control_flipped_mask_bit_is_caught(monkeypatch):
    stock, ours = pair()
    reversible(ours, "fast")
    from bwsk.reversible.t5 import attention

    first = []

    def flipped(x, p):
        y, bits = real(x, p)
        if bits is not None and not first:
            first.append(True)
            bits[0] ^= 1
        return y, bits

    real = attention.dropout_forward
    monkeypatch.setattr(attention, "dropout_forward", flipped)
    assert differences(train(stock, steps=1), train(ours, steps=1))
    assert first


def test_control_other_accumulation_order_is_caught(monkeypatch):
    stock, ours = pair()
    reversible(ours, "fast")
    from bwsk.reversible.t5 import nodes as sublayer

    def reordered(*args):
        g_x, g_bias, (from_v, from_k), weights = real(*args)
        if from_v is not None:  # k before v
            from_v, from_k = from_k, from_v
        return g_x, g_bias, (from_v, from_k), weights

    real = sublayer.attention_backward
    monkeypatch.setattr(sublayer, "attention_backward", reordered)
    assert differences(train(stock, steps=1), train(ours, steps=1))
