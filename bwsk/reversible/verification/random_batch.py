"""A training batch of random values for a model that has no data at hand."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from bwsk.example_batch import example_batch


def random_batch(
    model: nn.Module,
    batch: int,
    input_length: int,
    target_length: int | None,
    *,
    seed: int,
    labelled: bool = True,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """`example_batch` with random values: the same ones for the same seed, whatever the device.

    Token ids are drawn from the vocabulary without the special tokens that the config names, classes from the model's.
    Pixels are normal, in the dtype of the weights. The first sequence ends in padding, behind an attention mask, and
    the last quarter of its labels is -100, which losses ignore. `labelled=False` leaves the labels out.
    """
    found = example_batch(model, batch, input_length, target_length)
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    special = {value for name, value in vars(text).items() if name.endswith("_token_id") and isinstance(value, int)}
    tables = [table for table in (_call(model, "input"), _call(model, "output")) if hasattr(table, "weight")]
    vocabulary = min([getattr(text, "vocab_size", None) or 1, *(table.weight.shape[0] for table in tables)])
    words = torch.tensor([i for i in range(vocabulary) if i not in special] or [0])
    classifies = "Classification" in type(model).__name__ or found.get("labels", words).dim() == 1
    for name, value in found.items():
        if not isinstance(value, Tensor):
            continue
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator)
        elif name == "labels" and classifies:
            drawn = torch.randint(max(getattr(config, "num_labels", 1), 1), value.shape, generator=generator)
        else:
            drawn = words[torch.randint(len(words), value.shape, generator=generator)]
        if name == "labels" and drawn.dim() == 2:
            drawn[0, drawn.shape[1] - drawn.shape[1] // 4 :] = -100
        found[name] = drawn
    accepted = inspect.signature(model.forward).parameters
    if not labelled and found.pop("labels", None) is not None and target_length and "decoder_input_ids" in accepted:
        found["decoder_input_ids"] = words[torch.randint(len(words), (batch, target_length), generator=generator)]
    if "input_ids" in found and "attention_mask" in accepted and input_length > 1:
        found["attention_mask"] = torch.ones(batch, input_length, dtype=torch.long)
        found["attention_mask"][0, -1] = 0
        end = getattr(text, "eos_token_id", None)
        if isinstance(end, int) and 0 <= end < vocabulary:
            found["input_ids"][:, -2] = end  # where classifiers of encoder-decoders read off their result
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {name: _moved(value, device, dtype) if isinstance(value, Tensor) else value for name, value in found.items()}


def _call(model: Any, side: str) -> Any:
    """The model's table of input or output tokens, if it tells."""
    get = getattr(model, f"get_{side}_embeddings", None)
    try:
        return None if get is None else get()
    except NotImplementedError:
        return None


def _moved(value: Tensor, device: str | torch.device | None, dtype: torch.dtype) -> Tensor:
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)
