"""Dispatch modes that record every operator of one training step.

`Recorder` covers the forward pass: kind, module path, FLOPs and bytes of each operator, where its activations come
from, and which storages autograd saves for backward. `BackwardTotals` counts the operators of the backward pass.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bwsk._compat import (
    TorchDispatchMode,
    WeakIdKeyDictionary,
    is_view,
    mutates,
    native_dropout,
    operator_name,
    storage_key,
    tree_leaves,
)
from bwsk.classification.operators import OpInfo, Role, identify_call, output_role, packet_name
from bwsk.classification.rules.rule import RuleSet
from bwsk.classification.rules.sets import rule_set

_NO_FLOPS = frozenset(
    {"reshape", "identity", "constant", "random", "selection", "widening_cast", "narrowing_cast", "embedding"}
)
_PER_INPUT = frozenset(
    {"reduction", "pooling", "loss", "routing", "softmax", "layer_norm", "rms_norm", "group_norm", "batch_norm"}
)


@dataclass(frozen=True)
class Operation:
    """One dispatched operator. `inputs` are the operations that its activations come from, with the bytes it takes."""

    index: int
    operator: str
    kind: str
    verdict: str
    strict: str
    published: str | None  # None: the publication does not mention this kind
    residue: str | None
    reason: str
    module: str
    on_data: bool
    flops: int
    bytes: int
    out_bytes: int
    saved_bytes: int
    inputs: tuple[tuple[int, int], ...]


class CudaDropout(TorchFunctionMode):
    """Dropout as CUDA dispatches it, one operator with a mask of bytes, instead of the CPU's four."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            bound = inspect.signature(F.dropout).bind(*args, **kwargs)
            bound.apply_defaults()
            p, training, inplace = (bound.arguments[n] for n in ("p", "training", "inplace"))
            if training and 0 < p <= 1 and not inplace:
                return native_dropout(bound.arguments["input"], p, True)[0]
        return func(*args, **kwargs)


def _flops(func: Any, args: Any, kwargs: Any, out: Any, kind: str, inputs: list[Tensor], outs: list[Tensor]) -> int:
    from bwsk._compat import flop_registry

    formula = flop_registry.get(func.overloadpacket)
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=out))
    if kind == "attention" and len(inputs) >= 3:  # fused attention without a registered formula: QK' and PV
        q, k, v = inputs[:3]
        return 2 * q.numel() * k.shape[-2] + 2 * q.shape[:-1].numel() * k.shape[-2] * v.shape[-1]
    if kind in _NO_FLOPS:
        return 0
    sizes = [t.numel() for t in (inputs if kind in _PER_INPUT else outs)]
    return max(sizes, default=0)


