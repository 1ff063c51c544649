"""Cases of functions: activations, softmax, dropout, pooling, losses, routers, recurrent cells and composites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from bwsk.classification.cases.make import F64, erases, from_module, normal, preserves
from bwsk.classification.witness import Residue, WitnessCase, run

# --- functions of single elements ------------------------------------------------------------------------------------


def _twice(low: float, turn: float, high: float) -> Callable[[Any, Generator], tuple[Tensor, Tensor]]:
    """Two arguments with one value, for a function that falls on [low, turn] and rises on [turn, high]: bisection."""

    def pair(f: Any, g: Generator) -> tuple[Tensor, Tensor]:
        for left in torch.linspace(low, turn - 0.2, 4001, dtype=F64):
            value = f(left[None])
            a, b = torch.tensor([turn], dtype=F64), torch.tensor([high], dtype=F64)
            for _ in range(80):
                middle = (a + b) / 2
                a, b = (middle, b) if f(middle) < value else (a, middle)
            for candidate in (a, b):
                if torch.equal(f(candidate), value):
                    return left[None], candidate
        raise AssertionError("no such pair found")

    return pair


def _undo_by_branch(turn: float) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """Bisection on the branch that the residue names (True: right of the turning point)."""

    def invert(f: Any, y: Tensor, right: Tensor) -> Tensor:
        low = torch.where(right, turn, -8.0).to(F64)
        high = torch.where(right, 8.0, turn).to(F64)
        for _ in range(80):
            middle = (low + high) / 2
            up = (f(middle) < y) == right  # f rises on the right branch and falls on the left one
            low, high = torch.where(up, middle, low), torch.where(up, high, middle)
        return (low + high) / 2

    return invert


def _two(a: float, b: float) -> Callable[[Any, Generator], tuple[Tensor, Tensor]]:
    return lambda f, g: (torch.tensor([a, 1.5], dtype=F64), torch.tensor([b, 1.5], dtype=F64))


def _one_branch_bit(name: str, build: Callable[[], nn.Module], turn: float) -> WitnessCase:
    return WitnessCase(
        name,
        from_module(build),
        sample=normal(4, 9),
        pair=_twice(-5.0, turn, 1.0),
        invert=_undo_by_branch(turn),
        keep=lambda f, x: x > turn,
        residue=Residue.BIT,
        bound=1e-6,
    )


ELEMENTWISE = (
    preserves("identity", nn.Identity, (3, 4), lambda f, y, _: y, bound=0.0),
    preserves("flatten", nn.Flatten, (2, 3, 4), lambda f, y, _: y.reshape(2, 3, 4), bound=0.0),
    preserves(
        "pixel shuffle", lambda: nn.PixelShuffle(2), (1, 4, 3, 3), lambda f, y, _: F.pixel_unshuffle(y, 2), bound=0.0
    ),
    preserves("leaky relu", lambda: nn.LeakyReLU(0.1), (4, 9), lambda f, y, _: torch.where(y < 0, y / 0.1, y)),
    preserves("softplus", nn.Softplus, (4, 9), lambda f, y, _: torch.log(torch.expm1(y)), bound=1e-6),
    preserves("elu", nn.ELU, (4, 9), lambda f, y, _: torch.where(y < 0, torch.log1p(y), y), bound=1e-6),
    preserves("tanh", nn.Tanh, (4, 9), lambda f, y, _: torch.atanh(y), bound=1e-6),
    preserves("sigmoid", nn.Sigmoid, (4, 9), lambda f, y, _: torch.logit(y), bound=1e-6),
    erases("relu", nn.ReLU, _two(-1.0, -2.0)),
    erases("relu6", nn.ReLU6, _two(7.0, 8.0)),
    erases("hard swish", nn.Hardswish, _two(-4.0, -5.0)),
    _one_branch_bit("gelu", nn.GELU, -0.7517915),
    _one_branch_bit("gelu, tanh form", lambda: nn.GELU("tanh"), -0.7524614),
    _one_branch_bit("silu", nn.SiLU, -1.2784645),
)


def _saturated(low: float, high: float) -> Callable[[Any, Generator], tuple[Tensor, Tensor]]:
    return lambda f, g: (torch.tensor([low]), torch.tensor([high]))


TANH_PLATEAU = WitnessCase(
    "tanh in float32 at 20 and 21",
    lambda g: nn.Tanh(),
    pair=_saturated(20, 21),
    residue=Residue.EVERYTHING,
    saturates=True,
)
SIGMOID_PLATEAU = WitnessCase(
    "sigmoid in float32 at 30 and 31",
    lambda g: nn.Sigmoid(),
    pair=_saturated(30, 31),
    residue=Residue.EVERYTHING,
    saturates=True,
)


# --- mixing and choosing ---------------------------------------------------------------------------------------------


def _dropped_pair(m: nn.Module, g: Generator) -> tuple[Tensor, Tensor]:
    a = torch.randn(64, generator=g, dtype=F64)
    b = a.clone()
    b[run(m, torch.ones(64, dtype=F64))[0] == 0] += 1  # what this mask drops anyway
    return a, b


class _TopK(nn.Module):
    """A router: logits, then the two best experts with their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.topk(F.linear(x, self.weight), 2, dim=-1)


