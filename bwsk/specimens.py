"""Specimens of module kinds: small real layers, each with the evidence that it preserves or erases.

All in double precision, so that what fails to come back was erased and not rounded away. See `bwsk.witness` for what
counts as evidence. Specimens of operators are in `bwsk.specimens_operators`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from bwsk.witness import Residue, Specimen, fixed_draws, run

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


def _module(build: Callable[[], nn.Module]) -> Callable[[Generator], nn.Module]:
    def make(g: Generator) -> nn.Module:
        with fixed_draws():  # torch's own initialisation draws from the global generator
            return _fill(build(), g)

    return make


def _normal(*shape: int) -> Callable[[Generator], Tensor]:
    return lambda g: torch.randn(shape, generator=g, dtype=F64)


def preserves(
    name: str, build: Any, shape: tuple[int, ...], invert: Any, *, bound: float = 1e-9, **more: Any
) -> Specimen:
    """Evidence for S: a module and the inverse of what it does."""
    return Specimen(name, _module(build), sample=_normal(*shape), invert=invert, bound=bound, **more)


def erases(name: str, build: Any, pair: Any, **more: Any) -> Specimen:
    """Evidence for K: a module and two inputs that it maps to one output."""
    return Specimen(name, _module(build), pair=pair, residue=more.pop("residue", Residue.EVERYTHING), **more)


# --- linear maps -----------------------------------------------------------------------------------------------------


def _solve(m: Any, y: Tensor, _: Any) -> Tensor:
    weight = m.weight if isinstance(m, nn.Linear) else m.weight.T
    return torch.linalg.lstsq(weight, (y - m.bias).mT).solution.mT


def _integer_kernel_pair(m: Any, g: Generator) -> tuple[Tensor, Tensor]:
    """Two inputs that differ by a null vector; small whole numbers throughout, so that both sums are exact."""
    rows, columns = m.weight.shape
    m.weight.data = torch.randint(-3, 4, (rows, columns), generator=g).to(F64)
    m.weight.data[:, columns - 1] = m.weight.data[:, 0]  # out < in: some columns are dependent; here the simplest way
    a = torch.randint(-3, 4, (2, columns), generator=g).to(F64)
    step = torch.zeros(columns, dtype=F64)
    step[0], step[-1] = 1, -1
    return a, a + step


class _Rotary(nn.Module):
    """Position -> (cos, sin) of position x frequency, as rotary embeddings compute them; the slowest turns once in 64."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 2 * torch.pi / torch.tensor([4.0, 16.0, 64.0], dtype=F64))

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions[..., None].to(F64) * self.inv_freq
        return angle.cos(), angle.sin()


def _decode_position(m: Any, y: tuple[Tensor, Tensor], _: Any) -> tuple[Tensor, Tensor]:
    angle = torch.atan2(y[1][..., -1], y[0][..., -1]) % (2 * torch.pi)
    return torch.zeros(1, 7, 4, dtype=F64), (angle / m.inv_freq[-1]).round().long()


def _convolution_matrix(m: nn.Module, shape: torch.Size) -> Tensor:
    """The matrix of a convolution on inputs of `shape` (C, ...): its columns are the responses to unit inputs."""
    size = shape.numel()
    return (m(torch.eye(size, dtype=F64).reshape(size, *shape)) - m(torch.zeros(1, *shape, dtype=F64))).flatten(1).T


def _deconvolve(*shape: int) -> Callable[[Any, Tensor, Any], Tensor]:
    def invert(m: Any, y: Tensor, _: Any) -> Tensor:
        matrix = _convolution_matrix(m, torch.Size(shape))
        y = (y - m(torch.zeros(1, *shape, dtype=F64))).flatten(1)
        return torch.linalg.lstsq(matrix, y.T).solution.T.reshape(-1, *shape)

    return invert


def _skipped_pixel(m: Any, g: Generator) -> tuple[Tensor, Tensor]:
    a = torch.randn(1, m.in_channels, 8, 8, generator=g, dtype=F64)
    b = a.clone()
    b[..., 1::2, 1::2] += 1  # stride 2 and kernel 1: never read
    return a, b


