"""The base checkpoint: a pretrained T5 from the Hub or a local directory, or a small one pretrained here.

Only `config.json`, `generation_config.json` and `model.safetensors` are ever read: no code and no pickles of a model
repository. Weights are stored as float32, whatever their dtype was.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bwsk.errors import BwskError
from bwsk.files import atomic_directory, read_json, sha256_file, write_json
from bwsk.study import hub
from bwsk.study.params import DirectoryBase, HubBase, Params, PretrainedBase
from bwsk.study.provenance import identity
from bwsk.study.tokenizer import load_tokenizer, sentinel_ids, vocabulary_size
from bwsk.study.tokens import load_tokens, require_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INSTEAD = "set base.source: directory and base.path to a folder with config.json and model.safetensors"
FILES = ["config.json", "generation_config.json", "model.safetensors"]
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
# Keys of T5Config that describe the architecture; all others follow from the tokenizer or are fixed.
ARCHITECTURE = (
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_decoder_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "dropout_rate",
    "layer_norm_epsilon",
    "initializer_factor",
    "feed_forward_proj",
)


def make_base_checkpoint(
    params: Params, tokenizer: Path, tokens: Path, out: Path, device: str = "cpu"
) -> dict[str, Any]:
    """Store the base model as a Hugging Face checkpoint in `out`, described in `out/base.json`, which is returned.

    `tokenizer` and `tokens` are what those steps stored; tokens are read only to pretrain, which runs on `device`.
    BwskError if a model cannot be loaded or trained, or has fewer embeddings than the tokenizer has ids.
    """
    curve: list[tuple[int, float]] | None = None
    match params.base:
        case HubBase(id=name, revision=revision):
            model = load_checkpoint(hub.fetch("base", name, revision, FILES, INSTEAD), f"base {name}")
        case DirectoryBase(path=path):
            model = load_checkpoint(Path(path), f"base.path: {path}")
        case PretrainedBase():
            model, curve = _pretrain(params, params.base, tokenizer, tokens, device)
    require_vocabulary(vocabulary_size(load_tokenizer(tokenizer)), model.config.vocab_size, params.base_name)
    hub.quiet_unless_terminal()
    with atomic_directory(out) as folder:
        model.save_pretrained(folder)
        info = {
            "name": params.base_name,
            "source": params.base.source,
            "identity": identity(params, "base"),
            "sha256": sha256_file(folder / "model.safetensors"),
            "config_sha256": sha256_file(folder / "config.json"),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "pretraining": None if curve is None else {"steps": [s for s, _ in curve], "loss": [x for _, x in curve]},
        }
        write_json(folder / "base.json", info)
    return info


def load_checkpoint(path: Path, name: str) -> PreTrainedModel:
    """A T5 in float32 on the CPU, in eval mode, from a local directory; BwskError `{name}: …` if it is not one.

    The file must have exactly the architecture's weights, in the right shapes and finite.
    """
    import torch
    from transformers import T5Config, T5ForConditionalGeneration
    from transformers.utils import logging

    from bwsk.study.model import without_progress_bars

    check_files(path, name)
    config_file = path / "config.json"
    values = read_json(config_file)
    if values.get("model_type") != "t5":
        raise BwskError(
            f"{config_file}: model_type is {values.get('model_type')!r}, must be 't5'; name a T5 checkpoint"
        )
    if "auto_map" in values:
        raise BwskError(f"{config_file}: asks to run code of the repository (auto_map), which is never done; remove it")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # problems with the weights are reported below, in one line
    try:
        config = T5Config.from_dict(values)
        # A model and a report, but annotated as the model alone.
        with without_progress_bars():
            loaded: Any = T5ForConditionalGeneration.from_pretrained(
                path,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        model, report = loaded
    # Hostile or damaged files fail in whatever part of the loader they reach.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BwskError(f"{name}: cannot be loaded as a T5 ({reason}); {INSTEAD}") from None
    finally:
        logging.set_verbosity(verbosity)
    weights = path / "model.safetensors"
    for key, found, expected in sorted(report["mismatched_keys"]):
        raise BwskError(f"{weights}: {key} has shape {list(found)}, config.json makes it {list(expected)}; {INSTEAD}")
    for kind, verb in (("missing_keys", "lacks"), ("unexpected_keys", "has, but config.json does not know,")):
        if keys := sorted(report[kind]):
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise BwskError(f"{weights}: {verb} {keys[0]}{more}; {INSTEAD}")
    for key, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise BwskError(f"{weights}: {key} holds values that are not finite; {INSTEAD}")
    start, vocabulary = model.config.decoder_start_token_id, model.config.vocab_size
    if start is None or not 0 <= start < vocabulary:
        found = "is not set" if start is None else f"is {start}, its vocabulary has {vocabulary}"
        raise BwskError(f"{config_file}: decoder_start_token_id {found}; set it (0 for T5)")
    return model


def check_files(path: Path, name: str) -> None:
    """BwskError `{name}: …` unless `path` holds a config.json and a complete model.safetensors."""
    if not path.is_dir():
        raise BwskError(f"{name}: is not a directory; name a folder with config.json and model.safetensors")
    if not (path / "config.json").is_file():
        raise BwskError(f"{name}: has no config.json; name a folder with config.json and model.safetensors")
    weights = path / "model.safetensors"
    if not weights.is_file():
        others = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        why = f" ({others[0]} is a pickle, which can run code when read)" if others else ""
        raise BwskError(f"{name}: has no model.safetensors{why}; save it with save_pretrained")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="pt") as file:
            kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 -- not a dict
    except (SafetensorError, OSError) as error:
        raise BwskError(f"{weights}: not a complete safetensors file ({error}); copy or save it again") from None
    for key, kind in kinds.items():
        if kind not in _FLOATS:  # quantised weights would change when read as float32
            raise BwskError(f"{weights}: {key} is {kind}, must be one of {', '.join(_FLOATS)}; save it as float32")


def _pretrain(
    params: Params, base: PretrainedBase, tokenizer: Path, tokens: Path, device: str
) -> tuple[PreTrainedModel, list[tuple[int, float]]]:
    import torch
    from transformers import T5ForConditionalGeneration

    from bwsk.study.device import configure
    from bwsk.study.pretrain import pretrain

    loaded = load_tokenizer(tokenizer)
    stream = load_tokens(tokens, "train")
    if int(stream.max()) >= vocabulary_size(loaded):
        raise BwskError(f"{tokens}: made with another tokenizer than {tokenizer}; run the tokens step again")
    target = torch.device(device)
    configure(target, threads=params.train.threads, deterministic=True, tf32=False)
    torch.manual_seed(params.seed)
    model = T5ForConditionalGeneration(t5_config(base.architecture, loaded))
    curve = pretrain(model, stream, base, sentinel_ids(loaded), params.seed, target)
    return model.cpu(), curve


def t5_config(architecture: dict[str, Any], tokenizer: Any) -> Any:
    """T5Config of an architecture with the tokenizer's vocabulary; BwskError on keys or values unknown to T5."""
    from transformers import T5Config

    for key, value in architecture.items():
        if key not in ARCHITECTURE:
            raise BwskError(f"base.architecture.{key}: unknown key, must be one of {', '.join(ARCHITECTURE)}")
        if not isinstance(value, str) and value < (0 if key == "dropout_rate" else 1e-12):
            raise BwskError(f"base.architecture.{key}: found {json.dumps(value)}, must be positive")
    try:
        tokens = {
            "vocab_size": vocabulary_size(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            # T5 starts decoding with the padding token.
            "decoder_start_token_id": tokenizer.pad_token_id,
        }
        return T5Config(**architecture, **tokens)
    except Exception as error:
        raise BwskError(f"base.architecture: not a T5 ({' '.join(str(error).split())[:300]})") from None
