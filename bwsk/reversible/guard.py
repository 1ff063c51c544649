"""What the recomputing backward refuses, and the checks for it."""

from __future__ import annotations

from typing import Any

import torch

from bwsk.errors import BwskError


def refuse_double_backward() -> None:
    """Raise `BwskError` if this backward is itself being recorded (`create_graph=True`)."""
    if torch.is_grad_enabled():
        raise BwskError(
            "make_reversible: backward(create_graph=True) asks for second derivatives, which recomputation does not "
            "record; call undo() on the handle before taking them"
        )


def refuse_second_backward(ctx: Any, way_out: str) -> None:
    """Raise `BwskError` if an earlier backward of this node has overwritten what it saved; `way_out`: what to do.

    PyTorch notices that by itself only if no hooks pack the saved tensors (`save_on_cpu`).
    """
    if ctx.overwritten:
        raise BwskError(f"make_reversible: a second backward through the loss (retain_graph): {way_out}")
