"""What a leaf module computes: its kind and the facts that rules ask about.

Three ways, in this order, so that a verdict never hangs on what a class is called:

1. **type**: torch's own layers, as long as `forward` is not overridden;
2. **behaviour**: the module runs on a few numbers, with small random stand-ins for its parameters, and the outcome is
   compared with what defines a kind: element-wise or not, monotone or not, invariant to the scale of a row (RMS norm),
   to its scale and offset (layer norm), affine (a linear map), rows of cosines and sines (rotary positions), ...
3. **operations**: the operators that it dispatches on that probe are its facts ("composite", or "routing" if one of
   them chooses); which of those erase is for rules to say.

What answers to none of these is "unknown", which every rule set calls GRAY. Probing works on meta-device modules,
leaves the module and the global random state untouched, and is done once per class, shape and settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bwsk.operators import Subject, dispatched
from bwsk.witness import fixed_draws

_PROBE_ELEMENTS = 1 << 23  # stand-in parameters of more elements than this are not made


def leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every leaf that computes: no children, and a forward of its own (an empty list has none)."""
    for name, module in model.named_modules():
        if next(module.children(), None) is None and type(module).forward is not nn.Module.forward:
            yield name, module


def identify(module: nn.Module, cache: dict[Any, Subject] | None = None) -> Subject:
    """Kind and facts of `module` in its present mode (training or eval); pass one `cache` for a whole model."""
    subject = _by_type(module)
    if subject is not None:
        return subject
    key = _probe_key(module)
    if cache is not None and key in cache:
        return cache[key]
    subject = _by_probe(module)
    if cache is not None:
        cache[key] = subject
    return subject


# --- 1. type ---------------------------------------------------------------------------------------------------------


def _pooling(module: Any) -> Subject:
    return Subject("pooling", {"kernel": getattr(module, "kernel_size", None)})


def _recurrent(module: Any) -> Subject:
    return Subject("recurrent", {"in": module.input_size, "out": module.hidden_size})


def _convolution(module: Any) -> Subject:
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
    }
    return Subject(kind, facts)


def _batch_norm(module: Any) -> Subject:
    return Subject("batch_norm", {"batch_statistics": module.training or module.running_mean is None})


def _dropout(module: Any) -> Subject:
    return Subject("dropout", {"p": float(module.p), "training": module.training})


def _layer_norm(module: Any) -> Subject:
    return Subject("layer_norm", {"size": math.prod(module.normalized_shape)})


_TYPES: tuple[tuple[type[nn.Module], Callable[[Any], Subject]], ...] = (
    (nn.Linear, lambda m: Subject("linear", {"in": m.in_features, "out": m.out_features})),
    (nn.modules.dropout._DropoutNd, _dropout),
    (nn.LayerNorm, _layer_norm),
    (nn.RMSNorm, lambda m: Subject("rms_norm", {"size": math.prod(m.normalized_shape)})),
    (nn.GroupNorm, lambda m: Subject("group_norm", {"size": m.num_channels // m.num_groups})),
    (nn.modules.instancenorm._InstanceNorm, lambda m: Subject("group_norm", {"size": 1})),
    (nn.modules.batchnorm._BatchNorm, _batch_norm),
    (nn.Embedding, lambda m: Subject("embedding", {"rows": m.num_embeddings, "out": m.embedding_dim})),
    (nn.modules.conv._ConvNd, _convolution),
    (nn.Identity, lambda m: Subject("identity")),
    (nn.modules.pooling._MaxPoolNd, _pooling),
    (nn.modules.pooling._AvgPoolNd, _pooling),
    (nn.modules.pooling._AdaptiveAvgPoolNd, _pooling),
    (nn.modules.pooling._AdaptiveMaxPoolNd, _pooling),
    (nn.modules.pooling._LPPoolNd, _pooling),
    (nn.Upsample, lambda m: Subject("upsample", {"mode": m.mode})),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _recurrent),
    (nn.Flatten, lambda m: Subject("reshape")),
    (nn.Unflatten, lambda m: Subject("reshape")),
    (nn.PixelShuffle, lambda m: Subject("reshape")),
    (nn.PixelUnshuffle, lambda m: Subject("reshape")),
    (nn.modules.loss._Loss, lambda m: Subject("loss")),
)


def _by_type(module: nn.Module) -> Subject | None:
    if (
        hasattr(module, "nf") and hasattr(module, "nx") and type(module).__name__ == "Conv1D"
    ):  # GPT-2's transposed linear
        return Subject("linear", {"in": int(module.nx), "out": int(module.nf)})
    for cls, facts in _TYPES:
        if isinstance(module, cls):
            # The library class in the module's ancestry that really defines the forward that runs.
            owner = next(c for c in type(module).__mro__ if "forward" in vars(c))
            return facts(module) if owner.__module__.startswith("torch.nn.") else None
    return None


# --- 2. behaviour ----------------------------------------------------------------------------------------------------


def _probe_key(module: nn.Module) -> Any:
    state = tuple((n, tuple(t.shape)) for n, t in [*module.named_parameters(), *module.named_buffers()])
    plain = tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple))))
    return type(module), state, repr(plain)


