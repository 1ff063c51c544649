"""The way of the data through a function: the operators that it dispatches, and which values each reads and makes."""

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
class Step:
    """One operator on the data's way: what it computes, its name, and the values that go in and come out, by number."""

    subject: OpInfo
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def sums(self) -> bool:
        """Whether it adds two values, so that one of them is the sum less the other."""
        return self.subject.kind == "merge" and self.name in ("aten::add", "aten::sub") and len(set(self.inputs)) == 2

    @property
    def repeats(self) -> bool:
        """Whether it gives the same outputs for the same inputs: nothing is drawn."""
        return self.subject.kind not in ("dropout", "unknown") and not self.subject.facts.get("noise")

    def told_by(self, known: set[int]) -> bool:
        """Whether what it computes lies in the known values: all parts of a rearrangement, or the first of its outputs
        (the others are statistics, its residue); of an operator that nobody knows, any."""
        if self.subject.kind == "unknown":
            return not known.isdisjoint(self.outputs)
        whole = self.subject.kind in ("reshape", "sorting")
        return known.issuperset(self.outputs if whole else self.outputs[:1])


@dataclass(frozen=True)
class Flow:
    """The operators that a function runs on its input, value 0, in order, and the numbers of the values it returns.

    `fewer`: it returns fewer numbers than it takes.
    """

    steps: tuple[Step, ...]
    returned: frozenset[int]
    fewer: bool

    @property
    def reads(self) -> bool:
        """Whether any operator reads the input itself, and not its shape alone."""
        return any(0 in step.inputs for step in self.steps)

    def kept(self, undone: Callable[[Step], bool]) -> tuple[bool, list[Step]]:
        """Whether the input comes back from what is returned by undoing steps for which `undone` holds; and those.

        A sum gives back one part where the other is known, and what is known can be computed with: so a coupling
        (a, b + f(a)) comes back whatever f is.
        """
        known, used = set(self.returned), []
        before = -1
        while len(known) > before:
            before = len(known)
            for step in reversed(self.steps):
                if step.told_by(known) and not known.issuperset(step.inputs) and undone(step):
                    known.update(step.inputs)
                    used.append(step)
                elif step.sums and known.issuperset(step.outputs) and not known.isdisjoint(step.inputs):
                    known.update(step.inputs)
            for step in self.steps:
                if step.inputs and known.issuperset(step.inputs) and step.repeats:
                    known.update(step.outputs)
        return 0 in known, used


def dispatched(function: Callable[[Tensor], Any], x: Tensor) -> Flow:
    """Every operator on the data's way through `function(x)`.

    What writes into a tensor that others look into as well (a slice of a buffer) is "unknown": its readers change too.
    ValueError if it takes a number out of the data, as what it does next may depend on it.
    """
    steps: list[Step] = []
    number: dict[int, int] = {id(x): 0}  # tensor -> value that it holds now
    roles: dict[int, Role] = {storage_key(x): Role.DATA}
    alive: list[Any] = [x]  # a freed tensor's id, or a freed storage's address, would be used again
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
                steps.append(Step(subject, operator_name(func), data, tuple(number[id(t)] for t in outs)))
            return out

    with torch.no_grad(), DataflowRecorder():
        out = function(x)
    tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    told = {id(t): t for t in tensors if id(t) in number}
    fewer = sum(t.numel() for t in told.values()) < x.numel()
    return Flow(tuple(steps), frozenset(number[i] for i in told), fewer)