def _cancelling_channels(m: Any, g: Generator) -> tuple[Tensor, Tensor]:
    """Fewer outputs than inputs per position: two input channels that enter alike cancel."""
    m.weight.data = torch.randint(-2, 3, m.weight.shape, generator=g).to(F64)
    m.bias.data.zero_()
    m.weight.data[:, 1] = m.weight.data[:, 0]
    a = torch.randint(-3, 4, (1, m.in_channels, 6, 6), generator=g).to(F64)
    b = a.clone()
    b[:, 0] += 1
    b[:, 1] -= 1
    return a, b


def _valid_border(m: Any, g: Generator) -> tuple[Tensor, Tensor]:
    """Kernel (1, -1) without padding sees differences only."""
    m.weight.data = torch.tensor([[[1.0, -1.0]]], dtype=F64)
    m.bias.data.zero_()
    a = torch.randint(-3, 4, (1, 1, 6), generator=g).to(F64)
    return a, a + 2


LINEAR = (
    preserves("linear 4->4", lambda: nn.Linear(4, 4), (5, 4), _solve),
    preserves("linear 4->8", lambda: nn.Linear(4, 8), (5, 4), _solve),
    erases("linear 8->4", lambda: nn.Linear(8, 4), _integer_kernel_pair),
    preserves("linear 16->16", lambda: nn.Linear(16, 16), (3, 16), _solve, bound=1e-8),
    erases("linear 5->4", lambda: nn.Linear(5, 4), _integer_kernel_pair),
)
EMBEDDING = (
    Specimen(
        "embedding",
        _module(lambda: nn.Embedding(11, 6)),
        sample=lambda g: torch.randint(0, 11, (3, 7), generator=g),
        invert=lambda m, y, _: (y[..., None, :] == m.weight).all(-1).long().argmax(-1),
    ),
)
POSITION = (
    Specimen(
        "rotary positions",
        lambda g: _Rotary(),
        sample=lambda g: (torch.zeros(1, 7, 4, dtype=F64), torch.randint(0, 64, (1, 7), generator=g)),
        invert=_decode_position,
    ),
)
CONVOLUTION = (
    preserves("convolution 3x3 same", lambda: nn.Conv2d(2, 2, 3, padding=1), (2, 2, 5, 5), _deconvolve(2, 5, 5), bound=1e-6),
    preserves("convolution depthwise causal", lambda: nn.Conv1d(3, 3, 4, padding=3, groups=3), (2, 3, 6), _deconvolve(3, 6), bound=1e-6),
    preserves("convolution patches", lambda: nn.Conv2d(2, 8, 2, stride=2), (2, 2, 4, 4), _deconvolve(2, 4, 4), bound=1e-6),
    preserves("convolution strided, widening", lambda: nn.Conv2d(1, 5, 3, stride=2, padding=1), (2, 1, 6, 6), _deconvolve(1, 6, 6), bound=1e-6),
    erases("convolution 1x1 stride 2", lambda: nn.Conv2d(2, 8, 1, stride=2), _skipped_pixel),
    erases("convolution 4->2 channels", lambda: nn.Conv2d(4, 2, 3, padding=1), _cancelling_channels),
    erases("convolution 3x3 stride 2, same width", lambda: nn.Conv2d(4, 4, 3, stride=2, padding=1), _cancelling_channels),
    erases("convolution without padding", lambda: nn.Conv1d(1, 1, 2), _valid_border),
    preserves("transposed convolution 2x", lambda: nn.ConvTranspose2d(4, 2, 2, stride=2), (2, 4, 3, 3), _deconvolve(4, 3, 3), bound=1e-6),
    erases(
        "transposed convolution 4->1",
        lambda: nn.ConvTranspose2d(4, 1, 1),
        lambda m, g: (
            setattr(m.weight, "data", torch.ones_like(m.weight)),
            torch.tensor([1.0, 2, 3, 4], dtype=F64).reshape(1, 4, 1, 1),
            torch.tensor([2.0, 1, 3, 4], dtype=F64).reshape(1, 4, 1, 1),
        )[1:],
    ),
)  # fmt: skip


# --- norms -----------------------------------------------------------------------------------------------------------


def _affine(m: Any, y: Tensor, dim: int = -1) -> Tensor:
    shape = [1] * y.dim()
    shape[dim] = -1
    weight, bias = getattr(m, "weight", None), getattr(m, "bias", None)
    if bias is not None:
        y = y - bias.reshape(shape)
    return y if weight is None else y / weight.reshape(shape)