class _Probe:
    """A module with random stand-ins for its parameters, called on double-precision inputs."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        if sum(t.numel() for t in state.values()) > _PROBE_ELEMENTS:
            raise ValueError("too large to probe")
        # Positive, so that a slope or a scale among them does not flip a sign; float tensors only, the rest is zero.
        self.state = {n: torch.rand(t.shape, dtype=torch.float64) + 0.5 if t.is_floating_point() else
                      torch.zeros(t.shape, dtype=t.dtype) for n, t in state.items()}  # fmt: skip
        self.widths = list(dict.fromkeys(d for n in self.state.values() if n.dim() for d in (n.shape[-1], n.shape[0])))

    def __call__(self, *inputs: Tensor) -> Any:
        return torch.func.functional_call(self.module, self.state, inputs)


def _by_probe(module: nn.Module) -> Subject:
    # The grid of numbers is fixed; what is drawn comes from a private copy of the generator.
    with torch.no_grad(), fixed_draws():
        try:
            probe = _Probe(module)
        except ValueError:
            return Subject("unknown", {"class": type(module).__name__}, "none")
        return (
            _attempt(_elementwise, probe)
            or _attempt(_rotary, probe)
            or _attempt(_row_function, probe)
            or _attempt(_operations, probe)
            or Subject("unknown", {"class": type(module).__name__}, "none")
        )


def _attempt(test: Callable[[_Probe], Subject | None], probe: _Probe) -> Subject | None:
    try:
        return test(probe)
    except Exception:  # the probe's inputs were not what this module takes: then it is not of this kind
        return None


_GRID = torch.linspace(-8, 8, 4001, dtype=torch.float64)
_REFERENCES: tuple[tuple[str, Callable[[Tensor], Tensor], float], ...] = (
    ("identity", lambda x: x, 0.0),
    ("relu", F.relu, 0.0),
    ("silu", F.silu, 1e-6),
    ("tanh", torch.tanh, 1e-6),
    ("sigmoid", torch.sigmoid, 1e-6),
    ("gelu", F.gelu, 0.03),  # covers the tanh and logistic approximations (largest error 0.02) and no other activation
)


def _elementwise(probe: _Probe) -> Subject | None:
    grid = _GRID
    state = torch.get_rng_state()
    y = probe(grid.reshape(1, -1).clone())
    if not isinstance(y, Tensor) or y.shape != (1, grid.numel()):
        return None
    if not torch.equal(state, torch.get_rng_state()):
        return _random_zeroing(probe)
    y = y.reshape(-1).double()
    order = torch.randperm(grid.numel())
    if not torch.allclose(probe(grid[order].reshape(1, -1)).reshape(-1).double(), y[order], atol=1e-9, rtol=0):
        return None
    half = probe(grid[::2].reshape(1, -1).clone()).reshape(-1).double()  # neighbours must not matter
    if not torch.allclose(half, y[::2], atol=1e-9, rtol=0):
        return None
    for kind, reference, bound in _REFERENCES:
        if float((y - reference(grid)).abs().max()) <= bound:
            return Subject(kind, {}, "behaviour")
    steps = y.diff()
    injective = bool((steps > 0).all() or (steps < 0).all())
    return Subject("injective_elementwise" if injective else "erasing_elementwise", {}, "behaviour")


def _random_zeroing(probe: _Probe) -> Subject | None:
    """Dropout of elements or of whole rows (stochastic depth): every output is zero or x / (1 - p)."""
    x = _GRID[1:] + 8
    y = torch.cat([probe(x.reshape(1, -1).clone()).reshape(-1).double() for _ in range(8)])
    factors = (y / x.repeat(8))[y != 0]
    if factors.numel() and float(factors.max() - factors.min()) < 1e-6:
        return Subject("dropout", {"p": round(1 - 1 / float(factors[0]), 6), "training": True}, "behaviour")
    return None


def _rotary(probe: _Probe) -> Subject | None:
    positions = torch.arange(5).reshape(1, 5)
    out = probe(torch.zeros(1, 5, 8, dtype=torch.float64), positions)
    if not (isinstance(out, tuple) and len(out) == 2 and all(isinstance(t, Tensor) for t in out)):
        return None
    squares = out[0].double() ** 2 + out[1].double() ** 2
    return Subject("position", {}, "behaviour") if float((squares - squares.mean()).abs().max()) < 1e-3 else None


def _row_function(probe: _Probe) -> Subject | None:
    """Norms, softmax and affine maps: functions of rows told apart by what they do not notice."""
    for width in probe.widths or [8]:
        for shape in ((3, width), (2, 5, width), (2, width, 3, 3), (2, width, 5)):
            x = torch.randn(shape, dtype=torch.float64) * 30  # large against any epsilon
            try:
                y = probe(x.clone())
            except Exception:
                continue
            if isinstance(y, Tensor) and y.is_floating_point():
                return _describe(probe, x, y.double(), width)
    return None


def _describe(probe: _Probe, x: Tensor, y: Tensor, width: int) -> Subject | None:
    def same(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-4 * float(b.abs().max()))

    if y.shape == x.shape:
        scale_free, offset_free = same(probe(3 * x), y), same(probe(x + 7), y)
        if scale_free and not torch.equal(y, x):
            return Subject("layer_norm" if offset_free else "rms_norm", {"size": width}, "behaviour")
        for sums in (y.sum(-1), y.exp().sum(-1)):  # softmax and its logarithm
            if offset_free and same(sums, torch.ones_like(sums)):
                return Subject("softmax", {"size": width}, "behaviour")
    z = torch.randn_like(x) * 30
    if same(probe(0.3 * x + 0.7 * z), 0.3 * y + 0.7 * probe(z).double()) and y.shape[:-1] == x.shape[:-1]:
        return Subject("linear", {"in": x.shape[-1], "out": y.shape[-1]}, "behaviour")
    return None


# --- 3. operations ---------------------------------------------------------------------------------------------------


def _operations(probe: _Probe) -> Subject | None:
    for width in probe.widths or [8]:
        for shape in ((3, width), (2, 5, width), (2, width, 3, 3)):
            try:
                ran = dispatched(probe, torch.randn(shape, dtype=torch.float64))
            except Exception:
                continue
            if ran:
                kind = "routing" if any(subject.kind == "routing" for subject, _ in ran) else "composite"
                return Subject(kind, {"operations": ran}, "operations")
    return None
