"""Which language models of transformers train with stock's bits: `python bench/coverage.py docs/coverage.md`.

Every causal, masked and sequence-to-sequence class of the installed transformers that can be made small is trained for
two steps by its stock code and, from the same weights and seed, made reversible with `fast` and `max`: eager and SDPA
attention, eager attention set afterwards, float32 and bfloat16 autocast, dropout on, padding, the default cache. The
loss and every gradient are compared bit by bit, and the bytes that autograd saves with what the plan says.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig

from bwsk import BwskError, _compat, make_reversible
from bwsk._compat import from_config, storage_key
from bwsk.architecture import one_line
from bwsk.reversible import checkpointed
from bwsk.reversible.handle import engine_for
from bwsk.reversible.plan import Level, Plan

KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence-to-sequence": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
BATCH, LENGTH, TARGET, VOCABULARY, LAYERS, STEPS = 3, 12, 7, 96, 2, 2
MOST_WEIGHTS = 5_000_000  # of a model that counts as small
ATTENTIONS, PRECISIONS = ("eager", "sdpa"), (torch.float32, torch.bfloat16)

# Small sizes by the names of a config's fields. The first pattern that matches the whole name counts.
SIZES = {
    r".*layerdrop": 0.0,
    r"(.*_)?vocab_size(_per_layer_input)?": VOCABULARY,
    r"pad_(token_id|index)": 0,
    r"(bos|cls|forced_bos|decoder_start)_token_id|bos_index": 1,
    r"(eos|sep|forced_eos)_token_id|eos_index": 2,
    r".*_(token_id|token_index)|(unk|mask)_index": VOCABULARY - 1,
    r"((attention|hidden|resid|residual|attn|embd|emb|embedding|activation|mlp|embed)_)?"
    r"(dropout|pdrop|dropout_prob|dropout_rate|dropout_p|drop)|attention_probs_dropout_prob": 0.1,
    r"num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_layers|depth|num_blocks": LAYERS,
    r"(.*_)?num_key_value_heads|num_kv_heads|n_head_kv": 2,
    r"mamba_n(um)?_heads": 8,
    r"(.*_)?num_attention_heads|n_heads?|num_heads|(.*_)?attention_heads|(linear_)?num_(key|value)_heads"
    r"|linear_num_heads|index_n_heads": 4,
    r"(?!qk_).*head_dim|d_kv|d_head|attention_head_size|kv_channels|mamba_d_head|qk_(rope|nope)_head_dim|dim_head"
    r"|rotary_dim": 8,
    r"hidden_size(_global|_per_layer_input)?|d_model|n_embd?|n_embed|(word_)?emb(ed)?_(proj_)?dim|dim|lru_width"
    r"|(input_|output_)?embedding_(size|dim)|(attention|out|pooler)_hidden_size": 32,
    r"(.*_)?intermediate_size|(.*_)?ffn_dim|n_inner|d_ff|hidden_dim|feed_forward_size|ffn_hidden_size|d_inner": 64,
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions|model_max_length": 64,
    r"mamba_d_state|(ssm_)?state_size|(mamba_)?chunk_size|(.*_)?lora_rank|mamba_dt_rank|time_step_rank|laurel_rank": 8,
    r"num_(local_)?experts|n_routed_experts|moe_num_experts": 4,
    r"num_experts_per_tok(en)?|moe_(topk|k)|topk_group|n_group|num_expert_group|n_groups|mamba_ngroups": 1,
    r"(sliding_|attention_)?window(_size)?|sliding_window_size|local_attention|attention_window_size": 4,
    r"image_size|original_max_position_embeddings": 32,
    r"patch_size": 16,
}
_PATTERNS = [(re.compile(names), size) for names, size in SIZES.items()]
# Lists with an entry for each layer, by which layers differ: both layers of a small model are of different kinds.
_LAYER_KINDS = re.compile(r"layer_types|layers_block_type|mlp_layer_types|block_types|attn_layers|indexer_types")
_ZAMBA = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}
# What a model type (or a config's class) needs beside these, by its own checks and its own arithmetic.
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 8, "attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 1},
    "diffllama": {"attention_dropout": 0.0},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 1},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 8},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [64] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_d_head": 8, "layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "MptAttentionConfig": {"attn_pdrop": 0},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 4},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (4, 3), "attn_layers": ("local", "local")},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA,
}
# The same for a class.
OF_CLASS = {"ReformerModelWithLMHead": {"is_decoder": True}}


def classes() -> dict[str, str]:
    """Class name -> kind for the classes that the sweep is about, in the order of their names."""
    found: dict[str, str] = {}
    for kind, mapping in KINDS.items():
        for names in getattr(_compat, mapping).values():
            for name in (names,) if isinstance(names, str) else names:
                found.setdefault(name, kind)
    return dict(sorted(found.items()))


def small(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config of the same class as a default one, with small sizes and dropout."""
    fields: dict[str, Any] = {}
    lists: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = small(value)
        elif _LAYER_KINDS.fullmatch(name) and isinstance(value, (list, tuple)):
            lists[name] = list(dict.fromkeys(value))[-LAYERS:] if len(set(value)) >= LAYERS else list(value)[:LAYERS]
        else:
            size = next((size for pattern, size in _PATTERNS if pattern.fullmatch(name)), None)
            given = value if not isinstance(value, (list, tuple)) else None
            number = isinstance(given, (int, float)) and not isinstance(given, bool)
            if size is not None and (number or (name.endswith("_id") and given is None and type(value) is list)):
                fields[name] = size
    own = vars(config)
    if own.get("num_key_value_heads") == own.get("num_attention_heads") and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = fields["num_attention_heads"]  # latent attention has no groups
    more = MORE.get(config.model_type, {}) | MORE.get(type(config).__name__, {})
    errors = []
    for extra in (lists, {}):
        try:
            return type(config)(**{**fields, **extra, **more})
        except Exception as error:  # configs check themselves in as many ways as there are models
            errors.append(error)
    raise errors[0]


