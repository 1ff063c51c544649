"""Predicted memory of T5-small to the hundredth of a MiB: the same with all tested versions of torch and transformers.

The expected figures were made with torch 2.13.0 and transformers 5.23.0; torch 2.14.1 and transformers 5.24.0 give the
same. One thing differs: transformers 5.17 hands the fused attention T5's position bias as a transposed view, of which
the kernel makes a copy with rows of 264 instead of 256 numbers, twelve times.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import T5Config

from bwsk import predict_memory

EXPECTED = json.loads((Path(__file__).parent / "data" / "predicted_memory_t5_small.json").read_text())
PADDED_MIB = 12 * 8 * 256 * 8 * 4 / 2**20


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.parametrize("step", EXPECTED)
def test_every_version_predicts_the_same(step: str) -> None:
    mode, *budget, precision, attention = step.split()
    config = T5Config(
        d_model=512,
        d_kv=64,
        d_ff=2048,
        num_layers=6,
        num_heads=8,
        vocab_size=32128,
        decoder_start_token_id=0,
        architectures=["T5ForConditionalGeneration"],
    )
    found = predict_memory(
        config,
        batch=4,
        input_length=256,
        target_length=256,
        mode=mode,
        budget=budget[0] if budget else None,
        precision=precision,
        attention=attention,
    )
    expected = EXPECTED[step]
    assert found.flops == expected["flops"]
    allowed = 0.011 if attention == "eager" else PADDED_MIB + 0.011
    assert found.peak_mib == pytest.approx(expected["peak_mib"], abs=allowed)
    assert found.phases == pytest.approx(expected["phases"], abs=allowed)
    assert found.kinds == pytest.approx(expected["kinds"], abs=allowed)


def test_all_modes_precisions_and_attentions_are_expected() -> None:
    modes = ("conventional", "checkpoint", "reversible fast", "reversible balanced", "reversible max")
    steps = {f"{mode} {p} {kind}" for mode in modes for p in ("fp32", "bf16", "fp16") for kind in ("eager", "sdpa")}
    assert EXPECTED.keys() == steps
