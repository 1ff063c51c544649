"""What a plan says is what runs: levels, rows and saved bytes of architectures without an engine of their own."""

from __future__ import annotations

import copy
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BartConfig
from transformers.models.bart.modeling_bart import BartAttention
from transformers.models.mvp.modeling_mvp import MvpAttention

from bench.coverage import batch_of, differences, installed, saved_bytes, small, small_model, train
from bwsk import BwskError, make_reversible
from bwsk._compat import GradientCheckpointingLayer, from_config
from bwsk.reversible import checkpointed as general
from bwsk.reversible.plan import Choice, Level, Plan
from bwsk.reversible.report import rows
from tests.unit.test_reversible_sweep import draws_for_nothing

SHAPE = {"batch": 3, "input_length": 12, "target_length": 7}


def whole_blocks(model: nn.Module) -> nn.Module:
    """A copy whose every block is recomputed."""
    ours = copy.deepcopy(model)
    general.install_levels(ours, dict.fromkeys(general.blocks(ours), Level.CHECKPOINT_BLOCK))
    return ours


def plan_of(model: nn.Module, budget: str) -> Plan:
    with make_reversible(copy.deepcopy(model), budget, **SHAPE) as handle:
        return handle.plan


@pytest.mark.parametrize("name", ["BloomForCausalLM", "DebertaV2ForMaskedLM", "MambaForCausalLM", "FalconForCausalLM"])
def test_blocks_without_known_attention_run_their_stock_forward_and_the_plan_says_so(name: str) -> None:
    model = small_model(name)
    plan = plan_of(model, "fast")
    assert set(plan.levels.values()) == {Level.STOCK}
    assert {row.action for row in rows(plan)} == {"saved (stock)"}
    assert plan.extra_flops == 0
    ours = installed(model, plan)
    assert [module for module in ours.modules() if "forward" in vars(module)] in ([], [ours])  # see `whole_model`
    batch = batch_of(model, 7)
    # Other kernels may be chosen where memory is, but never another number of saved bytes.
    assert saved_bytes(whole_blocks(model), batch) < 0.8 * saved_bytes(ours, batch)


def test_a_model_of_both_kinds_of_blocks_has_both_kinds_of_rows() -> None:
    plan = plan_of(small_model("LongT5ForConditionalGeneration"), "fast")
    stock = {name for name, level in plan.levels.items() if level == Level.STOCK}
    assert stock == {"encoder.block.0", "encoder.block.1"}
    assert {row.module for row in rows(plan) if row.action == "saved (stock)"} == stock
    assert {row.module for row in rows(plan) if row.operation == "softmax"} == set(plan.levels) - stock


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "GPTNeoForCausalLM", "BigBirdPegasusForConditionalGeneration"])
def test_every_choice_of_a_block_saves_less_than_the_one_before(name: str) -> None:
    if draws_for_nothing(name):
        pytest.skip("this release of transformers draws random numbers in it, which is refused")
    units = plan_of(small_model(name), "fast").units
    assert any(len(unit.choices) > 1 for unit in units)
    for unit in units:
        assert [choice.saved for choice in unit.choices] == sorted({c.saved for c in unit.choices}, reverse=True)


def test_a_block_of_which_some_attentions_can_be_recomputed_says_how_many() -> None:
    class Both(GradientCheckpointingLayer):
        def __init__(self) -> None:
            super().__init__()
            config = BartConfig(attn_implementation="eager")
            self.self_attn = BartAttention(8, 2, config=config)
            self.encoder_attn = MvpAttention(8, 2)

    both = Both()
    assert general.attentions_in_part(both) == "1 of 2 attentions"
    del both.encoder_attn
    assert general.attentions_in_part(both) == ""
    plan = plan_of(small_model("GPT2LMHeadModel"), "fast")
    choice = plan.units[0].choices[0]
    part = Choice(choice.saved, choice.flops, choice.work, choice.levels, "1 of 2 attentions")
    plan.units[0] = type(plan.units[0])(plan.units[0].name, (part,), 0, 0)
    assert rows(plan)[0].action == "recomputed in 1 of 2 attentions"


def test_blocks_that_a_step_of_text_does_not_reach_are_stock() -> None:
    """Those of a vision tower, which a plan did not survive before."""
    model = small_model("Gemma3ForConditionalGeneration")
    plan = plan_of(model, "max")
    idle = {name for name in general.blocks(model) if "vision" in name}
    assert idle
    assert idle == {name for name, level in plan.levels.items() if level == Level.STOCK}
    batch = batch_of(model, 7)
    assert differences(train(copy.deepcopy(model), batch), train(installed(model, plan), batch)) == []