def small_model(name: str, attention: str = "eager") -> nn.Module:
    """A small model of a class of transformers, in training mode. Raises whatever its config or constructor raises."""
    cls = getattr(transformers, name)
    config = small(cls.config_class())
    for field, value in OF_CLASS.get(name, {}).items():
        setattr(config, field, value)
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1
    with torch.device("meta"):
        size = sum(
            p.numel() for p in from_config(cls)(copy.deepcopy(config), attn_implementation=attention).parameters()
        )
    if size > MOST_WEIGHTS:
        raise BwskError(f"stays large ({size / 1e6:.0f} million weights)")
    torch.manual_seed(0)
    return from_config(cls)(config, attn_implementation=attention).train()


def batch_of(model: nn.Module, target: int) -> dict[str, Tensor]:
    """Random tokens other than zero with padding, and labels."""
    accepted = inspect.signature(model.forward).parameters
    if model.main_input_name != "input_ids":
        raise BwskError(f"takes {model.main_input_name}")
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY - 6, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, LENGTH - 4 :] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    if "decoder_input_ids" in accepted:
        labels = torch.randint(3, VOCABULARY - 6, (BATCH, target), generator=generator)
        labels[1, target - 2 :] = -100
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    return {key: value for key, value in batch.items() if key in accepted}


