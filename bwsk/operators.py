"""What a dispatched operator computes: from `aten` name, shapes and the role of its inputs to a kind with facts.

The role of each input matters as much as the name: an addition of a bias keeps its input, an addition of two
activations merges them. Roles are *data* (depends on what the model is fed), *noise* (drawn at random) and *fixed*
(parameters, constants, and all that is computed from those alone). Operators without a data input erase nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bwsk import operator_names as names

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Subject:
    """What an operation computes: its kind, the facts that rules ask about, and how that was found out."""

    kind: str
    facts: Facts = field(default_factory=dict)
    how: str = "type"


class Role(IntEnum):
    """Where a tensor's values come from; an operator's output has the highest role among its inputs."""

    FIXED = 0
    NOISE = 1
    DATA = 2


def identify_call(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, role: Callable[[Tensor], Role]
) -> Subject:
    """Kind and facts of one operator call; `role` tells where a tensor's values come from."""
    name = packet_name(func)
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    roles = [role(t) for t in inputs]
    if name in names.RANDOM:
        return Subject("random")
    if name in names.SHAPE_ONLY or not any(r is Role.DATA for r in roles):
        return Subject("random" if Role.NOISE in roles and name not in names.SHAPE_ONLY else "constant")
    base = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    subject = _by_name(base, func, args, kwargs, inputs, roles, out)
    return subject or Subject("unknown", {"class": operator_name(func)})


def output_role(subject: Subject, name: str, roles: Iterable[Role]) -> Role:
    """Role of an operator's outputs."""
    if name in names.RANDOM:
        return Role.NOISE
    return Role.FIXED if name in names.SHAPE_ONLY else max(roles, default=Role.FIXED)


def operator_name(func: Any) -> str:
    """'aten::mm' for `torch.ops.aten.mm.default`."""
    return func._schema.name


def packet_name(func: Any) -> str:
    """'mm' for `torch.ops.aten.mm.default`."""
    return func._schema.name.partition("::")[2]


def _by_name(
    name: str,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inputs: list[Tensor],
    roles: list[Role],
    out: Any,
) -> Subject | None:
    x = next(t for t, r in zip(inputs, roles, strict=True) if r is Role.DATA)
    outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    sizes = {"in": x.numel(), "out": sum(t.numel() for t in outs)}
    if name in ("_to_copy", "to", "copy", "type_as", "_cast_Float", "_cast_Half"):
        source = inputs[1] if name == "copy" else x
        return _cast(source.dtype, outs[0].dtype)
    if name == "embedding" and roles[0] is Role.DATA:
        return Subject("selection", sizes)
    if name in names.NAMED:
        return Subject(names.NAMED[name], sizes)
    if name in names.REARRANGE:
        # A negative pad crops; everything else moves every element to the output.
        return Subject("reshape" if sizes["out"] >= sizes["in"] else "selection", sizes)
    if name in names.SELECT:
        whole = name in ("slice", "narrow", "unfold") and sizes["out"] >= sizes["in"]
        return Subject("reshape" if whole else "selection", sizes)
    if name == "pow" and isinstance(args[1], (int, float)):
        odd = float(args[1]) % 2 == 1 or not float(args[1]).is_integer()
        return Subject("injective_elementwise" if odd and args[1] != 0 else "erasing_elementwise")
    if name in names.ARITHMETIC:
        return _arithmetic(name, args, kwargs, inputs, roles, outs[0])
    if name in names.PAIRWISE and len(inputs) >= 2:
        return Subject("merge" if roles.count(Role.DATA) > 1 else "erasing_elementwise")
    if name in names.INJECTIVE:
        return Subject("injective_elementwise")
    if name in names.ERASING:
        return Subject("erasing_elementwise")
    if name in names.REDUCE:
        return Subject("reshape" if sizes["out"] == sizes["in"] else "reduction", sizes)
    if name in names.COMPARE:
        return Subject("comparison", sizes)
    if name in names.MASK:
        return Subject("masking", sizes)
    if name in names.POOL:
        return Subject("pooling", sizes)
    if name in names.LOSS:
        return Subject("loss", sizes)
    if name.startswith("upsample_") or name.startswith("_upsample_"):
        return Subject("upsample", {"mode": name.strip("_").split("_")[1][:7]})
    if name in ("_softmax", "softmax", "_log_softmax", "log_softmax", "_safe_softmax"):
        return Subject("softmax", {"size": x.shape[args[1]] if x.dim() else 1})
    if name in ("native_dropout", "dropout", "feature_dropout", "alpha_dropout"):
        return Subject("dropout", {"p": float(args[1]), "training": args[2] is not False})
    if "scaled_dot_product" in name or name in ("_flash_attention_forward", "_efficient_attention_forward"):
        return Subject("attention") if not name.endswith("backward") else None
    return _layer(name, args, kwargs, inputs, roles, outs)


