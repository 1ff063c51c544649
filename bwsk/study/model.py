"""Models of a study: from the base checkpoint or fresh from its configuration, and saved as users load them.

All modes of a study train the same model: float32 weights, eager attention (as in the published runs; the
default `sdpa` picks kernels by device, so its numbers are not comparable between machines).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.utils import logging

from bwsk.errors import BwskError

if TYPE_CHECKING:
    from bwsk.study.params import Init

ATTENTION = "eager"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Load and save without transformers' progress bars, which clutter the log of a job; restored on exit."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def initial_model(init: Init, base: Path, seed: int) -> PreTrainedModel:
    """The model that training starts from, in float32 on the CPU.

    `finetune` loads the weights of the base checkpoint; `scratch` draws new ones from the base's configuration with
    `seed`. Either way the global random state afterwards is that of `seed`, so dropout is the same in all modes.
    """
    if init == "finetune":
        model = load_model(base, attention=ATTENTION)
    else:
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation=ATTENTION, dtype=torch.float32)
    torch.manual_seed(seed)
    return model


def load_model(root: Path, subfolder: str = "", attention: str | None = None) -> PreTrainedModel:
    """A saved sequence-to-sequence model in float32, loaded as a user would: safetensors only, no remote code.

    `attention` is the attention implementation, the library's default if None. BwskError if it cannot be loaded or
    lacks weights.
    """
    path = root / subfolder
    for name in ("config.json", "model.safetensors"):
        if not (path / name).is_file():
            raise BwskError(f"{path}: has no {name}; name the folder of a model saved by `save_pretrained`")
    try:
        with without_progress_bars():
            model, problems = AutoModelForSeq2SeqLM.from_pretrained(
                root,
                subfolder=subfolder,
                dtype=torch.float32,
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises many kinds; the user needs the folder and the reason
        raise BwskError(f"{path}: cannot be loaded ({' '.join(str(error).split())[:200]})") from error
    if lacking := sorted(problems["missing_keys"]):
        raise BwskError(f"{path}: model.safetensors lacks {lacking[0]} (and {len(lacking) - 1} more tensors)")
    return model


def move(model: torch.nn.Module, device: torch.device | str) -> None:
    """Move a model to a device, in place. As `nn.Module`, because transformers' own `to` hides its signature."""
    model.to(device)


def embedding_count(model: PreTrainedModel) -> int:
    """Number of token ids that the model has an embedding for."""
    return cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings


def save_variant(model: PreTrainedModel, tokenizer: Path, out: Path) -> None:
    """Write `config.json`, `generation_config.json`, `model.safetensors` and the tokenizer's files into `out`."""
    with without_progress_bars():
        model.save_pretrained(out)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, out / name)


def split_block(block: np.ndarray, device: torch.device) -> dict[str, Tensor]:
    """Blocks of tokens (batch, 2 h) as the model's inputs: the first h tokens to the encoder, the last h as labels.

    The model shifts the labels right for its decoder. No padding, no mask. int64, on `device`.
    """
    tokens = torch.from_numpy(block.astype(np.int64))
    if device.type == "cuda":
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    half = tokens.shape[1] // 2
    return {"input_ids": tokens[:, :half], "labels": tokens[:, half:].contiguous()}


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, detached, shared ones once."""
    seen: set[int] = set()
    unique: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            unique[name] = tensor.detach()
    return unique


def load_weights(model: torch.nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copy what `weights` returned into the model, in place; BwskError if names or shapes differ."""
    own = weights(model)
    if own.keys() != saved.keys():
        raise BwskError(f"weights: found other tensors than the model's ({sorted(own.keys() ^ saved.keys())[0]})")
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise BwskError(f"weights: {name} has shape {tuple(saved[name].shape)}, must be {tuple(tensor.shape)}")
        tensor.copy_(saved[name])
