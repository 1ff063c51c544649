"""Which of transformers' language models train reversibly with stock's bits: `python bench/coverage.py docs/coverage.md`.

Every causal, masked and sequence-to-sequence class of the installed transformers that can be made small is trained for
two steps by its stock code and, from the same weights and seed, made reversible with `fast` and `max`: eager and SDPA
attention, float32 and bfloat16 autocast, dropout on, padding, the default cache. The loss and every gradient are
compared bit by bit, and the bytes that autograd saves with what the plan says.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import re
import time
import warnings
from collections import Counter
from dataclasses import dataclass
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
from bwsk.reversible.plan import Plan, solve

KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence-to-sequence": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
BATCH, LENGTH, TARGET, VOCABULARY, LAYERS, STEPS = 3, 12, 7, 96, 2, 2
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
# What a model type needs beside these. Each value is what its own check or its own arithmetic asks for.
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
    "mpt": {"attn_pdrop": 0},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 4},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (4, 3), "attn_layers": ("local", "local")},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
}
# The same for a class.
OF_CLASS = {"ReformerModelWithLMHead": {"is_decoder": True}}


def classes() -> dict[str, tuple[str, str]]:
    """Class name -> (model type, kind) for the classes that the sweep is about."""
    found: dict[str, tuple[str, str]] = {}
    for kind, mapping in KINDS.items():
        for model_type, names in getattr(_compat, mapping).items():
            for name in (names,) if isinstance(names, str) else names:
                found.setdefault(name, (model_type, kind))
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
    more = MORE.get(config.model_type, {})
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
    """What the sweep found of one class: "compared", "refused", "not built" or "FAULT", and the reason."""

    name: str
    kind: str
    result: str
    detail: str = ""
    saved: tuple[float, ...] = ()  # saved bytes of `fast` and `max` in parts of stock's
    levels: tuple[str, ...] = ()  # of `max`


class _Fault(Exception):
    """The engine does something else than stock, or than its plan says."""


def outcome_of(name: str, kind: str = "causal") -> Outcome:
    """Build, train and compare one class."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = small_model(name)
            batch, stock = _trainable(model)
        except Exception as error:  # classes need what this sweep does not give in as many ways as there are classes
            return Outcome(name, kind, "not built", f"{type(error).__name__}: {one_line(error)}")
        try:
            return _compared(name, kind, model, batch, stock)
        except BwskError as error:
            return Outcome(name, kind, "refused", str(error))
        except _Fault as error:
            return Outcome(name, kind, "FAULT", str(error))


def _trainable(model: nn.Module) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A batch on which the stock model trains, and its steps. Some need targets as long as their inputs."""
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


def _compared(name: str, kind: str, model: nn.Module, batch: dict[str, Tensor], stock: Any) -> Outcome:
    target = batch["labels"].shape[1]
    ours = copy.deepcopy(model)  # some classes change themselves in their first step
    fast = make_reversible(ours, "fast", batch=BATCH, input_length=LENGTH, target_length=target).plan
    plans = {"fast": fast, "max": solve(_copied(fast), None, None)}
    engine = engine_for(model)
    notes, shares = [], []
    bare = _bare(model, engine)
    least = saved_bytes(bare, batch)
    whole = saved_bytes(copy.deepcopy(model), batch)
    measured = []
    for budget, plan in plans.items():
        ours = _installed(model, plan, engine)
        try:
            saved = saved_bytes(ours, batch)
        except Exception as error:
            raise _Fault(f"{budget}: {type(error).__name__}: {one_line(error)}") from error
        shares.append(saved / whole)
        measured.append(saved)
        if set(plan.levels.values()) - {"stock"} and saved >= least:
            raise _Fault(f"{budget}: says {_levels(plan)}, but saves {saved} bytes, where stock blocks save {least}")
    planned = plans["fast"].saved - plans["max"].saved
    if measured[0] - measured[1] < planned / 2:
        raise _Fault(f"max: says {planned} bytes less than fast, saves {measured[0]} and {measured[1]}")
    for attention in ATTENTIONS:
        if attention != "eager":
            try:
                model = small_model(name, attention)
                batch, stock = _trainable(model)
            except Exception as error:
                notes.append(f"without {attention}: {one_line(error)}")
                continue
        for dtype in PRECISIONS:
            try:
                reference = stock if dtype == torch.float32 else train(copy.deepcopy(model), batch, dtype)
            except Exception as error:
                notes.append(f"without {attention} {str(dtype)[6:]}: {one_line(error)}")
                continue
            for budget, plan in plans.items():
                at = f"{budget}, {attention}, {str(dtype)[6:]}"
                try:
                    found = differences(reference, train(_installed(model, plan, engine), batch, dtype))
                except Exception as error:
                    raise _Fault(f"{at}: {type(error).__name__}: {one_line(error)}") from error
                if found:
                    raise _Fault(f"{at}: {len(found)} tensors differ, such as {found[0]}")
    return Outcome(name, kind, "compared", "; ".join(notes), tuple(shares), _levels(plans["max"]))


def _installed(model: nn.Module, plan: Plan, engine: Any) -> nn.Module:
    ours = copy.deepcopy(model)
    engine.install(ours, plan)
    return ours


def _bare(model: nn.Module, engine: Any) -> nn.Module:
    """A copy with the loss head alone, where the engine has one for blocks that run their stock code."""
    ours = copy.deepcopy(model)
    if engine is checkpointed:
        checkpointed.install_levels(ours, dict.fromkeys(checkpointed.blocks(ours), "stock"))
    return ours


def _levels(plan: Plan) -> tuple[str, ...]:
    return tuple(sorted({str(level) for level in plan.levels.values()}))


def _copied(plan: Plan) -> Plan:
    found = copy.copy(plan)
    found.choice_indices = list(plan.choice_indices)
    return found


def sweep(names: list[str] | None = None, show: bool = False) -> list[Outcome]:
    """The outcome of each class, in the order of their names."""
    found = []
    for name, (_, kind) in classes().items():
        if names is not None and name not in names:
            continue
        begin = time.perf_counter()
        found.append(outcome_of(name, kind))
        if show:
            one = found[-1]
            print(
                f"{one.result:10}{name:48}{time.perf_counter() - begin:5.1f} s  {one.saved} {one.levels} {one.detail}",
                flush=True,
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("document", type=Path)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    names = [name for name in classes() if re.search(options.only, name)]
    begin = time.perf_counter()
    found = sweep(names, show=True)
    print(Counter(one.result for one in found), f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
