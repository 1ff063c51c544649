"""Cases of operator kinds: single `aten` calls, each with the evidence that it preserves or erases its data input.

For operators with two inputs both are data, and the pair must be recovered. See `bwsk.classification.witness`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from bwsk.classification.cases.make import F64, normal
from bwsk.classification.operators import Operator
from bwsk.classification.witness import Residue, WitnessCase

aten = torch.ops.aten


def _positive(*shape: int) -> Callable[[Generator], Tensor]:
    return lambda g: torch.rand(shape, generator=g, dtype=F64) + 0.5


def _back(name: str, operator: Operator, invert: Callable[[Any], Any], sample: Any = None, **more: Any) -> WitnessCase:
    """Evidence for S: an operator call and its inverse on the output (exact unless a bound is given)."""
    return WitnessCase(
        name, lambda g: operator, sample=sample or normal(3, 8), invert=lambda f, y, k: invert(y), **more
    )


def _same(name: str, operator: Operator, a: Any, b: Any) -> WitnessCase:
    """Evidence for K: one output for the inputs a and b (numbers, or tuples of tensors' numbers)."""
    pair = _data(a), _data(b)
    return WitnessCase(name, lambda g: operator, pair=lambda f, g: pair, residue=Residue.EVERYTHING)


def _data(numbers: Any) -> Tensor | tuple[Tensor, ...]:
    if isinstance(numbers, tuple):
        return tuple(torch.tensor(part, dtype=F64) for part in numbers)
    return torch.tensor(numbers, dtype=F64)


def _widths() -> list[WitnessCase]:
    def sample(g: Generator) -> Tensor:
        return torch.randn(3, 8, generator=g, dtype=torch.float32)

    return [
        _back("cast fp32 to fp64", Operator(aten._to_copy.default, dtype=F64), lambda y: y.float(), sample),
        _same("cast fp64 to int64", Operator(aten._to_copy.default, dtype=torch.int64), [1.2], [1.7]),
    ]


def _noise() -> list[WitnessCase]:
    class Draw(Operator):
        def __init__(self) -> None:
            super().__init__(aten.bernoulli_.float, 0.5)

    state = torch.Generator().manual_seed(7).get_state()

    # The "input" of a draw is its generator's state, which gives the same output again if it is saved.
    def draw(kept: Tensor) -> Tensor:
        again = torch.Generator()
        again.set_state(kept)
        return torch.randn(3, 8, generator=again, dtype=F64)

    def replay(f: Any, y: Tensor, kept: Tensor) -> Tensor:
        again = torch.Generator()
        again.set_state(kept)
        expected = torch.zeros_like(y).bernoulli_(0.5, generator=again)
        return torch.zeros_like(y) if torch.equal(expected, y) else y + 1

    return [
        WitnessCase(
            "random draw, replayed",
            lambda g: Draw(),
            sample=lambda g: torch.zeros(64, dtype=F64),
            keep=lambda f, x: state,
            invert=replay,
            residue=Residue.RNG,
        ),
        WitnessCase(
            "plus noise, replayed",
            lambda g: Operator(aten.add.Tensor, draw(state), noise=True),
            sample=normal(3, 8),
            keep=lambda f, x: state,
            invert=lambda f, y, kept: y - draw(kept),
            residue=Residue.RNG,
            bound=1e-12,
        ),
    ]


def _row_residue() -> list[WitnessCase]:
    """x * s with a scalar s per row: both are recovered from the product and s (the residue)."""

    def pairs(g: Generator) -> tuple[Tensor, Tensor]:
        return (torch.randn(3, 8, generator=g, dtype=F64), torch.rand(3, 1, generator=g, dtype=F64) + 0.5)

    return [
        WitnessCase(
            "row times its scalar",
            lambda g: Operator(aten.mul.Tensor),
            sample=pairs,
            keep=lambda f, x, s: s,
            invert=lambda f, y, s: (y / s, s),
            residue=Residue.ROW,
            bound=1e-12,
        ),
        WitnessCase(
            "row minus its mean",
            lambda g: Operator(aten.sub.Tensor),
            sample=pairs,
            keep=lambda f, x, s: s,
            invert=lambda f, y, s: (y + s, s),
            residue=Residue.ROW,
            bound=1e-12,
        ),
        WitnessCase(
            "softmax operator",
            lambda g: Operator(aten._softmax.default, -1, False),
            sample=normal(3, 8),
            keep=lambda f, x: x.logsumexp(-1, keepdim=True),
            invert=lambda f, y, k: y.log() + k,
            residue=Residue.ROW,
            bound=1e-9,
        ),
    ]


def _period_apart(f: Any, g: Generator) -> tuple[Tensor, Tensor]:
    a = torch.linspace(-1.5, 1.5, 4001, dtype=F64)
    same = f(a) == f(a + torch.pi)  # rounding spares some
    return a[same], a[same] + torch.pi


def _unsort(y: tuple[Tensor, Tensor]) -> Tensor:
    return torch.empty_like(y[0]).scatter_(-1, y[1], y[0])


_WEIGHT = torch.linspace(-1, 1, 24, dtype=F64).sin().reshape(4, 6) + torch.eye(4, 6, dtype=F64)
_EQUAL_KEYS = ([[[1.0, 2], [3, 4]]], [[[0.0, 0], [0, 0]]], [[[5.0, 6], [7, 8]]])

OPERATORS: tuple[WitnessCase, ...] = (
    # Without data as input there is nothing to recover, and the empty inverse does so.
    WitnessCase("no data", lambda g: Operator(aten.arange.default, 5), sample=lambda g: (), invert=lambda f, y, k: ()),
    # rearrangements: bit-exact
    _back("view", Operator(aten.view.default, [8, 3]), lambda y: y.reshape(3, 8)),
    _back("permute", Operator(aten.permute.default, [1, 0]), lambda y: y.T),
    _back("expand", Operator(aten.expand.default, [2, 3, 8]), lambda y: y[1]),
    _back("flip", Operator(aten.flip.default, [1]), lambda y: y.flip(1)),
    _back("split", Operator(aten.split.Tensor, 4, -1), lambda y: torch.cat(y, -1)),
    _back("zero padding", Operator(aten.constant_pad_nd.default, [1, 2]), lambda y: y[:, 1:-2]),
    _back("slice of everything", Operator(aten.slice.Tensor, 1, 0, 8), lambda y: y),
    _back("windows of all", Operator(aten.unfold.default, 1, 4, 4), lambda y: y.flatten(1)),
    _back("cast to the same type", Operator(aten._to_copy.default, dtype=F64), lambda y: y),
    # functions of single elements
    _back("exp", Operator(aten.exp.default), lambda y: y.log(), bound=1e-12),
    _back("log", Operator(aten.log.default), lambda y: y.exp(), _positive(3, 8), bound=1e-12),
    _back("rsqrt", Operator(aten.rsqrt.default), lambda y: y**-2, _positive(3, 8), bound=1e-12),
    _back("reciprocal", Operator(aten.reciprocal.default), lambda y: 1 / y, _positive(3, 8), bound=1e-12),
    _back("third power", Operator(aten.pow.Tensor_Scalar, 3), lambda y: y.sign() * y.abs() ** (1 / 3), bound=1e-12),
    _back("erf", Operator(aten.erf.default), lambda y: y.erfinv(), bound=1e-3),
    _same("square", Operator(aten.pow.Tensor_Scalar, 2), [2.0], [-2.0]),
    _same("absolute value", Operator(aten.abs.default), [2.0], [-2.0]),
    _same("clamp", Operator(aten.clamp.default, 0.0, 1.0), [2.0], [3.0]),
    _same("cosine", Operator(aten.cos.default), [1.0], [-1.0]),
    _same("times zero", Operator(aten.mul.Tensor, 0.0), [2.0], [3.0]),
    _back("clamp at infinity", Operator(aten.clamp.default, -torch.inf), lambda y: y),
    WitnessCase("tangent", lambda g: Operator(aten.tan.default), pair=_period_apart, residue=Residue.EVERYTHING),
    _same("leaky relu, negative slope", Operator(aten.leaky_relu.default, -0.5), [2.0], [-4.0]),
    WitnessCase(
        "softplus, low threshold",
        lambda g: Operator(aten.softplus.default, 1.0, 0.0),
        pair=lambda f, g: (torch.zeros(1, dtype=F64), f(torch.zeros(1, dtype=F64))),  # above 0 it is the identity
        residue=Residue.EVERYTHING,
    ),
    _same("division rounded down", Operator(aten.div.Tensor_mode, 2.0, rounding_mode="floor"), [2.0], [3.0]),
    _same("softmax of 1 element", Operator(aten._softmax.default, -1, False), [[1.0]], [[2.0]]),
    _same("softmax of 2 elements", Operator(aten._softmax.default, -1, False), [[1.0, 2.0]], [[3.0, 4.0]]),
    WitnessCase(
        "group norm operator, groups of 8",
        lambda g: Operator(aten.native_group_norm.default, None, None, 3, 8, 1, 1, 1e-5, pick=0),
        sample=normal(3, 8),
        keep=lambda f, x: (x.mean(-1, keepdim=True), (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()),
        invert=lambda f, y, k: y * k[1] + k[0],
        residue=Residue.ROW,
        bound=1e-9,
    ),
    _same(
        "group norm operator, groups of 1",
        Operator(aten.native_group_norm.default, None, None, 1, 2, 1, 2, 1e-5, pick=0),
        [[1.0, 2.0]],
        [[3.0, 4.0]],
    ),
    _same(
        "batch norm operator, 2 samples",
        Operator(aten.native_batch_norm.default, None, None, None, None, True, 0.1, 0.0, pick=0),
        [[1.0], [3.0]],
        [[2.0], [6.0]],
    ),
    _same("maximum with a constant", Operator(aten.maximum.default, torch.tensor([1.0], dtype=F64)), [0.5], [-0.5]),
    # combined with what is known
    _back("plus a constant", Operator(aten.add.Tensor, 0.75), lambda y: y - 0.75, bound=1e-12),
    _back(
        "times a parameter",
        Operator(aten.mul.Tensor, torch.linspace(0.5, 2, 8, dtype=F64)),
        lambda y: y / torch.linspace(0.5, 2, 8, dtype=F64),
        bound=1e-12,
    ),
    *_row_residue(),
    *_widths(),
    *_noise(),
    # two activations in, one out
    _same("sum of two", Operator(aten.add.Tensor), ([1.0], [2.0]), ([2.0], [1.0])),
    _same("product of two", Operator(aten.mul.Tensor), ([3.0], [4.0]), ([4.0], [3.0])),
    _same("matrix product of two", Operator(aten.mm.default), ([[2.0]], [[3.0]]), ([[3.0]], [[2.0]])),
    _same(
        "attention over equal keys",
        Operator(aten.scaled_dot_product_attention.default),
        _EQUAL_KEYS,
        ([[[9.0, 8], [7, 6]]], *_EQUAL_KEYS[1:]),
    ),
    # fixed matrices
    _back(
        "mm 4->6",
        Operator(aten.mm.default, _WEIGHT),
        lambda y: torch.linalg.lstsq(_WEIGHT.T, y.T).solution.T,
        normal(3, 4),
        bound=1e-9,
    ),
    _same("mm 2->1", Operator(aten.mm.default, torch.tensor([[1.0], [1.0]], dtype=F64)), [[1.0, 2.0]], [[2.0, 1.0]]),
    # fewer elements out than in
    _same("slice", Operator(aten.slice.Tensor, 0, 0, 1), [1.0, 2.0], [1.0, 3.0]),
    _same("sum over an axis", Operator(aten.sum.dim_IntList, [-1]), [[1.0, 2.0]], [[2.0, 1.0]]),
    _same("mean over an axis", Operator(aten.mean.dim, [-1]), [[1.0, 3.0]], [[2.0, 2.0]]),
    _same("top 1", Operator(aten.topk.default, 1), [3.0, 1.0], [3.0, 2.0]),
    _same("argmax", Operator(aten.argmax.default), [3.0, 1.0], [3.0, 2.0]),
    _same("comparison", Operator(aten.gt.Scalar, 0.0), [1.0], [2.0]),
    _same("masked fill", Operator(aten.masked_fill.Scalar, torch.tensor([True, False]), 0.0), [1.0, 2.0], [3.0, 2.0]),
    _back(
        "cumulative sum",
        Operator(aten.cumsum.default, -1),
        lambda y: torch.diff(y, prepend=torch.zeros_like(y[:, :1])),
        bound=1e-12,
    ),
    _back("sort with indices", Operator(aten.sort.default), _unsort),
)
# One key: its weight is 1 whatever the query, so the values pass through unchanged. With `v` as the only data input
# this call preserves, with `q` it erases: why the publication calls fused attention context dependent.
ATTENTION_ONE_KEY = WitnessCase(
    "attention over one key, values",
    lambda g: Operator(
        aten.scaled_dot_product_attention.default, torch.ones(1, 1, 2, dtype=F64), torch.ones(1, 1, 2, dtype=F64), ...
    ),
    sample=normal(1, 1, 2),
    invert=lambda f, y, _: y,
)
