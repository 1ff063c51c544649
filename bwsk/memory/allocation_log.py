"""Log what a training step allocates, storage by storage, on tensors that have no memory.

The step runs for real (model, autograd, engine) under PyTorch's `FakeTensorMode`: shapes and lifetimes are real, values
do not exist. A dispatch mode notes each new storage and a weak reference notes when it is freed. The log is replayed
afterwards, when it is known which storages became gradients. Sizes are rounded up to 512 bytes, as in CUDA's caching
allocator. What operators allocate internally (cuBLAS workspaces, sort scratch) is not counted.

The tensors are on "cpu" because a CPU build of PyTorch cannot run autograd on anything else. The module `cuda_rules`
replaces operators whose memory use on the CPU differs from CUDA's.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bwsk._compat import TorchDispatchMode, flop_registry, storage_key, tree_iter

ROUND = 512
_OUT_OF_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm}


@dataclass
class Log:
    """Allocations (positive) and releases (negative) in order, and where each phase begins.

    A storage can have zero bytes, so `born` and `died` say when it lived, not the sign of an event.
    """

    events: list[tuple[int, int]] = field(default_factory=list)  # (storage number, bytes)
    marks: list[tuple[str, int]] = field(default_factory=list)  # (phase, index of its first event)
    sizes: dict[int, int] = field(default_factory=dict)
    born: dict[int, int] = field(default_factory=dict)  # storage number: index of the event
    died: dict[int, int] = field(default_factory=dict)


class Tracker(TorchDispatchMode):
    """A dispatch mode that logs every storage that an operator returns, and its release."""

    def __init__(self) -> None:
        super().__init__()
        self.log = Log()
        self._alive: dict[int, tuple[weakref.ref, int]] = {}
        self._count = 0
        self.flops = 0

    def number(self, tensor: Tensor) -> int | None:
        """The number under which the storage of `tensor` is known, or None."""
        entry = self._alive.get(storage_key(tensor))
        return entry[1] if entry else None

    def adopt(self, tensor: Tensor) -> int:
        """Log the storage of `tensor`, if it is new; returns its number."""
        storage = tensor.untyped_storage()
        key = storage_key(tensor)
        if key in self._alive:
            return self._alive[key][1]
        size = -(-storage.nbytes() // ROUND) * ROUND
        self._count += 1
        number = self._count

        def ended(_: weakref.ref) -> None:
            if self._alive.pop(key, None) is not None:
                self.log.died[number] = len(self.log.events)
                self.log.events.append((number, -size))

        self._alive[key] = (weakref.ref(storage, ended), number)
        self.log.sizes[number] = size
        self.log.born[number] = len(self.log.events)
        self.log.events.append((number, size))
        return number

    def stop(self) -> None:
        """Log no more releases."""
        self._alive = {}

    def mark(self, phase: str) -> None:
        """Begin a phase of the step."""
        self.log.marks.append((phase, len(self.log.events)))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func.overloadpacket
        formula = flop_registry.get(packet) or flop_registry.get(_OUT_OF_PLACE.get(packet))
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for item in (result,) if isinstance(result, Tensor) else tree_iter(result):
            if isinstance(item, Tensor):
                self.adopt(item)
        return result
