"""What the recomputing backward refuses, and the one check for it."""

from __future__ import annotations

import torch

from bwsk.errors import BwskError


def refuse_double_backward() -> None:
    """Raise `BwskError` when this backward is itself being recorded (`create_graph=True`)."""
    if torch.is_grad_enabled():
        raise BwskError(
            "make_reversible: backward(create_graph=True) asks for second derivatives, which recomputation does not "
            "record; call undo() on the handle before taking them"
        )