def _unrouted(m: Any, g: Generator) -> tuple[Tensor, Tensor]:
    m.weight.data = torch.eye(4, dtype=F64)
    return torch.tensor([[3.0, 2, 0, 0]], dtype=F64), torch.tensor([[3.0, 2, 1, 0]], dtype=F64)


class _Gate(nn.Module):
    """A composite that erases: maximum over pairs of neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x[..., 1:], x[..., :-1])


class _Whitening(nn.Module):
    """A composite that preserves: exponential, then reversed order."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.flip(torch.exp(x), (-1,))


class _Half(nn.Module):
    """A composite of operators that each preserve, which gives out one half of what it has."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(x.chunk(2, -1)[0])


class _AllAndHalf(nn.Module):
    """A composite with an operator that erases, beside a way that does not: (x, max(x, 0))."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.relu(x)], -1)


class _Coupling(nn.Module):
    """A composite that adds, and gives out what it added: (a, b + tanh a)."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a, b + torch.tanh(a)], -1)


class _Noise(nn.Module):
    """A composite that keeps all but what was drawn."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + torch.randn_like(x)).flip(-1)


def _undo_noise(m: Any, y: Tensor, state: Tensor) -> Tensor:
    generator = torch.Generator()
    generator.set_state(state)
    return y.flip(-1) - torch.randn(y.shape, generator=generator, dtype=F64)