def _row_moments(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(-1, keepdim=True), (x.var(-1, unbiased=False, keepdim=True) + m.eps).sqrt()


def _group_moments(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.reshape(x.shape[0], m.num_groups, -1)
    return rows.mean(-1, keepdim=True), (rows.var(-1, unbiased=False, keepdim=True) + m.eps).sqrt()


def _batch_moments(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean((0, 2, 3), keepdim=True), (x.var((0, 2, 3), unbiased=False, keepdim=True) + m.eps).sqrt()


def _undo_group_norm(m: Any, y: Tensor, kept: Any) -> Tensor:
    rows = _affine(m, y, 1).reshape(y.shape[0], m.num_groups, -1)
    return (rows * kept[1] + kept[0]).reshape(y.shape)


def _eval_batch_norm() -> nn.Module:
    m = nn.BatchNorm2d(3).eval()
    m.running_mean.uniform_(-1, 1)
    m.running_var.uniform_(0.5, 2)
    return m


def _undo_eval_batch_norm(m: Any, y: Tensor, _: Any) -> Tensor:
    s = (1, -1, 1, 1)
    return _affine(m, y, 1) * (m.running_var + m.eps).sqrt().reshape(s) + m.running_mean.reshape(s)


NORMS = (
    preserves("layer norm", lambda: nn.LayerNorm(8), (3, 8), lambda m, y, k: _affine(m, y) * k[1] + k[0],
              keep=_row_moments, residue=Residue.ROW),
    erases("layer norm of one element", lambda: nn.LayerNorm(1),
           lambda m, g: (torch.tensor([[1.0]], dtype=F64), torch.tensor([[2.0]], dtype=F64))),
    preserves("rms norm", lambda: nn.RMSNorm(8, eps=1e-6), (3, 8), lambda m, y, k: _affine(m, y) * k,
              keep=lambda m, x: (x.square().mean(-1, keepdim=True) + m.eps).sqrt(), residue=Residue.ROW),
    erases("rms norm of one element", lambda: nn.RMSNorm(1, eps=0.0),
           lambda m, g: (torch.tensor([[1.0]], dtype=F64), torch.tensor([[2.0]], dtype=F64))),
    preserves("group norm", lambda: nn.GroupNorm(2, 6), (3, 6, 4, 4), _undo_group_norm, keep=_group_moments, residue=Residue.ROW),
    preserves("batch norm in training", lambda: nn.BatchNorm2d(3), (4, 3, 5, 5),
              lambda m, y, k: _affine(m, y, 1) * k[1] + k[0], keep=_batch_moments, residue=Residue.ROW),
    preserves("batch norm in eval", _eval_batch_norm, (4, 3, 5, 5), _undo_eval_batch_norm),
)  # fmt: skip
# The publication's "batch norm in training erases": two batches that differ by an offset per channel.
# Variance 1 and epsilon 3 make the deviation 2, so that no rounding tells the two apart.
BATCH_OFFSET = erases(
    "batch norm in training, offset", lambda: nn.BatchNorm2d(3, eps=3.0, affine=False),
    lambda m, g: (torch.tensor([[1.0, 3, 5], [3, 5, 7]], dtype=F64).reshape(2, 3, 1, 1),
                  torch.tensor([[3.0, 5, 7], [5, 7, 9]], dtype=F64).reshape(2, 3, 1, 1)),
)  # fmt: skip


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


def _one_branch_bit(name: str, build: Callable[[], nn.Module], turn: float) -> Specimen:
    return Specimen(
        name, _module(build), sample=_normal(4, 9), pair=_twice(-5.0, turn, 1.0), invert=_undo_by_branch(turn),
        keep=lambda f, x: x > turn, residue=Residue.BIT, bound=1e-6,
    )  # fmt: skip


ELEMENTWISE = (
    preserves("identity", nn.Identity, (3, 4), lambda f, y, _: y, bound=0.0),
    preserves("flatten", nn.Flatten, (2, 3, 4), lambda f, y, _: y.reshape(2, 3, 4), bound=0.0),
    preserves("pixel shuffle", lambda: nn.PixelShuffle(2), (1, 4, 3, 3), lambda f, y, _: F.pixel_unshuffle(y, 2), bound=0.0),
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
)  # fmt: skip


def _saturated(low: float, high: float) -> Callable[[Any, Generator], tuple[Tensor, Tensor]]:
    return lambda f, g: (torch.tensor([low]), torch.tensor([high]))


TANH_PLATEAU = Specimen("tanh in float32 at 20 and 21", lambda g: nn.Tanh(), pair=_saturated(20, 21),
                        residue=Residue.EVERYTHING, saturates=True)  # fmt: skip
SIGMOID_PLATEAU = Specimen("sigmoid in float32 at 30 and 31", lambda g: nn.Sigmoid(), pair=_saturated(30, 31),
                           residue=Residue.EVERYTHING, saturates=True)  # fmt: skip


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


def _rnn(weight: Tensor) -> Callable[[Generator], nn.Module]:
    def make(g: Generator) -> nn.Module:
        cell = _module(lambda: nn.RNNCell(2, 2))(g)
        cell.weight_ih.data = weight
        return cell

    return make


def _undo_rnn(m: Any, y: Tensor, _: Any) -> Tensor:
    return torch.linalg.solve(m.weight_ih, (torch.atanh(y) - m.bias_ih - m.bias_hh).mT).mT


SOFTMAX = (
    preserves("softmax", lambda: nn.Softmax(-1), (3, 8), lambda f, y, k: y.log() + k,
              keep=lambda f, x: x.logsumexp(-1, keepdim=True), residue=Residue.ROW),
    preserves("log softmax", lambda: nn.LogSoftmax(-1), (3, 8), lambda f, y, k: y + k,
              keep=lambda f, x: x.logsumexp(-1, keepdim=True), residue=Residue.ROW),
)  # fmt: skip
# The publication's "softmax erases": it does not notice an offset of the row.
SOFTMAX_OFFSET = erases("softmax, offset", lambda: nn.Softmax(-1), lambda f, g: (
    torch.tensor([[1.0, 2, 3]], dtype=F64), torch.tensor([[3.0, 4, 5]], dtype=F64)))  # fmt: skip

MIXING = (
    erases("dropout in training", lambda: nn.Dropout(0.25), _dropped_pair),
    preserves("dropout in eval", lambda: nn.Dropout(0.25).eval(), (3, 4), lambda f, y, _: y, bound=0.0),
    preserves("dropout with p = 0", lambda: nn.Dropout(0.0), (3, 4), lambda f, y, _: y, bound=0.0),
    erases("max pooling", lambda: nn.MaxPool1d(2), lambda f, g: (
        torch.tensor([[1.0, 3]], dtype=F64), torch.tensor([[2.0, 3]], dtype=F64))),
    erases("mean pooling", lambda: nn.AdaptiveAvgPool1d(1), lambda f, g: (
        torch.tensor([[1.0, 3]], dtype=F64), torch.tensor([[2.0, 2]], dtype=F64))),
    preserves("nearest upsampling", lambda: nn.Upsample(scale_factor=2), (1, 2, 4), lambda f, y, _: y[..., ::2], bound=0.0),
    erases("squared error", nn.MSELoss, lambda f, g: (
        (torch.tensor([1.0], dtype=F64), torch.tensor([2.0], dtype=F64)),
        (torch.tensor([3.0], dtype=F64), torch.tensor([2.0], dtype=F64)))),
    erases("top-2 router", _TopK, _unrouted),
    erases("composite with a maximum", _Gate, lambda f, g: (
        torch.tensor([[1.0, 3, 2]], dtype=F64), torch.tensor([[2.0, 3, 1]], dtype=F64))),
    preserves("composite of exponential and flip", _Whitening, (3, 8), lambda f, y, _: y.flip(-1).log(), bound=1e-9),
)  # fmt: skip
RECURRENT = (
    Specimen("recurrent cell, full rank", _rnn(torch.tensor([[1.0, 0.5], [-0.5, 1.0]], dtype=F64)),
             sample=_normal(3, 2), invert=_undo_rnn, bound=1e-6),
    Specimen("recurrent cell, rank one", _rnn(torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=F64)), residue=Residue.EVERYTHING,
             pair=lambda f, g: (torch.tensor([[1.0, 2]], dtype=F64), torch.tensor([[2.0, 1]], dtype=F64))),
)  # fmt: skip

MODULES: tuple[Specimen, ...] = (
    *LINEAR, *EMBEDDING, *POSITION, *CONVOLUTION, *NORMS, *ELEMENTWISE, *SOFTMAX, *MIXING, *RECURRENT,
)  # fmt: skip