CACHES = {
    "GPTNeoForCausalLM": "layer_id",
    "PLBartForConditionalGeneration": "two caches",
    "Lfm2ForCausalLM": "states of a convolution",
    "FalconH1ForCausalLM": "both in one layer",
    "RecurrentGemmaForCausalLM": "states on the module",
}


@pytest.mark.parametrize("name", CACHES, ids=lambda name: f"{name}: {CACHES[name]}")
def test_whole_blocks_are_recomputed_with_the_default_cache(name: str) -> None:
    model = small_model(name)
    batch = batch_of(model, 7)
    saved = saved_bytes(whole_blocks(model), batch)
    assert saved < 0.7 * saved_bytes(copy.deepcopy(model), batch)
    assert saved == saved_bytes(whole_blocks(model), {**batch, "use_cache": False})
    assert differences(train(copy.deepcopy(model), batch), train(whole_blocks(model), batch)) == []


def test_modules_name_their_layer_of_a_cache_by_names_that_are_known() -> None:
    """In the source of every model of the installed transformers: `cache.update(keys, values, self.NAME)`."""
    call = re.compile(r"(?:past_key_values?|layer_past)\.update\(\s*[\w.]+,\s*[\w.]+,\s*(?:layer_idx=)?self\.(\w+)")
    models = Path(transformers.__file__).parent / "models"
    names = {name for path in models.glob("*/modeling_*.py") for name in call.findall(path.read_text("utf-8"))}
    assert names == {"layer_idx", "layer_id"}


def test_a_recomputed_block_finds_what_it_found_in_a_cache_that_was_passed_in() -> None:
    """Keys and values of another part of the text: the first run and the recomputation both continue them."""
    found: list[list[Tensor]] = []
    model = small_model("LlamaForCausalLM")
    batch = batch_of(model, 7)
    for one in (copy.deepcopy(model), whole_blocks(model)):
        with torch.no_grad():
            cache = one.eval()(batch["input_ids"][:, :5]).past_key_values
        torch.manual_seed(1)
        out = one.train()(input_ids=batch["input_ids"], past_key_values=cache)
        out.logits.float().logsumexp(-1).mean().backward()
        found.append([out.logits, *(p.grad for p in one.parameters())])
        found[-1] += [layer.keys for layer in cache.layers]
    assert all(map(torch.equal, *found))
    assert found[0][-1].shape[-2] == 5 + 12


def test_the_recomputation_does_not_keep_the_cache_alive() -> None:
    """Keys and values of all layers would else stay until the backward, as in a stock model."""
    model = small_model("LlamaForCausalLM")
    batch = batch_of(model, 7)
    ours = whole_blocks(model)
    out = ours(**batch)
    cache = weakref.ref(out.past_key_values)
    keys = [weakref.ref(layer.keys) for layer in out.past_key_values.layers]
    loss = out.loss
    del out
    assert cache() is None
    assert [key() for key in keys] == [None, None]
    loss.backward()


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_attention_functions_of_other_names_and_files_are_followed(later: bool) -> None:
    """Llama-4's vision tower has an eager function of its own."""
    sizes = {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32, "patch_size": 8}
    config = small(transformers.Llama4VisionConfig(intermediate_size=128))
    for name, value in {**sizes, "intermediate_size": 128, "image_size": 32}.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    cls = transformers.Llama4VisionModel
    model = from_config(cls)(config, attn_implementation="sdpa" if later else "eager").train()
    ours = copy.deepcopy(model)
    general.install_levels(ours, dict.fromkeys(general.blocks(ours), Level.CHECKPOINT_ATTENTION))
    found: list[list[Any]] = []
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for one in (model, ours):
        one.set_attn_implementation("eager")
        torch.manual_seed(1)
        out = one(pixel_values=images)[0]
        out.square().mean().backward()
        found.append([out, *(p.grad for p in one.parameters() if p.grad is not None)])
        found[-1].append(one.eval()(pixel_values=images)[0])
    assert all(map(torch.equal, *found))
    assert type(ours.model.layers[0].self_attn.forward).__name__ == "PatchedForward"


def test_layers_dropped_at_random_by_numpy_are_refused() -> None:
    """Numbers of NumPy are drawn on fake tensors too, so that another set of blocks may run each time."""
    measured = {
        level: general._Measured([], [], 0, 0, 0, 0, 0, 0, 0, 0, 0) for level in (Level.STOCK, Level.CHECKPOINT_BLOCK)
    }
    measured[Level.STOCK].blocks.append(general._Block("block.0", 1, 1, 1, 1, ""))
    with pytest.raises(BwskError, match="dropped at random"):
        general._units(measured)
