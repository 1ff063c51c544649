"""A training batch of random values for a model that has no data at hand."""

from __future__ import annotations

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
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """`example_batch` with random values: the same ones for the same seed, whatever the device.

    Token ids are drawn from the vocabulary without the special tokens that the config names, classes from the model's.
    Pixels are normal. The last quarter of the first sequence of labels is -100, which losses ignore.
    """
    found = example_batch(model, batch, input_length, target_length)
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    special = {value for name, value in vars(text).items() if name.endswith("_token_id") and isinstance(value, int)}
    words = torch.tensor([i for i in range(getattr(text, "vocab_size", None) or 1) if i not in special] or [0])
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
        found[name] = drawn.to(device)
    return found
