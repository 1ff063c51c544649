"""Cases of layers with parameters: linear maps, lookups, convolutions and norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from bwsk.classification.cases.make import F64, erases, from_module, preserves
from bwsk.classification.witness import Residue, WitnessCase

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
    """Position -> (cos, sin) of position x frequency, as rotary embeddings compute them (slowest period: 64)."""

    inv_freq: Tensor

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


def _even() -> nn.Module:
    """Sums two apart: y_i = u x_(i-1) + v x_(i+1)."""
    return nn.Conv1d(1, 1, 2, padding=1, dilation=2)


def _even_transposed() -> nn.Module:
    return nn.ConvTranspose1d(1, 1, 2, padding=1, dilation=2)


def _between(m: Any, g: Generator) -> tuple[Tensor, Tensor]:
    """With equal taps, 1, 0, -1, 0, 1 is a null vector."""
    m.weight.data.fill_(1.0)
    m.bias.data.zero_()
    a = torch.randint(-3, 4, (1, 1, 5), generator=g).to(F64)
    return a, a + torch.tensor([1.0, 0, -1, 0, 1], dtype=F64)


def _one_phase(m: Any, g: Generator) -> tuple[Tensor, Tensor]:
    """Taps 0 and 2 at stride 2 write even positions only: two channels that enter alike cancel."""
    m.weight.data = torch.tensor([[[1.0, 2.0]], [[1.0, 2.0]]], dtype=F64)
    m.bias.data.zero_()
    a = torch.randint(-3, 4, (1, 2, 4), generator=g).to(F64)
    return a, a + torch.tensor([[1.0], [-1.0]], dtype=F64)


def _permuted_channels(m: Any, g: Generator) -> tuple[Tensor, Tensor]:
    """With equal weights only the sum of the channels counts."""
    m.weight.data = torch.ones_like(m.weight)
    a = torch.tensor([1.0, 2, 3, 4], dtype=F64).reshape(1, 4, 1, 1)
    b = torch.tensor([2.0, 1, 3, 4], dtype=F64).reshape(1, 4, 1, 1)
    return a, b


LINEAR = (
    preserves("linear 4->4", lambda: nn.Linear(4, 4), (5, 4), _solve),
    preserves("linear 4->8", lambda: nn.Linear(4, 8), (5, 4), _solve),
    erases("linear 8->4", lambda: nn.Linear(8, 4), _integer_kernel_pair),
    preserves("linear 16->16", lambda: nn.Linear(16, 16), (3, 16), _solve, bound=1e-8),
    erases("linear 5->4", lambda: nn.Linear(5, 4), _integer_kernel_pair),
)
EMBEDDING = (
    WitnessCase(
        "embedding",
        from_module(lambda: nn.Embedding(11, 6)),
        sample=lambda g: torch.randint(0, 11, (3, 7), generator=g),
        invert=lambda m, y, _: (y[..., None, :] == m.weight).all(-1).long().argmax(-1),
    ),
)
POSITION = (
    WitnessCase(
        "rotary positions",
        lambda g: _Rotary(),
        sample=lambda g: (torch.zeros(1, 7, 4, dtype=F64), torch.randint(0, 64, (1, 7), generator=g)),
        invert=_decode_position,
    ),
)
CONVOLUTION = (
    preserves(
        "convolution 3x3 same", lambda: nn.Conv2d(2, 2, 3, padding=1), (2, 2, 5, 5), _deconvolve(2, 5, 5), bound=1e-6
    ),
    preserves(
        "convolution depthwise causal",
        lambda: nn.Conv1d(3, 3, 4, padding=3, groups=3),
        (2, 3, 6),
        _deconvolve(3, 6),
        bound=1e-6,
    ),
    preserves(
        "convolution patches", lambda: nn.Conv2d(2, 8, 2, stride=2), (2, 2, 4, 4), _deconvolve(2, 4, 4), bound=1e-6
    ),
    preserves(
        "convolution strided, widening",
        lambda: nn.Conv2d(1, 5, 3, stride=2, padding=1),
        (2, 1, 6, 6),
        _deconvolve(1, 6, 6),
        bound=1e-6,
    ),
    erases("convolution 1x1 stride 2", lambda: nn.Conv2d(2, 8, 1, stride=2), _skipped_pixel),
    erases("convolution 4->2 channels", lambda: nn.Conv2d(4, 2, 3, padding=1), _cancelling_channels),
    erases(
        "convolution 3x3 stride 2, same width", lambda: nn.Conv2d(4, 4, 3, stride=2, padding=1), _cancelling_channels
    ),
    erases("convolution without padding", lambda: nn.Conv1d(1, 1, 2), _valid_border),
    preserves("convolution with an even dilated kernel, length 4", _even, (2, 1, 4), _deconvolve(1, 4), bound=1e-6),
    erases("convolution with an even dilated kernel, length 5", _even, _between),
    preserves(
        "transposed convolution 2x",
        lambda: nn.ConvTranspose2d(4, 2, 2, stride=2),
        (2, 4, 3, 3),
        _deconvolve(4, 3, 3),
        bound=1e-6,
    ),
    erases("transposed convolution 4->1", lambda: nn.ConvTranspose2d(4, 1, 1), _permuted_channels),
    erases("transposed convolution 2->1 of one phase", lambda: nn.ConvTranspose1d(2, 1, 2, 2, dilation=2), _one_phase),
    preserves(
        "transposed convolution with an even dilated kernel, length 4",
        _even_transposed,
        (2, 1, 4),
        _deconvolve(1, 4),
        bound=1e-6,
    ),
    erases("transposed convolution with an even dilated kernel, length 5", _even_transposed, _between),
)


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
    assert m.running_mean is not None
    assert m.running_var is not None
    m.running_mean.uniform_(-1, 1)
    m.running_var.uniform_(0.5, 2)
    return m


def _undo_eval_batch_norm(m: Any, y: Tensor, _: Any) -> Tensor:
    s = (1, -1, 1, 1)
    return _affine(m, y, 1) * (m.running_var + m.eps).sqrt().reshape(s) + m.running_mean.reshape(s)


def _layer_norm(width: int) -> WitnessCase:
    return preserves(
        f"layer norm of {width} elements",
        lambda: nn.LayerNorm(width),
        (3, width),
        lambda m, y, k: _affine(m, y) * k[1] + k[0],
        keep=_row_moments,
        residue=Residue.ROW,
    )


def _rms_norm(width: int) -> WitnessCase:
    return preserves(
        f"rms norm of {width} elements",
        lambda: nn.RMSNorm(width, eps=1e-6),
        (3, width),
        lambda m, y, k: _affine(m, y) * k,
        keep=lambda m, x: (x.square().mean(-1, keepdim=True) + m.eps).sqrt(),
        residue=Residue.ROW,
    )


def _rows(a: list[float], b: list[float]) -> Callable[[Any, Generator], tuple[Tensor, Tensor]]:
    return lambda m, g: (torch.tensor([a], dtype=F64), torch.tensor([b], dtype=F64))


# Three elements are the fewest with which a row holds more than two scalars: cases on both sides of that boundary.
NORMS = (
    _layer_norm(8),
    _layer_norm(3),
    erases("layer norm of 1 element", lambda: nn.LayerNorm(1), _rows([1.0], [2.0])),
    erases("layer norm of 2 elements", lambda: nn.LayerNorm(2, eps=0.0), _rows([1.0, 3.0], [2.0, 6.0])),
    _rms_norm(8),
    _rms_norm(3),
    erases("rms norm of 1 element", lambda: nn.RMSNorm(1, eps=0.0), _rows([1.0], [2.0])),
    erases("rms norm of 2 elements", lambda: nn.RMSNorm(2, eps=0.0), _rows([1.0, 1.0], [2.0, 2.0])),
    preserves(
        "group norm",
        lambda: nn.GroupNorm(2, 6),
        (3, 6, 4, 4),
        _undo_group_norm,
        keep=_group_moments,
        residue=Residue.ROW,
    ),
    preserves(
        "batch norm in training",
        lambda: nn.BatchNorm2d(3),
        (4, 3, 5, 5),
        lambda m, y, k: _affine(m, y, 1) * k[1] + k[0],
        keep=_batch_moments,
        residue=Residue.ROW,
    ),
    preserves("batch norm in eval", _eval_batch_norm, (4, 3, 5, 5), _undo_eval_batch_norm),
)
# The publication's "batch norm in training erases": two batches that differ by an offset per channel.
# Variance 1 and epsilon 3 make the deviation 2, so that no rounding tells the two apart.
BATCH_OFFSET = erases(
    "batch norm in training, offset",
    lambda: nn.BatchNorm2d(3, eps=3.0, affine=False),
    lambda m, g: (
        torch.tensor([[1.0, 3, 5], [3, 5, 7]], dtype=F64).reshape(2, 3, 1, 1),
        torch.tensor([[3.0, 5, 7], [5, 7, 9]], dtype=F64).reshape(2, 3, 1, 1),
    ),
)
LAYERS: tuple[WitnessCase, ...] = (*LINEAR, *EMBEDDING, *POSITION, *CONVOLUTION, *NORMS)