def _layer(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inputs: list[Tensor],
    roles: list[Role],
    outs: list[Tensor],
) -> Subject | None:
    """Matrix products, convolutions and norms."""
    if name in names.MATMUL:
        return _product(name, args, {id(t) for t, r in zip(inputs, roles, strict=True) if r is Role.DATA})
    if name in names.CONVOLVE:
        return _convolution(args, roles)
    if name in ("native_layer_norm", "layer_norm"):
        return Subject("layer_norm", {"size": math.prod(args[1])})
    if name in ("_fused_rms_norm", "rms_norm"):
        return Subject("rms_norm", {"size": math.prod(args[1])})
    if name in ("native_group_norm", "group_norm"):
        return Subject(
            "group_norm", {"size": inputs[0].shape[1] // (args[6] if name == "native_group_norm" else args[1])}
        )
    if name in names.BATCH_NORM:
        flag = names.BATCH_NORM[name]
        training = bool(args[flag]) if flag is not None else "with_update" in name
        if name == "_native_batch_norm_legit" and not isinstance(
            args[3], Tensor
        ):  # overload without running statistics
            training = True
        return Subject("batch_norm", {"batch_statistics": training})
    return None


def _product(name: str, args: tuple[Any, ...], data: set[int]) -> Subject:
    """A matrix product: a linear map of the one data operand, or the product of two."""
    a, b = (args[i] for i in names.MATMUL[name])
    operands = (id(a) in data) + (id(b) in data)
    added = names.MATMUL[name][0] == 1 and id(args[0]) in data
    if operands == 2:
        return Subject("product")
    if operands == 0:  # only the added matrix is data
        return Subject("elementwise_constant")
    if added:
        return Subject("merge")
    if id(a) in data:
        return Subject(
            "linear", {"in": a.shape[-1], "out": b.shape[0] if name == "linear" else b.shape[-1] if b.dim() > 1 else 1}
        )
    return Subject(
        "linear", {"in": b.shape[-2] if b.dim() > 1 else b.shape[-1], "out": a.shape[-2] if a.dim() > 1 else 1}
    )


def _cast(source: torch.dtype, target: torch.dtype) -> Subject:
    if source == target:
        return Subject("identity")
    widens = torch.promote_types(source, target) == target
    if not source.is_floating_point and not source.is_complex and target.is_floating_point:
        # Integers beyond the mantissa round.
        widens = source == torch.bool or torch.iinfo(source).bits <= {torch.float64: 53, torch.float32: 24}.get(
            target, 8
        )
    return Subject("widening_cast" if widens else "narrowing_cast", {"from": str(source), "to": str(target)})


def _arithmetic(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor], roles: list[Role], out: Tensor
) -> Subject:
    data = [t for t, r in zip(inputs, roles, strict=True) if r is Role.DATA]
    if len(data) == 1:
        scales = "mul" in name or "div" in name
        if Role.NOISE in roles:  # x * mask zeroes at random; x + noise is undone by replaying the noise
            return Subject("dropout", {"p": None, "training": True}) if scales else Subject("elementwise_constant")
        numbers = [a for a in args if isinstance(a, (int, float))]
        if scales and numbers and any(n == 0 or not math.isfinite(n) for n in numbers):
            return Subject("erasing_elementwise")
        return Subject("elementwise_constant")
    if len(data) == 2:
        a, b = data
        if a is b:
            return Subject("elementwise_constant" if name == "add" else "erasing_elementwise")
        small = min(a.numel(), b.numel())
        if max(a.numel(), b.numel()) == out.numel() and 2 * small <= out.numel():
            return Subject("row_broadcast", {"scalars": small, "out": out.numel()})
    return Subject("merge")


def _convolution(args: tuple[Any, ...], roles: list[Role]) -> Subject:
    x, weight, _, stride, padding, dilation, transposed, _, groups = args[:9]
    if roles[:2] == [Role.DATA, Role.DATA]:
        return Subject("product")
    n = weight.dim() - 2
    stride, padding, dilation = (tuple(v) * n if len(v) == 1 else tuple(v) for v in (stride, padding, dilation))
    into, outof = x.shape[1] // groups, (weight.shape[1] if transposed else weight.shape[0] // groups)
    facts = {
        "in": into,
        "out": outof,
        "kernel": tuple(d * (k - 1) + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)),
        "stride": stride,
        "padding": tuple(2 * p for p in padding),
    }
    return Subject("transposed_convolution" if transposed else "convolution", facts)


class Operator:
    """One operator with some of its arguments fixed: what specimens of operators are made of."""

    def __init__(self, func: Any, *fixed: Any, pick: int | None = None, **kwargs: Any) -> None:
        """Calls `func(*inputs, *fixed, **kwargs)`; a `...` among `fixed` stands for the inputs' place."""
        self.func, self.fixed, self.pick, self.kwargs = func, fixed, pick, kwargs

    def _arguments(self, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        if Ellipsis not in self.fixed:
            return (*inputs, *self.fixed)
        at = self.fixed.index(Ellipsis)
        return (*self.fixed[:at], *inputs, *self.fixed[at + 1 :])

    def __call__(self, *inputs: Tensor) -> Any:
        out = self.func(*self._arguments(inputs), **self.kwargs)
        return out if self.pick is None else out[self.pick]

    def subject(self, *inputs: Tensor) -> Subject:
        """Its kind, with `inputs` as data and all else fixed; how it was found is the operator's name."""
        data = {id(t) for t in inputs}
        args = self._arguments(inputs)
        out = self.func(*args, **self.kwargs)
        subject = identify_call(self.func, args, self.kwargs, out, lambda t: Role.DATA if id(t) in data else Role.FIXED)
        return Subject(subject.kind, subject.facts, operator_name(self.func))


def dispatched(function: Callable[[Tensor], Any], x: Tensor) -> tuple[tuple[Subject, str], ...]:
    """Every operator on the data's way through `function(x)`: what it computes, and its name."""
    found: list[tuple[Subject, str]] = []
    roles: dict[int, Role] = {id(x): Role.DATA}
    alive: list[Any] = [x]  # a freed tensor's id would be used again

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            subject = identify_call(func, args, kwargs or {}, out, lambda t: roles.get(id(t), Role.FIXED))
            role = output_role(subject, packet_name(func), (roles.get(id(t), Role.FIXED) for t in inputs))
            for t in tree_leaves(out):
                if isinstance(t, Tensor):
                    roles[id(t)] = role
                    alive.append(t)
            if subject.kind not in ("constant", "random"):
                found.append((subject, operator_name(func)))
            return out

    with torch.no_grad(), Recorder():
        function(x)
    return tuple(found)