def train(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """The loss and every gradient of each step."""
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    found = []
    for _ in range(STEPS):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            outputs = model(**batch)
        if outputs.loss is None:
            raise BwskError("gives no loss for its labels")
        outputs.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": outputs.loss.detach().clone(), **gradients})
        del outputs
        optimizer.step()
        optimizer.zero_grad()
    return found


def differences(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> list[str]:
    """The names of what is not the same bits in both."""
    found = []
    for step, (a, b) in enumerate(zip(one, other, strict=True), 1):
        found += [f"step {step}: {name} in one only" for name in a.keys() ^ b.keys()]
        # As bytes, for two NaNs are not equal.
        found += [
            f"step {step}: {n}"
            for n in a.keys() & b.keys()
            if not torch.equal(a[n].reshape(-1).view(torch.uint8), b[n].reshape(-1).view(torch.uint8))
        ]
    return sorted(found)


def saved_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """The bytes that the first step's forward saves for its backward, weights left out."""
    weights = {storage_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if storage_key(tensor) not in weights:
            sizes[storage_key(tensor)] = (tensor.untyped_storage().nbytes(), tensor.detach())
        return tensor

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    del loss
    return sum(size for size, _ in sizes.values())


@dataclass(frozen=True)
class Outcome:
    """What the sweep found of one class: "compared", "refused", "not built" or "FAULT", and why."""

    name: str
    kind: str
    result: str
    detail: str = ""
    saved: tuple[float, ...] = ()  # bytes that `fast` and `max` save, as parts of stock's
    levels: tuple[str, ...] = ()  # those of `max`


class Fault(Exception):
    """The engine does something else than stock does, or than its plan says."""


def outcome_of(name: str, kind: str = "causal") -> Outcome:
    """Build, train and compare one class."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = small_model(name)
            batch, stock = trainable(model)
        except Exception as error:  # what a class needs and does not find here differs as much as classes do
            return Outcome(name, kind, "not built", one_line(error))
        try:
            return _compared(name, kind, model, batch, stock)
        except BwskError as error:
            return Outcome(name, kind, "refused", str(error))
        except Fault as error:
            return Outcome(name, kind, "FAULT", str(error))
        except Exception as error:
            return Outcome(name, kind, "FAULT", f"make_reversible: {type(error).__name__}: {one_line(error)}")


def trainable(model: nn.Module) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A batch on which the stock model trains, and its steps. Some classes need targets as long as their inputs."""
    try:
        batch = batch_of(model, TARGET)
        stock = train(copy.deepcopy(model), batch)
    except Exception:
        batch = batch_of(model, LENGTH)
        stock = train(copy.deepcopy(model), batch)
    if not all(torch.isfinite(step["loss"]) for step in stock):
        raise BwskError("its stock loss is not finite")
    if differences(stock, train(copy.deepcopy(model), batch)):
        raise BwskError("two runs of its stock code differ")
    return batch, stock


def plans_of(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Plan]:
    """The plans for `fast`, and for `max` where activations fill the memory: the last choice of every block."""
    target = batch["labels"].shape[1]
    copied = copy.deepcopy(model)  # some classes change themselves in their first step
    fast = make_reversible(copied, "fast", batch=BATCH, input_length=LENGTH, target_length=target).plan
    lowest = copy.copy(fast)
    lowest.choice_indices = [len(unit.choices) - 1 for unit in fast.units]
    return {"fast": fast, "max": lowest}


def _compared(name: str, kind: str, model: nn.Module, batch: dict[str, Tensor], stock: Any) -> Outcome:
    plans = plans_of(model, batch)
    shares = _saved(model, batch, plans)
    without = []
    for attention in ATTENTIONS:
        if attention != "eager":
            try:
                model = small_model(name, attention)
                batch, stock = trainable(model)
            except Exception:  # the class has no such attention
                without.append(attention)
                continue
        for dtype in PRECISIONS:
            try:
                reference = stock if dtype == torch.float32 else train(copy.deepcopy(model), batch, dtype)
            except Exception:  # the stock step does not run under autocast
                without.append(f"{attention} in {str(dtype).removeprefix('torch.')}")
                continue
            for budget, plan in plans.items():
                _require_same(f"{budget}, {attention}, {dtype}", reference, installed(model, plan), batch, dtype)
        if attention != "eager":  # another one set later
            other = copy.deepcopy(model)
            other.set_attn_implementation("eager")
            ours = installed(model, plans["fast"])
            ours.set_attn_implementation("eager")
            _require_same(f"fast, {attention} and then eager", train(other, batch), ours, batch)
    levels = tuple(sorted({str(level) for level in plans["max"].levels.values()}))
    return Outcome(name, kind, "compared", ", ".join(without), shares, levels)


def _saved(model: nn.Module, batch: dict[str, Tensor], plans: dict[str, Plan]) -> tuple[float, ...]:
    """What each plan saves as parts of stock. Raises `Fault` if that is not less where a plan says so."""
    stock = saved_bytes(copy.deepcopy(model), batch)
    bare = saved_bytes(_stock_blocks(model), batch)
    found = {}
    for budget, plan in plans.items():
        try:
            found[budget] = saved_bytes(installed(model, plan), batch)
        except Exception as error:
            raise Fault(f"{budget}: {type(error).__name__}: {one_line(error)}") from error
        if set(plan.levels.values()) - {Level.STOCK} and found[budget] >= bare:
            raise Fault(f"{budget}: its plan recomputes, but {found[budget]} bytes are saved, by stock blocks {bare}")
    planned, freed = plans["fast"].saved - plans["max"].saved, found["fast"] - found["max"]
    if freed < planned / 2:
        raise Fault(f"max: its plan saves {planned} bytes less than that of fast; it was {freed}")
    return tuple(size / stock for size in found.values())


def _require_same(
    where: str, stock: Any, ours: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> None:
    try:
        found = differences(stock, train(ours, batch, dtype))
    except Exception as error:
        raise Fault(f"{where}: {type(error).__name__}: {one_line(error)}") from error
    if found:
        raise Fault(f"{where}: {len(found)} tensors differ, such as {found[0]}")


def installed(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of a model that follows a plan."""
    ours = copy.deepcopy(model)
    engine_for(ours).install(ours, plan)
    return ours


def _stock_blocks(model: nn.Module) -> nn.Module:
    """A copy whose blocks run their stock code, with the loss head of causal models."""
    ours = copy.deepcopy(model)
    if engine_for(ours) is checkpointed:
        checkpointed.install_levels(ours, {})
    return ours


def sweep(names: Iterable[str], show: bool = False) -> list[Outcome]:
    """The outcome of each class."""
    kinds, found = classes(), []
    for name in names:
        begin = time.perf_counter()
        found.append(one := outcome_of(name, kinds[name]))
        if show:
            seconds = time.perf_counter() - begin
            print(f"{one.result:9} {name:48} {seconds:5.1f} s {one.saved} {one.levels} {one.detail}", flush=True)
    return found


# Reasons as the document groups them: without the names of one model.
_REASONS = {
    r".*routes tokens to experts.*": "routes tokens to experts",
    r".*not transformers' GradientCheckpointingLayer.*": "blocks that are not a `GradientCheckpointingLayer`",
    r".*depends on values, not on shapes.*": "what a training step computes depends on values",
    r".* holds (\w+), whose state.*": r"its blocks hold \1",
    r".*missing 1 required positional argument: '(\w+)'": r"needs `\1`",
    r"takes (\w+)": r"takes `\1`, not token ids",
}


def reason(outcome: Outcome) -> str:
    """Why a class was not compared, without the names of this class."""
    for pattern, text in _REASONS.items():
        if found := re.fullmatch(pattern, outcome.detail):
            return found.expand(text)
    text = outcome.detail if len(outcome.detail) <= 120 else outcome.detail[:117] + "..."
    return text.replace("|", "\\|")


def versions() -> str:
    """The versions that a run is about."""
    plain = (metadata.version(package).partition("+")[0] for package in ("transformers", "torch"))
    return "transformers {}, torch {}".format(*plain)


def document(found: list[Outcome]) -> str:
    """The page of the documentation."""
    counts = Counter((one.kind, one.result) for one in found)
    results = ("compared", "refused", "not built")
    lines = [
        "# Coverage",
        "",
        f"With {versions()}: every causal, masked and sequence-to-sequence class of transformers that could be made",
        "small, with random weights. Two training steps each, on the CPU: `fast` and `max`, eager attention and SDPA",
        "(and eager set later, on a model made with SDPA), float32 and bfloat16 autocast, dropout, padding, and the",
        "default cache.",
        'Compared with `torch.equal` are the loss and every gradient; all classes below "Compared" were bit-identical.',
        "Made by `python bench/coverage.py docs/coverage.md`.",
        "",
        "| classes | " + " | ".join(results) + " |",
        "|---|---|---|---|",
        *(f"| {kind} | " + " | ".join(str(counts[kind, result]) for result in results) + " |" for kind in KINDS),
        "| all | " + " | ".join(str(sum(counts[kind, result] for kind in KINDS)) for result in results) + " |",
        "",
        "## Compared",
        "",
        "Bytes that the forward saves for the backward, as a percentage of stock's, at this small size in float32 with",
        "eager attention; and the levels of `max`, here the lowest of each block, which `max` takes where activations",
        "fill the memory. `stock` is a block in which nothing is recomputed.",
        "",
        "| class | `fast` | `max` | levels of `max` | not compared |",
        "|---|---|---|---|---|",
    ]
    for one in found:
        if one.result == "compared":
            saved = " | ".join(f"{100 * share:.0f} %" for share in one.saved)
            lines.append(f"| `{one.name}` | {saved} | {', '.join(one.levels)} | {one.detail} |")
    titles = {"refused": "Refused", "not built": "Not built", "FAULT": "Faults"}
    notes = {
        "refused": "`make_reversible` raises a `BwskError` that says so.",
        "not built": "The sweep does not know how to make these small or what to train them on, or they do not train.",
        "FAULT": "Other bits than stock's.",
    }
    for result, title in titles.items():
        rest = [one for one in found if one.result == result]
        if rest:
            lines += ["", f"## {title}", "", notes[result], "", "| why | classes |", "|---|---|"]
            groups = Counter(reason(one) for one in rest)
            for why, _ in groups.most_common():
                lines.append(f"| {why} | {', '.join(f'`{one.name}`' for one in rest if reason(one) == why)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("document", type=Path)
    parser.add_argument("--only", default="", help="classes whose names this regular expression finds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    begin = time.process_time()
    found = sweep([name for name in classes() if re.search(options.only, name)], show=True)
    options.document.write_text(document(found), encoding="utf-8")
    counts = Counter(one.result for one in found)
    print(f"wrote {options.document}: {dict(counts)}, {time.process_time() - begin:.0f} s of one core")
    if counts["FAULT"]:
        sys.exit("faults were found")


if __name__ == "__main__":
    main()
