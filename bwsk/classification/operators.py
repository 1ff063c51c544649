"""What a dispatched operator computes: its kind and facts, from its `aten` name, shapes and the role of its inputs.

The role of each input matters as much as the name: adding a bias preserves the input, adding two activations merges
them. Roles are *data* (depends on the model's input), *noise* (drawn at random) and *fixed* (parameters, constants, and
whatever is computed from those alone). Operators without a data input erase nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from bwsk._compat import operator_name, tree_leaves
from bwsk.classification import operator_names as names

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class OpInfo:
    """What an operation computes: its kind, the facts that rules test, and how that was determined.

    `found_by` is "type", "behaviour", "operations" or "none" for a module (see `identify`), or an operator's name.
    """

    kind: str
    facts: Facts = field(default_factory=dict)
    found_by: str = "type"


class Role(IntEnum):
    """Where a tensor's values come from; an operator's output has the highest role among its inputs."""

    FIXED = 0
    NOISE = 1
    DATA = 2


def identify_call(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, role: Callable[[Tensor], Role]
) -> OpInfo:
    """Kind and facts of one operator call; `role` says where a tensor's values come from."""
    name = packet_name(func)
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    roles = [role(t) for t in inputs]
    if name in names.RANDOM:
        return OpInfo("random")
    if name in names.SHAPE_ONLY or not any(r is Role.DATA for r in roles):
        return OpInfo("random" if Role.NOISE in roles and name not in names.SHAPE_ONLY else "constant")
    base = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    subject = _by_name(base, func, args, kwargs, inputs, roles, out)
    return subject or OpInfo("unknown", {"class": operator_name(func)})


def output_role(subject: OpInfo, name: str, roles: Iterable[Role]) -> Role:
    """Role of an operator's outputs."""
    if name in names.RANDOM:
        return Role.NOISE
    return Role.FIXED if name in names.SHAPE_ONLY else max(roles, default=Role.FIXED)


def packet_name(func: Any) -> str:
    """'mm' for `torch.ops.aten.mm.default`."""
    return operator_name(func).partition("::")[2]


def _by_name(
    name: str,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inputs: list[Tensor],
    roles: list[Role],
    out: Any,
) -> OpInfo | None:
    x = next(t for t, r in zip(inputs, roles, strict=True) if r is Role.DATA)
    outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    sizes = {"in": x.numel(), "out": sum(t.numel() for t in outs)}
    if name in ("_to_copy", "to", "copy", "type_as", "_cast_Float", "_cast_Half"):
        if name == "copy" and roles[0] is Role.DATA:  # written over: as a masked fill
            return OpInfo("masking", sizes)
        source = inputs[1] if name == "copy" else x
        return _cast(source.dtype, outs[0].dtype)
    if name == "embedding" and roles[0] is Role.DATA:
        return OpInfo("selection", sizes)
    if name in names.NAMED:
        return OpInfo(names.NAMED[name], sizes)
    if name in names.REARRANGE:
        # A negative pad crops, also where the other end grows; everything else moves every element to the output.
        crops = "pad" in name and any(n < 0 for n in args[1])
        return OpInfo("reshape" if sizes["out"] >= sizes["in"] and not crops else "selection", sizes)
    if name in names.LOOKUP and roles[0] is not Role.DATA and x.dtype != torch.bool:
        return OpInfo("embedding", sizes)
    if name in names.SELECT:
        return OpInfo("reshape" if _selects_all(name, args, x, sizes) else "selection", sizes)
    if name in names.ARITHMETIC:
        return _arithmetic(name, args, kwargs, inputs, roles, outs[0])
    if name in names.PAIRWISE and len(inputs) >= 2:
        if roles.count(Role.DATA) > 1:
            return OpInfo("merge")
        if name in ("pow", "atan2"):  # depends on the known operand's values
            return None
        return OpInfo("elementwise_constant" if name in names.UNDONE else "erasing_elementwise")
    if name in names.INJECTIVE or name in names.ERASING or name == "pow":
        return _elementwise(name, args, x)
    if name in names.REDUCE:
        return OpInfo("reshape" if name in names.OF_ONE and sizes["out"] == sizes["in"] else "reduction", sizes)
    if name in names.COMPARE:
        return OpInfo("comparison", sizes)
    if name in names.MASK:
        return _masking(name, roles, sizes)
    if name in names.POOL:
        return _pooling(name, args, x, outs[0])
    if name in names.LOSS:
        return OpInfo("loss", sizes)
    if name.startswith("upsample_") or name.startswith("_upsample_"):
        return _upsample(name, args, x, outs[0])
    if name in ("_softmax", "softmax", "_log_softmax", "log_softmax", "_safe_softmax"):
        return OpInfo("softmax", {"size": x.shape[args[1]] if x.dim() else 1})
    if name in ("native_dropout", "dropout", "feature_dropout", "alpha_dropout"):
        return OpInfo("dropout", {"p": float(args[1]), "training": args[2] is not False})
    if "scaled_dot_product" in name or name in ("_flash_attention_forward", "_efficient_attention_forward"):
        return OpInfo("attention") if not name.endswith("backward") else None
    return _layer(name, args, kwargs, inputs, roles, outs)


