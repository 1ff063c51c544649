"""Run a module on a few numbers, with small random stand-ins for its parameters (for `probe`)."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_MACHINERY = frozenset(vars(nn.Module())) - {"training"}
_Module = TypeVar("_Module", bound=nn.Module)


def probe_key(module: nn.Module) -> Any:
    """What a module's output can depend on: class, shapes, settings, and which functions and configs it holds."""
    state = tuple((n, tuple(t.shape)) for n, t in [*module.named_parameters(), *module.named_buffers()])
    plain = (bool, int, float, str, tuple, type(None))
    own = sorted(
        (k, repr(v) if isinstance(v, plain) else id(v)) for k, v in vars(module).items() if k not in _MACHINERY
    )
    return type(module), state, tuple(own)


class Probe:
    """A module with random stand-ins for its parameters, called on inputs of one precision."""

    def __init__(self, module: nn.Module, *, meta: bool = False, dtype: torch.dtype = torch.float64) -> None:
        """With `meta` its tensors are on the meta device and have shapes only."""
        self.module = module
        self.device = "meta" if meta else "cpu"
        self.dtype = dtype
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.state = {n: self._stand_in(t) for n, t in state.items()}
        # Possible widths of its input: features of a matrix, channels of a kernel.
        shapes = [t.shape for t in self.state.values() if t.dim()]
        self.widths = list(dict.fromkeys(d for s in shapes for d in (s[-1], s[0], s[min(1, len(s) - 1)])))

    def _stand_in(self, t: Tensor) -> Tensor:
        # Positive, so that a slope or a scale does not flip a sign; integers are zero.
        if t.is_floating_point() or t.is_complex():
            return torch.rand(t.shape, dtype=self.dtype, device=self.device) + 0.5
        return torch.zeros(t.shape, dtype=t.dtype, device=self.device)

    def __call__(self, *inputs: Any) -> Any:
        # A new copy each time: state that one call leaves for the next must not pass for what the module computes.
        return torch.func.functional_call(_detached(self.module), self.state, inputs)


def _detached(module: _Module) -> _Module:
    """A copy without hooks, with the same parameters: a forward may count its calls, or store the probe's mask."""
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, (dict, list, set)):
            vars(twin)[name] = type(value)() if name.endswith("_hooks") else copy.copy(value)
    return twin


def narrow(module: nn.Embedding) -> nn.Embedding:
    """The same table with rows of at most eight numbers: which row is looked up does not depend on its length."""
    twin = _detached(module)
    width = min(8, module.embedding_dim)
    twin._parameters = {
        n: None if p is None else nn.Parameter(p[..., :width] if p.shape[-1:] == (module.embedding_dim,) else p)
        for n, p in module._parameters.items()
    }
    twin.embedding_dim = width
    return twin


def is_real(value: Any) -> bool:
    """Whether it is a floating point or complex tensor."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
