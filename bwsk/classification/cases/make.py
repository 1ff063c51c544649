"""How cases are made: small real layers in double precision, with their evidence.

They use double precision, so that what is not recovered was erased and not rounded away. The cases themselves are in
`layers` (linear maps, convolutions, norms), `functions` (activations, softmax, dropout, pooling)
and `operators` (single operators). See `bwsk.classification.witness` for what counts as evidence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from bwsk.classification.witness import Residue, WitnessCase, fixed_draws

F64 = torch.float64


def _fill(module: nn.Module, g: Generator) -> nn.Module:
    """Well-conditioned random parameters: norms' scales away from zero, everything else normal."""
    module = module.to(F64)
    for parameter in module.parameters():
        if parameter.dim() < 2:
            parameter.data = torch.rand(parameter.shape, generator=g, dtype=F64) + 0.5
        else:
            parameter.data = torch.randn(parameter.shape, generator=g, dtype=F64)
    return module


def from_module(build: Callable[[], nn.Module]) -> Callable[[Generator], nn.Module]:
    """A maker of the module of `build`, in double precision with parameters drawn from the generator."""

    def make(g: Generator) -> nn.Module:
        with fixed_draws():  # torch's own initialisation draws from the global generator
            return _fill(build(), g)

    return make


def normal(*shape: int) -> Callable[[Generator], Tensor]:
    """A sampler of standard normal inputs of `shape`."""
    return lambda g: torch.randn(shape, generator=g, dtype=F64)


def preserves(
    name: str, build: Any, shape: tuple[int, ...], invert: Any, *, bound: float = 1e-9, **more: Any
) -> WitnessCase:
    """Evidence for S: a module and the inverse of what it does."""
    return WitnessCase(name, from_module(build), sample=normal(*shape), invert=invert, bound=bound, **more)


def erases(name: str, build: Any, pair: Any, **more: Any) -> WitnessCase:
    """Evidence for K: a module and two inputs that it maps to one output."""
    return WitnessCase(name, from_module(build), pair=pair, residue=more.pop("residue", Residue.EVERYTHING), **more)