def _layer(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inputs: list[Tensor],
    roles: list[Role],
    outs: list[Tensor],
) -> OpInfo | None:
    """Matrix products, convolutions and norms."""
    if name in names.MATMUL:
        return _product(name, args, {id(t) for t, r in zip(inputs, roles, strict=True) if r is Role.DATA})
    if name == "convolution":
        return _convolution(args, roles)
    if name in ("native_layer_norm", "layer_norm"):
        return OpInfo("layer_norm", {"size": math.prod(args[1])})
    if name in ("_fused_rms_norm", "rms_norm"):
        return OpInfo("rms_norm", {"size": math.prod(args[1])})
    if name in ("native_group_norm", "group_norm"):
        groups = inputs[0].shape[0] * (args[6] if name == "native_group_norm" else args[1])
        return OpInfo("group_norm", {"size": inputs[0].numel() // max(1, groups)})
    if name in names.BATCH_NORM:
        flag = names.BATCH_NORM[name]
        training = bool(args[flag]) if flag is not None else "with_update" in name
        if name == "_native_batch_norm_legit" and not isinstance(
            args[3], Tensor
        ):  # overload without running statistics
            training = True
        return OpInfo("batch_norm", {"batch_statistics": training, "size": inputs[0].numel() // inputs[0].shape[1]})
    return None


def _elementwise(name: str, args: tuple[Any, ...], x: Tensor) -> OpInfo | None:
    """A function of each element, by its name and its numbers."""
    numbers = [a for a in args if isinstance(a, (int, float)) and not isinstance(a, bool)]
    if x.is_complex() and name not in names.ERASING and name not in ("neg", "negative", "reciprocal"):
        return None  # the exponential is periodic there
    if name == "pow":
        if not isinstance(args[1], (int, float)) or not math.isfinite(args[1]):
            return None
        injective = args[1] != 0 and (float(args[1]) % 2 == 1 or not float(args[1]).is_integer())
    elif name in ("leaky_relu", "elu"):  # a slope or scale of zero flattens, a negative one folds
        injective = all(0 < n < math.inf for n in numbers)
    elif name == "softplus":  # takes values twice just below its threshold: by e^-12 or more
        injective = (args[2] if len(args) > 2 else 20) >= 12
    elif name == "logit":  # an epsilon clamps
        injective = not numbers
    elif name == "clamp" and not any(isinstance(a, Tensor) for a in args[1:]):
        low, high = (*args[1:3], None, None)[:2]
        injective = low in (None, -math.inf) and high in (None, math.inf)
    else:
        injective = name in names.INJECTIVE
    return OpInfo("injective_elementwise" if injective else "erasing_elementwise")


def _selects_all(name: str, args: tuple[Any, ...], x: Tensor, sizes: dict[str, int]) -> bool:
    if name == "unfold":  # windows of args[2] elements, args[3] apart
        _, dim, size, step = args
        return bool(x.dim()) and step <= size <= x.shape[dim] and (x.shape[dim] - size) % step == 0
    return name in ("slice", "narrow") and sizes["out"] >= sizes["in"]


def _masking(name: str, roles: list[Role], sizes: dict[str, int]) -> OpInfo | None:
    """Written over an activation: erases. Written into something known: nothing is lost if it all lands apart."""
    if name == "where":
        return OpInfo("masking", sizes) if Role.DATA in roles[1:] else None
    if roles[0] is Role.DATA:
        return OpInfo("masking", sizes)
    return OpInfo("reshape", sizes) if name in ("select_scatter", "slice_scatter", "diagonal_scatter") else None


def _pooling(name: str, args: tuple[Any, ...], x: Tensor, out: Tensor) -> OpInfo:
    if "adaptive" in name:
        single = out.shape == x.shape
    else:
        kernel = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
        single = max(kernel) == 1 and out.shape == x.shape
    if single:  # each window holds one element
        return OpInfo("identity")
    return OpInfo("pooling", {"mean": "avg" in name, "keeps": out.numel() >= x.numel()})


def _upsample(name: str, args: tuple[Any, ...], x: Tensor, out: Tensor) -> OpInfo:
    mode = next((m for m in ("nearest", "bicubic", "bilinear", "trilinear", "linear") if m in name), "unknown")
    if mode != "nearest":
        return OpInfo("upsample", {"mode": mode})
    half = 0.5 if "exact" in name else 0.0
    scales = args[2:] if len(args) > 2 else (None,) * (x.dim() - 2)
    every = True
    for n, m, scale in zip(x.shape[2:], out.shape[2:], scales, strict=False):
        step = n / m if scale is None else 1 / scale
        every = every and len({min(int((i + half) * step), n - 1) for i in range(m)}) == n
    return OpInfo("upsample", {"mode": "nearest", "reads_all": every})


def _product(name: str, args: tuple[Any, ...], data: set[int]) -> OpInfo:
    """A matrix product: a linear map of the one data operand, or the product of two."""
    a, b = (args[i] for i in names.MATMUL[name])
    operands = (id(a) in data) + (id(b) in data)
    added = names.MATMUL[name][0] == 1 and id(args[0]) in data
    if operands == 2:
        return OpInfo("product")
    if operands == 0:  # only the added matrix is data
        return OpInfo("elementwise_constant")
    if added:
        return OpInfo("merge")
    if id(a) in data:
        return OpInfo(
            "linear", {"in": a.shape[-1], "out": b.shape[0] if name == "linear" else b.shape[-1] if b.dim() > 1 else 1}
        )
    return OpInfo(
        "linear", {"in": b.shape[-2] if b.dim() > 1 else b.shape[-1], "out": a.shape[-2] if a.dim() > 1 else 1}
    )


def _cast(source: torch.dtype, target: torch.dtype) -> OpInfo:
    if source == target:
        return OpInfo("identity")
    real, to_real = (t.is_floating_point or t.is_complex for t in (source, target))
    if source == torch.bool:
        widens = True
    elif real and not to_real:
        widens = False
    elif to_real and not real:
        widens = torch.iinfo(source).bits <= -math.log2(torch.finfo(target).eps) + 1  # beyond the mantissa they round
    elif source.is_floating_point and target.is_floating_point:  # 8-bit floats have no promotion
        a, b = torch.finfo(source), torch.finfo(target)
        widens = b.eps <= a.eps and b.max >= a.max and b.smallest_normal <= a.smallest_normal
    else:
        widens = torch.promote_types(source, target) == target
    return OpInfo("widening_cast" if widens else "narrowing_cast", {"from": str(source), "to": str(target)})


def _arithmetic(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor], roles: list[Role], out: Tensor
) -> OpInfo:
    data = [t for t, r in zip(inputs, roles, strict=True) if r is Role.DATA]
    if kwargs.get("rounding_mode") is not None:
        return OpInfo("erasing_elementwise" if len(data) == 1 else "merge")
    if len(data) == 1:
        scales = "mul" in name or "div" in name
        if Role.NOISE in roles:  # x * mask zeroes at random; x + noise is undone by replaying the noise
            if scales:
                return OpInfo("dropout", {"p": None, "training": True})
            return OpInfo("elementwise_constant", {"noise": True})
        numbers = [a for a in args if isinstance(a, (int, float))]
        if any((scales and n == 0) or not math.isfinite(n) for n in numbers):
            return OpInfo("erasing_elementwise")
        if scales and any(t.dtype == torch.bool for t, r in zip(inputs, roles, strict=True) if r is not Role.DATA):
            return OpInfo("masking")  # times a mask
        return OpInfo("elementwise_constant")
    if len(data) == 2:
        a, b = data
        if a is b:
            return OpInfo("elementwise_constant" if name == "add" else "erasing_elementwise")
        small = min(a.numel(), b.numel())
        if max(a.numel(), b.numel()) == out.numel() and 3 * small <= out.numel():  # rows as norms have them
            return OpInfo("row_broadcast", {"scalars": small, "out": out.numel()})
    return OpInfo("merge")


def _convolution(args: tuple[Any, ...], roles: list[Role]) -> OpInfo:
    x, weight, _, stride, padding, dilation, transposed, _, groups = args[:9]
    if roles[:2] == [Role.DATA, Role.DATA]:
        return OpInfo("product")
    n = weight.dim() - 2
    stride, padding, dilation = (tuple(v) * n if len(v) == 1 else tuple(v) for v in (stride, padding, dilation))
    into, outof = x.shape[1] // groups, (weight.shape[1] if transposed else weight.shape[0] // groups)
    facts = {
        "in": into,
        "out": outof,
        "kernel": tuple(d * (k - 1) + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)),
        "stride": stride,
        "padding": tuple(2 * p for p in padding),
        "dilation": dilation,
        "length": tuple(x.shape[2:]),
    }
    if transposed:
        facts["output_padding"] = tuple(args[7]) * n if len(args[7]) == 1 else tuple(args[7])
    return OpInfo("transposed_convolution" if transposed else "convolution", facts)


class Operator:
    """One operator with some of its arguments fixed: what cases of operators are made of."""

    def __init__(self, func: Any, *fixed: Any, pick: int | None = None, noise: bool = False, **kwargs: Any) -> None:
        """Calls `func(*inputs, *fixed, **kwargs)`; a `...` among `fixed` stands for the inputs' place.

        `noise`: the tensors among `fixed` were drawn at random.
        """
        self.func, self.fixed, self.pick, self.kwargs = func, fixed, pick, kwargs
        self.others = Role.NOISE if noise else Role.FIXED

    def _arguments(self, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        if Ellipsis not in self.fixed:
            return (*inputs, *self.fixed)
        at = self.fixed.index(Ellipsis)
        return (*self.fixed[:at], *inputs, *self.fixed[at + 1 :])

    def __call__(self, *inputs: Tensor) -> Any:
        out = self.func(*self._arguments(inputs), **self.kwargs)
        return out if self.pick is None else out[self.pick]

    def subject(self, *inputs: Tensor) -> OpInfo:
        """Its kind, with `inputs` as data and all else fixed; `found_by` is the operator's name."""
        data = {id(t) for t in inputs}
        args = self._arguments(inputs)
        out = self.func(*args, **self.kwargs)
        subject = identify_call(
            self.func, args, self.kwargs, out, lambda t: Role.DATA if id(t) in data else self.others
        )
        return OpInfo(subject.kind, subject.facts, operator_name(self.func))
