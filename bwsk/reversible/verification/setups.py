"""Set-ups of a training step, by name: the stock model, the framework's checkpointing, a budget, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bwsk._compat import enable_checkpointing
from bwsk.errors import BwskError
from bwsk.reversible.budget import parse_budget
from bwsk.reversible.handle import make_reversible
from bwsk.units import Precision

# A name, a budget, or a function that gets a model and changes it in place or returns the module to call.
Setup = str | float | Callable[[Any], Any]
Shape = tuple[int, int, int | None]


def _checkpointed(model: Any, use_reentrant: bool) -> nn.Module:
    try:
        enable_checkpointing(model, use_reentrant=use_reentrant)
    except (AttributeError, ValueError, NotImplementedError):  # no transformers model, or one without it
        raise BwskError(
            f"checkpoint: {type(model).__name__} has no gradient checkpointing of its own; "
            "give a function that sets it up"
        ) from None
    return model


def _compiled(model: nn.Module) -> Any:
    # Without this option compiled code draws its own random numbers, and so other dropout masks.
    return torch.compile(model, options={"fallback_random": True})


_NAMED: dict[str, Callable[[Any], Any]] = {
    "stock": lambda model: model,
    "checkpoint": lambda model: _checkpointed(model, use_reentrant=False),
    "checkpoint-reentrant": lambda model: _checkpointed(model, use_reentrant=True),
    "compiled": _compiled,
}
CHECKPOINTED = ("checkpoint", "checkpoint-reentrant")


def require_setup(side: str, setup: Any) -> None:
    """Raise `BwskError` unless this is a set-up; `side` ("a" or "b") is for the message."""
    if isinstance(setup, nn.Module):
        raise BwskError(
            f"{side}: found a {type(setup).__name__}; give a function that gets a model and returns this one"
        )
    if callable(setup) or (isinstance(setup, str) and setup in _NAMED):
        return
    try:
        parse_budget(setup, lambda: 1.0)
    except BwskError:
        raise BwskError(
            f"{side}: found {setup!r}; give {', '.join(_NAMED)}, a budget (fast, balanced, max, 900MiB, 0.6) "
            "or a function that sets up a model"
        ) from None


def setup_name(setup: Setup) -> str:
    """The name of a set-up in reports."""
    return getattr(setup, "__name__", type(setup).__name__) if callable(setup) else str(setup)


def set_up(model: nn.Module, setup: Setup, shape: Shape | None, precision: Precision) -> nn.Module:
    """Set up a model in place; returns the module to call, which is the model itself unless the set-up wraps it.

    `shape` is (batch, input tokens, target tokens) of the steps to come, for budgets; None if it is not known. Raises
    `BwskError` if the model is not supported.
    """
    if callable(setup) or setup in _NAMED:
        found = setup(model) if callable(setup) else _NAMED[str(setup)](model)
        return found if isinstance(found, nn.Module) else model
    sizes: dict[str, Any] = (
        {} if shape is None else dict(zip(("batch", "input_length", "target_length"), shape, strict=True))
    )
    make_reversible(model, setup, precision=precision, verify=False, **sizes)  # its gradients are what is compared
    return model
