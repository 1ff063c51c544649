"""What a leaf module computes: its kind and the facts that rules ask about.

It is determined in three ways, in this order, so that a verdict never depends on the name of a class:

1. **type**: torch's own layers, as long as `forward` is not overridden;
2. **behaviour**: the module runs on a few numbers, with small random stand-ins for its parameters, and the outcome is
   compared with what defines a kind: element-wise or not, monotone or not, a row over its scale (RMS norm), less its
   mean too (layer norm), exponentials of a row over their sum (softmax), a distinct code for each position (rotary,
   sinusoidal and learned positions) or a row for each index (embedding), one activation out of two (merge);
3. **operations**: what it dispatches. One linear map, convolution or table look-up with nothing but arithmetic on known
   numbers around it is of that kind. Otherwise its dataflow graph is its fact ("composite", or "routing" if one of the
   operators chooses), and the rules decide which of those operators erase.

A module that none of these recognises is "unknown", which every rule set calls GRAY. `probe` does the last two, once
per class, shape and settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from bwsk._compat import (
    AdaptiveAvgPoolNd,
    AdaptiveMaxPoolNd,
    AvgPoolNd,
    BatchNorm,
    ConvNd,
    DropoutNd,
    InstanceNorm,
    Loss,
    LPPoolNd,
    MaxPoolNd,
)
from bwsk.classification.operators import OpInfo
from bwsk.classification.probe import by_probe
from bwsk.classification.stand_in import probe_key


def leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every leaf that computes: it has no children and defines a forward (an empty list does not).

    A module that computes a layer's weight (a weight norm, say) is part of that layer.
    """
    for name, module in model.named_modules():
        inner = {child for child, _ in module.named_children()} - {"parametrizations"}
        if not inner and "parametrizations" not in name.split(".") and type(module).forward is not nn.Module.forward:
            yield name, module


def identify(module: nn.Module, cache: dict[Any, OpInfo] | None = None) -> OpInfo:
    """Kind and facts of `module` in its present mode (training or eval); pass one `cache` for a whole model."""
    subject = _by_type(module)
    if subject is not None:
        return subject
    key = probe_key(module)
    if cache is not None and key in cache:
        return cache[key]
    subject = by_probe(module)
    if cache is not None:
        cache[key] = subject
    return subject


def _pooling(module: Any) -> OpInfo:
    sizes = [getattr(module, n, None) for n in ("kernel_size", "stride", "padding")]
    kernel, stride, padding = ((n,) if isinstance(n, int) else tuple(n or ()) for n in sizes)
    if kernel and set(kernel) == set(stride) == {1} and not any(padding):  # each window holds one element
        return OpInfo("identity")
    mean = isinstance(module, AvgPoolNd)
    return OpInfo("pooling", {"kernel": kernel, "mean": mean, "keeps": mean and _keeps(kernel, stride, padding)})


def _keeps(kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> bool:
    """Whether there are as many windows as elements."""
    n = max(map(len, (kernel, stride, padding)))
    kernel, padding = (v * n if len(v) == 1 else v for v in (kernel, padding))
    return set(stride) == {1} and all(2 * p >= k - 1 for k, p in zip(kernel, padding, strict=True))


def _upsample(module: Any) -> OpInfo:
    """`reads_all`: every input element appears in the output; None where that depends on the input's size."""
    factors = module.scale_factor
    if not module.mode.startswith("nearest"):
        return OpInfo("upsample", {"mode": module.mode})
    if factors is None:
        return OpInfo("upsample", {"mode": "nearest", "reads_all": None})
    factors = factors if isinstance(factors, tuple) else (factors,)
    every = all(f == int(f) if f < 2 else True for f in factors) if min(factors) >= 1 else False
    return OpInfo("upsample", {"mode": "nearest", "reads_all": every or (None if min(factors) >= 1 else False)})


def _recurrent(module: Any) -> OpInfo:
    return OpInfo("recurrent", {"in": module.input_size, "out": module.hidden_size})


def _convolution(module: Any) -> OpInfo:
    kind = "transposed_convolution" if module.transposed else "convolution"
    if module.padding == "same":
        padding = tuple(d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True))
    elif module.padding == "valid":
        padding = (0,) * len(module.kernel_size)
    else:
        padding = tuple(2 * p for p in module.padding)
    facts = {
        "in": module.in_channels // module.groups,
        "out": module.out_channels // module.groups,
        "kernel": tuple(d * (k - 1) + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)),
        "stride": tuple(module.stride),
        "padding": padding,  # both sides together
        "dilation": tuple(module.dilation),
    }
    if module.transposed:
        facts["output_padding"] = tuple(module.output_padding)
    return OpInfo(kind, facts)


def _batch_norm(module: Any) -> OpInfo:
    return OpInfo("batch_norm", {"batch_statistics": module.training or module.running_mean is None})


def _dropout(module: Any) -> OpInfo:
    return OpInfo("dropout", {"p": float(module.p), "training": module.training})


def _layer_norm(module: Any) -> OpInfo:
    return OpInfo("layer_norm", {"size": math.prod(module.normalized_shape)})


_TYPES: tuple[tuple[type[nn.Module], Callable[[Any], OpInfo]], ...] = (
    (nn.Linear, lambda m: OpInfo("linear", {"in": m.in_features, "out": m.out_features})),
    (DropoutNd, _dropout),
    (nn.LayerNorm, _layer_norm),
    (nn.RMSNorm, lambda m: OpInfo("rms_norm", {"size": math.prod(m.normalized_shape)})),
    (nn.GroupNorm, lambda m: OpInfo("group_norm", {"channels": m.num_channels // m.num_groups})),
    (InstanceNorm, lambda m: OpInfo("group_norm", {"channels": 1})),
    (BatchNorm, _batch_norm),
    (nn.Embedding, lambda m: OpInfo("embedding", {"rows": m.num_embeddings, "out": m.embedding_dim})),
    (ConvNd, _convolution),
    (nn.Identity, lambda m: OpInfo("identity")),
    (MaxPoolNd, _pooling),
    (AvgPoolNd, _pooling),
    (AdaptiveAvgPoolNd, _pooling),
    (AdaptiveMaxPoolNd, _pooling),
    (LPPoolNd, _pooling),
    (nn.Upsample, _upsample),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _recurrent),
    (nn.Flatten, lambda m: OpInfo("reshape")),
    (nn.Unflatten, lambda m: OpInfo("reshape")),
    (nn.PixelShuffle, lambda m: OpInfo("reshape")),
    (nn.PixelUnshuffle, lambda m: OpInfo("reshape")),
    (Loss, lambda m: OpInfo("loss")),
)


def _by_type(module: nn.Module) -> OpInfo | None:
    # GPT-2's transposed linear.
    if type(module).__name__ == "Conv1D" and (nx := getattr(module, "nx", 0)) and (nf := getattr(module, "nf", 0)):
        return OpInfo("linear", {"in": int(nx), "out": int(nf)})
    for cls, facts in _TYPES:
        if isinstance(module, cls):
            # The library class in the module's ancestry that really defines the forward that runs.
            owner = next(c for c in type(module).__mro__ if "forward" in vars(c))
            return facts(module) if owner.__module__.startswith("torch.nn.") else None
    return None
