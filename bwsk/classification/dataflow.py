"""Dataflow graph of a function: the ATen operators that it dispatches, with the values each one reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bwsk._compat import TorchDispatchMode, mutates, operator_name, storage_key, tree_leaves
from bwsk.classification import operator_names as names
from bwsk.classification.operators import OpInfo, Role, identify_call, output_role, packet_name


@dataclass(frozen=True, eq=False)
class OperatorCall:
    """One node of the graph: what the operator computes, its name, and its input and output values, by number."""

    subject: OpInfo
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def sums(self) -> bool:
        """Whether it adds or subtracts two values, so that either follows from the result and the other."""
        return self.subject.kind == "merge" and self.name in ("aten::add", "aten::sub") and len(set(self.inputs)) == 2

    @property
    def deterministic(self) -> bool:
        """Whether the same inputs give the same outputs, because nothing is drawn at random."""
        return self.subject.kind not in ("dropout", "unknown") and not self.subject.facts.get("noise")

    def output_in(self, known: set[int]) -> bool:
        """Whether its result is among the known values.

        Of a rearrangement that takes all parts, of other operators the first output (the rest are statistics, its
        residue), and of an unknown operator any output.
        """
        if self.subject.kind == "unknown":
            return not known.isdisjoint(self.outputs)
        whole = self.subject.kind in ("reshape", "sorting")
        return known.issuperset(self.outputs if whole else self.outputs[:1])


@dataclass(frozen=True)
class Flow:
    """The operators that a function runs on its input, value 0, in order, and which values it returns.

    `fewer`: its output has fewer elements than its input.
    """

    calls: tuple[OperatorCall, ...]
    returned: frozenset[int]
    fewer: bool

    @property
    def reads(self) -> bool:
        """Whether any operator reads the input itself, and not only its shape."""
        return any(0 in call.inputs for call in self.calls)

    def recovers(self, invertible: Callable[[OperatorCall], bool]) -> tuple[bool, list[OperatorCall]]:
        """Whether the input can be recovered from the output by inverting `invertible` calls, and the calls inverted.

        One part of a sum is recovered where the other is known, and known values can be computed with. So a coupling
        (a, b + f(a)) is recovered whatever f is.
        """
        known, used = set(self.returned), []
        before = -1
        while len(known) > before:
            before = len(known)
            for call in reversed(self.calls):
                if call.output_in(known) and not known.issuperset(call.inputs) and invertible(call):
                    known.update(call.inputs)
                    used.append(call)
                elif call.sums and known.issuperset(call.outputs) and not known.isdisjoint(call.inputs):
                    known.update(call.inputs)
            for call in self.calls:
                if call.inputs and known.issuperset(call.inputs) and call.deterministic:
                    known.update(call.outputs)
        return 0 in known, used


def dispatched(function: Callable[[Tensor], Any], x: Tensor) -> Flow:
    """Every operator that data goes through in `function(x)`.

    A write into a tensor whose storage other tensors share (a slice of a buffer) is "unknown", because it changes those
    too. Raises ValueError if the function reads a number out of the data, on which its control flow may depend.
    """
    calls: list[OperatorCall] = []
    number: dict[int, int] = {id(x): 0}  # tensor -> value that it holds now
    roles: dict[int, Role] = {storage_key(x): Role.DATA}
    alive: list[Any] = [x]  # ids of freed tensors and addresses of freed storages are reused
    count = 0

    class DataflowRecorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal count
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            before = {id(t): roles.get(storage_key(t), Role.FIXED) for t in inputs}
            if packet_name(func) in names.TO_PYTHON and Role.DATA in before.values():
                raise ValueError(f"{operator_name(func)} of data")
            out = func(*args, **(kwargs or {}))
            subject = identify_call(func, args, kwargs or {}, out, lambda t: before.get(id(t), Role.FIXED))
            role = output_role(subject, packet_name(func), before.values())
            outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            data = tuple(number[id(t)] for t in inputs if before[id(t)] is Role.DATA and id(t) in number)
            for t in outs:
                count += 1
                number[id(t)] = count
                roles[storage_key(t)] = max(role, roles.get(storage_key(t), Role.FIXED))
                others = [u for u in alive if storage_key(u) == storage_key(t) and u is not t]
                if mutates(func) and id(t) in before and others:
                    subject = OpInfo("unknown", {"class": operator_name(func)})
                    number.update((id(u), count) for u in others)
                alive.append(t)
            if subject.kind not in ("constant", "random"):
                calls.append(OperatorCall(subject, operator_name(func), data, tuple(number[id(t)] for t in outs)))
            return out

    with torch.no_grad(), DataflowRecorder():
        out = function(x)
    tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    returned = {id(t): t for t in tensors if id(t) in number}
    fewer = sum(t.numel() for t in returned.values()) < x.numel()
    return Flow(tuple(calls), frozenset(number[i] for i in returned), fewer)
