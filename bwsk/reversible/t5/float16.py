"""T5 under float16 autocast: the feed-forward's output projection, which overflows there, stays in float32.

The engine recognises this forward (`OutOfFloat16`) and computes the same. It takes any other forward set on that layer
for somebody else's patch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def keep_projection_out_of_float16(model: nn.Module) -> None:
    """Compute the output projection `wo` of every T5 feed-forward in float32 where autocast is float16.

    Under bfloat16, and without autocast, nothing changes. Weights, names and `state_dict` stay as they are.
    """
    for name, module in model.named_modules():
        if name.endswith("DenseReluDense.wo") and isinstance(module, nn.Linear):
            module.__dict__["forward"] = OutOfFloat16(module)  # where PyTorch looks first


class OutOfFloat16:
    """The forward of a linear layer that leaves float16 autocast. An object, so that models can be copied."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        kind, layer = x.device.type, self.layer
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
            with torch.autocast(kind, enabled=False):
                return F.linear(x.to(layer.weight.dtype), layer.weight, layer.bias)
        return F.linear(x, layer.weight, layer.bias)
