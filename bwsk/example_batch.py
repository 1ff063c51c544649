"""A training batch for a model, from its signature and its config, and the loss of what the model returns.

Values do not matter where these are used (on tensors without values), so ids, pixels and labels are all zeros.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bwsk._compat import tree_leaves
from bwsk.errors import BwskError

# Labels of which each sequence has one: an index of a token or of a class.
_ONE_EACH = ("start_positions", "end_positions", "next_sentence_label", "sentence_order_label")


def example_batch(
    model: nn.Module,
    batch: int,
    input_length: int,
    target_length: int | None,
    *,
    image_size: int | None = None,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Inputs of a training step of a transformers model: token ids (B, L) or pixels (B, C, H, W), and its labels.

    Decoders of encoder-decoder models get `target_length` tokens: as labels, from which the model itself makes their
    input, or as ids where it takes no labels. Question answering gets the positions of its answers (B,), pretraining
    heads their label of each sequence (B,). `image_size` is used for models whose config has none. Raises `BwskError`
    for a model that takes something else, or fewer tokens than these.
    """
    config, name = getattr(model, "config", None), type(model).__name__
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        raise BwskError(f"{name}: not a transformers model; pass its batch as inputs={{name: tensor}}")
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {}
    if main == "pixel_values":
        size = getattr(config, "image_size", None) or image_size
        if size is None:
            raise BwskError(f"{name}: its config does not tell the size of its images; not supported here")
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        inputs[main] = torch.zeros(batch, getattr(config, "num_channels", 3), height, width, device=device)
    elif main == "input_ids":
        limit = getattr(config, "max_position_embeddings", None)
        if isinstance(limit, int) and input_length > limit > 0:
            raise BwskError(
                f"input length {input_length}: {name} has positions for {limit} tokens, "
                f"found input_ids ({batch}, {input_length}); give fewer"
            )
        inputs[main] = torch.zeros(batch, input_length, dtype=torch.long, device=device)
    else:
        raise BwskError(f"{name}: takes {main}, which is not text or pixels; not supported without a batch of its own")
    # A decoder alone, such as PegasusForCausalLM, may have its parent's config.
    targets = target_length if getattr(config, "is_encoder_decoder", False) and _takes_targets(accepted) else None
    one_each = main == "pixel_values" or ("Classification" in name and "TokenClassification" not in name)
    if "labels" in accepted:
        shape = (batch,) if one_each else (batch, targets or input_length)
        inputs["labels"] = torch.zeros(shape, dtype=torch.long, device=device)
    elif targets is not None:
        inputs["decoder_input_ids"] = torch.zeros(batch, targets, dtype=torch.long, device=device)
    inputs |= {name: torch.zeros(batch, dtype=torch.long, device=device) for name in _ONE_EACH if name in accepted}
    if "use_cache" in accepted:
        inputs["use_cache"] = False  # training has no use for the cache of generation
    return inputs


def _takes_targets(accepted: Iterable[str]) -> bool:
    return any(name.startswith("decoder_") for name in accepted)


def label_arguments(model: nn.Module) -> list[str]:
    """The arguments of a model's forward from which a loss may be computed: none for a model without a head."""
    accepted = inspect.signature(model.forward).parameters
    return [name for name in accepted if "label" in name or name in (*_ONE_EACH, "return_loss")]


def own_loss_of(outputs: Any) -> Tensor | None:
    """The loss that a model returned, if any: by name, or as the first of a tuple."""
    if isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    elif isinstance(outputs, (tuple, list)):
        loss = next((x for x in outputs[:1] if isinstance(x, Tensor) and x.ndim == 0), None)
    else:
        loss = getattr(outputs, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def loss_of(outputs: Any) -> Tensor | None:
    """The loss that a model returned, else the mean of its first floating-point output, in float32, if any."""
    loss = own_loss_of(outputs)
    if loss is not None:
        return loss
    leaves = tree_leaves(dict(outputs) if isinstance(outputs, Mapping) else outputs)
    return next((leaf.float().mean() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)