class BackwardTotals(TorchDispatchMode):
    """Number, FLOPs and bytes of the operators that backward dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: Counter[str] = Counter()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs, outs = _tensors((args, kwargs)), _tensors(out)
        view = is_view(func)
        flops = 0 if view else _flops(func, args, kwargs, out, "", inputs, outs)
        self.sums.update(operations=1, flops=flops, bytes=0 if view else sum(t.nbytes for t in inputs + outs))
        self.names[operator_name(func)] += 1
        return out

    def result(self) -> dict[str, Any]:
        return dict(self.sums) | {"by_operator": dict(self.names.most_common())}


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


class Recorder(TorchDispatchMode):
    """Records every operator of the forward pass, and follows where activations come from."""

    def __init__(self, rules: RuleSet) -> None:
        super().__init__()
        self.rules = rules
        self.rows: list[dict[str, Any]] = []
        self.path: list[str] = []
        self.made_by: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.storage_role: dict[int, Role] = {}  # all tensors on a storage see what is written into it
        self.alive: list[Any] = []  # storages (without bytes): the address of a freed one is reused
        self.writer: dict[int, int] = {}  # storage -> operation that wrote it last
        self.birth: dict[int, int] = {}  # storage -> operation that allocated it
        self.saved: dict[int, set[int]] = {}  # operation -> storages already counted as saved

    def start(self, inputs: list[Tensor]) -> None:
        """Mark the batch as data; parameters, buffers and all other tensors are fixed."""
        for t in inputs:
            self.storage_role[storage_key(t)] = Role.DATA

    @contextmanager
    def paths(self, model: nn.Module) -> Iterator[None]:
        """Track the path of the module that is running."""

        def enter(name: str) -> Callable[..., None]:
            return lambda module, args: self.path.append(name)

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self.path.pop()

        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def saving(self) -> Any:
        """Count the storages that autograd saves for backward."""

        def pack(t: Tensor) -> Tensor:
            key = storage_key(t)
            if key in self.birth:  # not parameters or the batch, which no operation allocated
                born = self.birth[key]
                if key not in self.saved.setdefault(born, set()):
                    self.saved[born].add(key)
                    self.rows[born]["saved_bytes"] += t.untyped_storage().nbytes()
            return t

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)

    def _role(self, t: Tensor) -> Role:
        return self.storage_role.get(storage_key(t), Role.FIXED)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if operator_name(func).startswith("prim::"):  # a query about a tensor, such as its device
            return func(*args, **kwargs)
        inputs = _tensors((args, kwargs))
        roles = [self._role(t) for t in inputs]
        known = {id(t): role for t, role in zip(inputs, roles, strict=True)}
        sources = self._sources(inputs, roles)
        keys = {storage_key(t) for t in inputs}
        out = func(*args, **kwargs)
        outs = _tensors(out)
        if packet_name(func) in ("detach", "alias", "lift_fresh"):  # autograd's own bookkeeping: the same tensor
            self._follow(outs, max(roles, default=Role.FIXED), sources[0][0] if sources else None, keys)
            return out
        subject = identify_call(func, args, kwargs, out, lambda t: known.get(id(t), Role.FIXED))
        role = output_role(subject, packet_name(func), roles)
        view = is_view(func) or (bool(outs) and all(storage_key(t) in keys for t in outs) and not mutates(func))
        index = len(self.rows)
        self.rows.append({
            "index": index,
            "operator": operator_name(func),
            "subject": subject,
            "module": self.path[-1] if self.path else "",
            "on_data": Role.DATA in roles and subject.kind not in ("constant", "random"),
            "flops": 0 if view else _flops(func, args, kwargs, out, subject.kind, inputs, outs),
            "bytes": 0 if view else sum(t.nbytes for t in inputs + outs),
            "out_bytes": sum(t.nbytes for t in outs),
            "saved_bytes": 0,
            "inputs": tuple(sources),
        })  # fmt: skip
        self._follow(outs, role, index, keys, writes=mutates(func))
        return out

    def _sources(self, inputs: list[Tensor], roles: list[Role]) -> list[tuple[int, int]]:
        """Operations that the data inputs come from, with their bytes; the batch itself has no source."""
        found: dict[int, int] = {}
        for t, role in zip(inputs, roles, strict=True):
            if role is Role.FIXED:
                continue
            # The later of the two: a tensor made before a write into its storage depends on that write.
            made = max(self.made_by.get(t, -1), self.writer.get(storage_key(t), -1))
            if made >= 0:
                found[made] = max(found.get(made, 0), t.nbytes)
        return sorted(found.items())

    def _follow(
        self, outs: list[Tensor], role: Role, index: int | None, input_keys: set[int], *, writes: bool = False
    ) -> None:
        for t in outs:
            key = storage_key(t)
            if key not in input_keys:
                self.alive.append(t.untyped_storage())
                self.storage_role[key] = role
                if index is not None:
                    self.birth[key] = self.writer[key] = index
                else:
                    self.birth.pop(key, None)
                    self.writer.pop(key, None)
            else:
                self.storage_role[key] = max(role, self._role(t))  # data written in place into what was a constant
                if writes and index is not None:
                    self.writer[key] = index
            if index is not None:
                self.made_by[t] = index

    def finish(self) -> tuple[Operation, ...]:
        """The operations with their verdicts. Called when no mode is active, because rules run their witnesses."""
        decided: dict[Any, dict[str, Any]] = {}
        operations = []
        for row in self.rows:
            subject: OpInfo = row.pop("subject")
            key = (subject.kind, row["operator"], tuple(sorted((k, str(v)) for k, v in subject.facts.items())))
            if key not in decided:
                decided[key] = _verdicts(self.rules, subject, row["operator"])
            operations.append(Operation(kind=subject.kind, **row, **decided[key]))
        return tuple(operations)


def _verdicts(rules: RuleSet, subject: OpInfo, operator: str) -> dict[str, Any]:
    """The verdict of the chosen rules, or else of the strict ones, and those of both built-in sets."""
    strict, published = (rule_set(name).decide(subject, operator) for name in ("strict", "published"))
    rule = rules.decide(subject, operator) or strict
    return {
        "verdict": str(rule.verdict) if rule else "GRAY",
        "strict": str(strict.verdict) if strict else "GRAY",
        "published": str(published.verdict) if published else None,
        "residue": str(rule.residue) if rule else None,
        "reason": rule.reason if rule else "no rule for this operator",
    }
