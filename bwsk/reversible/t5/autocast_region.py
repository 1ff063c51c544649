"""Two uses of a sublayer in one autocast region, with a joint backward: refused where the engine ran one of them.

Within an autocast region stock casts a weight once, however often it is used. The gradients of all uses are added in
the half precision of that copy and cast to float32 afterwards. The engine has no copy: each use casts its own gradient
and the sum is made in float32, which is another rounding. Uses in regions of their own, and backward passes of their
own, have stock's bits. Which region a forward ran in, and which backward its gradient came from, is known only then.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bwsk._compat import FakeTensor, current_backward
from bwsk.errors import BwskError
from bwsk.reversible.t5.linear import autocast_dtype

# Of each sublayer, its latest use that a gradient has reached: (backward, region, whether the engine ran it).
_latest: WeakKeyDictionary[nn.Module, tuple[int, Any, bool]] = WeakKeyDictionary()


@cache
def _probe(device: torch.device) -> nn.Parameter:
    """A weight without elements, so that casting and multiplying it starts no kernel."""
    return nn.Parameter(torch.empty(0, 0, device=device))


def _region(device: torch.device) -> Any:
    """The node of the cast of a weight: one and the same within an autocast region, as for every weight there."""
    probe = _probe(device)
    node: Any = torch.mm(probe, probe).grad_fn
    return node.next_functions[0][0]


def watch_uses(sublayers: Iterable[nn.Module], y: Tensor, engine: bool) -> None:
    """Have the backward of `y`, the output of these sublayers, raise `BwskError` at a second use of them.

    That is, one in the same autocast region and the same backward, if the engine ran either of the two. `engine`:
    whether it ran this one.
    """
    if y.grad_fn is None or autocast_dtype(y) is None or isinstance(y, FakeTensor):
        return
    region = _region(y.device)

    def arrived(_: Any) -> None:
        backward = current_backward()
        for sublayer in sublayers:
            before = _latest.get(sublayer)
            if before is not None and before[0] == backward and before[1] is region and (engine or before[2]):
                _refuse(sublayer)
            _latest[sublayer] = (backward, region, engine)

    y.grad_fn.register_prehook(arrived)


def _refuse(sublayer: nn.Module) -> None:
    """Raise `BwskError`, unless the sublayer has no weight that is cast and gets a gradient."""
    if any(p.requires_grad and p.dim() == 2 and p.dtype is torch.float32 for p in sublayer.parameters()):
        raise BwskError(
            f"make_reversible: a {type(sublayer).__name__} ran twice within one autocast region before their joint "
            "backward, where stock adds gradients in half precision; give each forward a region or a backward of its "
            "own, or call bwsk.undo(model)"
        )