class _SoftmaxScale(nn.Module):
    """A composite that keeps all but a scalar per row."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.flip(torch.softmax(x, -1), (0,)) * 2


def _rnn(weight: Tensor) -> Callable[[Generator], nn.Module]:
    def make(g: Generator) -> nn.Module:
        cell = from_module(lambda: nn.RNNCell(2, 2))(g)
        cell.weight_ih.data = weight
        return cell

    return make


def _undo_rnn(m: Any, y: Tensor, _: Any) -> Tensor:
    return torch.linalg.solve(m.weight_ih, (torch.atanh(y) - m.bias_ih - m.bias_hh).mT).mT


SOFTMAX = (
    preserves(
        "softmax",
        lambda: nn.Softmax(-1),
        (3, 8),
        lambda f, y, k: y.log() + k,
        keep=lambda f, x: x.logsumexp(-1, keepdim=True),
        residue=Residue.ROW,
    ),
    preserves(
        "log softmax",
        lambda: nn.LogSoftmax(-1),
        (3, 8),
        lambda f, y, k: y + k,
        keep=lambda f, x: x.logsumexp(-1, keepdim=True),
        residue=Residue.ROW,
    ),
)
# The publication's "softmax erases": it does not notice an offset of the row.
SOFTMAX_OFFSET = erases(
    "softmax, offset",
    lambda: nn.Softmax(-1),
    lambda f, g: (torch.tensor([[1.0, 2, 3]], dtype=F64), torch.tensor([[3.0, 4, 5]], dtype=F64)),
)

MIXING = (
    erases("dropout in training", lambda: nn.Dropout(0.25), _dropped_pair),
    preserves("dropout in eval", lambda: nn.Dropout(0.25).eval(), (3, 4), lambda f, y, _: y, bound=0.0),
    preserves("dropout with p = 0", lambda: nn.Dropout(0.0), (3, 4), lambda f, y, _: y, bound=0.0),
    erases(
        "max pooling",
        lambda: nn.MaxPool1d(2),
        lambda f, g: (torch.tensor([[1.0, 3]], dtype=F64), torch.tensor([[2.0, 3]], dtype=F64)),
    ),
    erases(
        "mean pooling",
        lambda: nn.AdaptiveAvgPool1d(1),
        lambda f, g: (torch.tensor([[1.0, 3]], dtype=F64), torch.tensor([[2.0, 2]], dtype=F64)),
    ),
    preserves(
        "running mean of 3, length 4",
        lambda: nn.AvgPool1d(3, 1, 1),
        (2, 1, 4),
        lambda f, y, _: torch.linalg.solve(f(torch.eye(4, dtype=F64)[:, None])[:, 0].T, y.mT).mT,
    ),
    erases(
        "running mean of 3, length 5",
        lambda: nn.AvgPool1d(3, 1, 1),
        lambda f, g: (
            torch.zeros(1, 1, 5, dtype=F64),
            torch.tensor([[[1.0, -1, 0, 1, -1]]], dtype=F64),
        ),
    ),
    erases(
        "nearest downsampling",
        lambda: nn.Upsample(scale_factor=0.5),
        lambda f, g: (torch.tensor([[[1.0, 3]]], dtype=F64), torch.tensor([[[1.0, 4]]], dtype=F64)),
    ),
    preserves(
        "nearest upsampling", lambda: nn.Upsample(scale_factor=2), (1, 2, 4), lambda f, y, _: y[..., ::2], bound=0.0
    ),
    erases(
        "squared error",
        nn.MSELoss,
        lambda f, g: (
            (torch.tensor([1.0], dtype=F64), torch.tensor([2.0], dtype=F64)),
            (torch.tensor([3.0], dtype=F64), torch.tensor([2.0], dtype=F64)),
        ),
    ),
    erases("top-2 router", _TopK, _unrouted),
    erases(
        "composite with a maximum",
        _Gate,
        lambda f, g: (torch.tensor([[1.0, 3, 2]], dtype=F64), torch.tensor([[2.0, 3, 1]], dtype=F64)),
    ),
    preserves("composite of exponential and flip", _Whitening, (3, 8), lambda f, y, _: y.flip(-1).log(), bound=1e-9),
    preserves(
        "additive coupling",
        _Coupling,
        (3, 8),
        lambda f, y, _: torch.cat([y[:, :4], y[:, 4:] - torch.tanh(y[:, :4])], -1),
        bound=1e-12,
    ),
    preserves("composite of all and half", _AllAndHalf, (3, 8), lambda f, y, _: y[:, :8], bound=0.0),
    preserves(
        "composite of noise and flip",
        _Noise,
        (3, 8),
        _undo_noise,
        keep=lambda f, x: torch.Generator().manual_seed(7).get_state(),  # as `run` starts it
        residue=Residue.RNG,
    ),
    preserves(
        "composite of softmax and scale",
        _SoftmaxScale,
        (3, 8),
        lambda f, y, k: (y / 2).flip(0).log() + k,
        keep=lambda f, x: x.logsumexp(-1, keepdim=True),
        residue=Residue.ROW,
    ),
    erases(
        "composite that drops half",
        _Half,
        lambda f, g: (torch.tensor([[1.0, 2]], dtype=F64), torch.tensor([[1.0, 3]], dtype=F64)),
    ),
)
RECURRENT = (
    WitnessCase(
        "recurrent cell, full rank",
        _rnn(torch.tensor([[1.0, 0.5], [-0.5, 1.0]], dtype=F64)),
        sample=normal(3, 2),
        invert=_undo_rnn,
        bound=1e-6,
    ),
    WitnessCase(
        "recurrent cell, rank one",
        _rnn(torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=F64)),
        residue=Residue.EVERYTHING,
        pair=lambda f, g: (torch.tensor([[1.0, 2]], dtype=F64), torch.tensor([[2.0, 1]], dtype=F64)),
    ),
)

FUNCTIONS: tuple[WitnessCase, ...] = (*ELEMENTWISE, *SOFTMAX, *MIXING, *RECURRENT)
