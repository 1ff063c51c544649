"""Determine what a leaf module computes by running it on a few numbers (ways 2 and 3 of `identify`).

Probing works on meta-device modules and leaves the module and the global random state untouched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bwsk._compat import tree_leaves
from bwsk.classification.dataflow import Flow, dispatched
from bwsk.classification.operators import OpInfo
from bwsk.classification.places import flow_of, lookup, position
from bwsk.classification.stand_in import Probe, is_real, narrow
from bwsk.classification.witness import fixed_draws

_ELEMENTS = 1 << 23  # modules with more elements in their parameters get no stand-in parameters
_DERIVATIVES = 1024  # derivatives are taken of inputs with at most this many elements

_Found = TypeVar("_Found")


def by_probe(module: nn.Module) -> OpInfo:
    """Kind and facts of a module by its behaviour, or else by the operators that it dispatches."""
    # The grid of numbers is fixed; random draws come from a private copy of the generator.
    with torch.no_grad(), fixed_draws():
        shapes = Probe(module, meta=True)
        runs = narrow(module) if isinstance(module, nn.Embedding) else module
        fits = sum(t.numel() for t in [*runs.parameters(), *runs.buffers()]) <= _ELEMENTS
        small = Probe(runs) if fits else None
        single = Probe(runs, dtype=torch.float32) if fits else None  # some cast their input to their weight's dtype
        tests = [(_elementwise, small), (position, small), (lookup, small), (_merge, small), (_merge, single)]
        tests += [(_row_function, small), (_row_function, single)]
        tests += [(_table, shapes), (_operations, shapes), (_operations, small)]
        for test, probe in tests:
            found = _attempt(test, probe) if probe else None
            if found:
                return _with_rank(found, small) if "flow" in found.facts else found
        return OpInfo("unknown", {"class": type(module).__name__}, "none")


def _attempt(test: Callable[[Probe], _Found | None], probe: Probe) -> _Found | None:
    try:
        return test(probe)
    except Exception:  # a module that does not take the probe's inputs is not of this kind
        return None


_GRID = torch.linspace(-8, 8, 4001, dtype=torch.float64)
_FAR = torch.tensor([8, 9, 10, 11, 12, 13, 14, 15, 16], dtype=torch.float64)  # the hyperbolic tangent still rises
_CLOSE = torch.linspace(0.1, 0.12, 201, dtype=torch.float64)
_FARTHER = torch.logspace(1, 4, 61, dtype=torch.float64)
_REFERENCES: tuple[tuple[str, Callable[[Tensor], Tensor], float], ...] = (
    ("identity", lambda x: x, 0.0),
    ("relu", F.relu, 0.0),
    ("silu", F.silu, 1e-6),
    ("tanh", torch.tanh, 1e-6),
    ("sigmoid", torch.sigmoid, 1e-6),
    ("gelu", F.gelu, 0.03),  # covers the tanh and logistic approximations (largest error 0.02) and no other activation
)


def _elementwise(probe: Probe) -> OpInfo | None:
    grid = _GRID
    state = torch.get_rng_state()
    y = probe(grid.reshape(1, -1).clone())
    if not isinstance(y, Tensor) or y.shape != (1, grid.numel()):
        return None
    if not torch.equal(state, torch.get_rng_state()):
        return _random_zeroing(probe)
    y = y.reshape(-1).double()

    def of(x: Tensor) -> Tensor:
        return probe(x.clone()).double()

    order = torch.randperm(grid.numel())
    part = order[:1200]  # neighbours must not matter, in any direction
    if not torch.allclose(of(grid[order].reshape(1, -1)).reshape(-1), y[order], atol=1e-9, rtol=0):
        return None
    if not torch.allclose(of(grid[part].reshape(3, 20, 20)).reshape(-1), y[part], atol=1e-9, rtol=0):
        return None
    far = torch.cat([-_FARTHER.flip(0), _FARTHER])
    for kind, reference, bound in _REFERENCES:
        beyond = kind != "identity" or torch.equal(of(far.reshape(1, -1)).reshape(-1), far)
        if float((y - reference(grid)).abs().max()) <= bound and beyond:
            return OpInfo(kind, {}, "behaviour")
    wide = torch.cat([of((-_FAR.flip(0)).reshape(1, -1)).reshape(-1), y[1:-1], of(_FAR.reshape(1, -1)).reshape(-1)])
    steps, after = wide.diff(), of(far.reshape(1, -1)).reshape(-1).diff()
    close = [of(part.reshape(1, -1)).reshape(-1).diff() for part in (_CLOSE, -_CLOSE.flip(0))]  # stairs have flat steps
    rises, falls = (all(bool((sign * d > 0).all()) for d in (steps, *close)) for sign in (1, -1))
    turns = bool((after < 0).any()) if rises else bool((after > 0).any())
    injective = (rises or falls) and not turns and not (bool((after == 0).any()) and _clamps(probe))
    return OpInfo("injective_elementwise" if injective else "erasing_elementwise", {}, "behaviour")


def _clamps(probe: Probe) -> bool:
    """Whether a plateau at large inputs is real (a clamp runs), and not the rounding of a tanh or an exponential."""
    calls = dispatched(probe, _GRID.reshape(1, -1).clone()).calls
    return any(call.subject.kind == "erasing_elementwise" for call in calls)


def _random_zeroing(probe: Probe) -> OpInfo | None:
    """Dropout of elements or of whole rows (stochastic depth): every output is zero or x / (1 - p)."""
    x = _GRID[_GRID != 0]
    y = torch.cat([probe(x.reshape(1, -1).clone()).reshape(-1).double() for _ in range(8)])
    factors = (y / x.repeat(8))[y != 0]
    if factors.numel() and float(factors.max() - factors.min()) < 1e-6:
        return OpInfo("dropout", {"p": round(1 - 1 / float(factors[0]), 6), "training": True}, "behaviour")
    return None


def _merge(probe: Probe) -> OpInfo | None:
    """One activation computed from two, as in a norm with a gate, also where the second is optional."""
    for width in probe.widths or [8]:
        for shape in ((2, 5, width), (2, width, 5)):
            x, gate, other = torch.randn(3, *shape, dtype=probe.dtype)
            try:
                y = probe(x, gate)
                if not is_real(y) or y.shape != x.shape:
                    continue
                if not torch.equal(y, probe(other, gate)) and not torch.equal(y, probe(x, other)):
                    return OpInfo("merge", {}, "behaviour")
            except Exception:
                continue
    return None


def _row_function(probe: Probe) -> OpInfo | None:
    """Norms and softmax, which are functions of rows with a defining property."""
    shapes = [(s, w) for w in probe.widths or [8] for s in ((3, w), (2, 5, w), (2, w, 3, 3), (2, w, 5))]
    for shape, width in shapes + [(s, s[-2] * s[-1]) for s in _planes(probe)]:
        x = torch.randn(shape, dtype=probe.dtype)
        try:
            y = probe(30 * x)  # large against any epsilon
        except Exception:
            continue
        if isinstance(y, Tensor) and y.is_floating_point() and y.shape == x.shape:
            return _norm(probe, x, y.double(), width) or _softmax(probe, x)
    return None


def _planes(probe: Probe) -> list[tuple[int, ...]]:
    """Inputs for a parameter of two dimensions: a scale for each feature of each head, a code for each place."""
    return [(2, 5, *t.shape) for t in probe.state.values() if t.dim() == 2]


def _norm(probe: Probe, x: Tensor, y: Tensor, width: int) -> OpInfo | None:
    """y = (x - m) / s * w + b, with a scale s (and mean m) per row or part of a row, and w and b per feature.

    b is what a row of zeros gives; then log|y - b| - log|x - m| is a sum of a part per row and a part per feature.
    """
    scaled = probe(90 * x).double()
    if not torch.allclose(scaled, y, rtol=1e-4, atol=1e-4 * float(y.abs().max())) or torch.equal(y, 30 * x):
        return None
    bias = probe(torch.zeros_like(x)).double()
    # None: the last two axes, heads and their features.
    axes: list[int | None] = [axis for axis in (-1, 1) if x.shape[axis] == width] or [None]
    for axis in axes if width > 1 else ():
        rows, out = ((t if axis is None else t.movedim(axis, -1)).reshape(-1, width).double() for t in (x, y - bias))
        for size in [n for n in range(width, 2, -1) if width % n == 0 and (n == width or axis != 1)] or [2]:
            parts, given = (t.reshape(len(t), -1, size) for t in (rows, out))
            for kind, part in (("rms_norm", parts), ("layer_norm", parts - parts.mean(-1, keepdim=True))):
                ratio = given / part
                separable = torch.allclose(ratio * ratio[:1, :, :1], ratio[:1] * ratio[:, :, :1], rtol=1e-3, atol=0)
                if (ratio != 0).all() and separable and (size == width or _apart(probe, x, y, parts)):
                    return OpInfo(kind, {"size": size}, "behaviour")
    return None


def _apart(probe: Probe, x: Tensor, y: Tensor, parts: Tensor) -> bool:
    """Whether each part of a row has a scale of its own, which cancels a factor of that part."""
    factors = torch.rand_like(parts[..., :1]) + 0.5
    scaled = probe((30 * parts * factors).reshape(x.shape).to(x.dtype)).double()
    return torch.allclose(scaled, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))


def _softmax(probe: Probe, x: Tensor) -> OpInfo | None:
    """Or its logarithm, at any temperature, along any axis."""
    y = probe(x.clone()).double()
    for axis in range(x.dim()):
        for log, logarithm in ((y.log(), False), (y, True)):
            if torch.allclose(log.exp().sum(axis), torch.ones((), dtype=y.dtype)):
                slopes = (log.diff(dim=axis) / x.diff(dim=axis)).flatten()
                if slopes.numel() and slopes[0] != 0 and torch.allclose(slopes, slopes[0].expand_as(slopes)):
                    return OpInfo("softmax", {"log": logarithm, "last": axis == x.dim() - 1}, "behaviour")
    return None


# --- 3. operations ---------------------------------------------------------------------------------------------------

_ARITHMETIC = frozenset({"elementwise_constant", "reshape", "identity", "widening_cast"})
_CORES = frozenset({
    "linear", "convolution", "transposed_convolution", "embedding", "layer_norm", "rms_norm", "group_norm",
})  # fmt: skip


def _table(probe: Probe) -> OpInfo | None:
    """A table of positions or of words with its own forward, called with indices, a shape, or nothing at all."""
    inputs: list[tuple[Any, ...]] = [()]
    if isinstance(probe.module, nn.Embedding):
        rows = min(5, probe.module.num_embeddings)
        inputs = [(torch.zeros(1, rows, dtype=torch.long, device="meta"),), (torch.Size((1, rows)),), ()]
    for given in inputs:
        x = given[0] if given and isinstance(given[0], Tensor) else torch.zeros(1, device="meta")
        try:
            flow = flow_of(probe, given, x)
        except Exception:
            continue
        if not flow.calls:  # it reads only the shape
            return OpInfo("position", {}, "operations")
        return _core(flow, x) or OpInfo("composite", {"flow": flow}, "operations")
    return None


def _operations(probe: Probe) -> OpInfo | None:
    for width in probe.widths or [8]:
        for shape in ((3, width), (2, 5, width), (2, width, 12, 12), (2, width, 12), *_planes(probe)):
            x = torch.randn(shape, dtype=torch.float64, device=probe.device)
            try:
                flow = dispatched(probe, x)
            except Exception:
                continue
            if flow.calls:
                routes = any(call.subject.kind == "routing" for call in flow.calls)
                kind = "routing" if routes else "composite"
                return _core(flow, x) or OpInfo(kind, {"flow": flow, "shape": shape}, "operations")
    return None


def _with_rank(subject: OpInfo, probe: Probe | None) -> OpInfo:
    """Add whether the outputs depend on fewer numbers than the input has: the derivative's rank at a random input."""
    shape = (1, *subject.facts.get("shape", ())[1:])
    if len(shape) == 4:  # for images, small ones suffice
        shape = (*shape[:2], 4, 4)
    deficient = None
    if probe and len(shape) > 1 and math.prod(shape) <= _DERIVATIVES:
        deficient = _attempt(lambda p: _deficient(p, torch.randn(shape, dtype=torch.float64)), probe)
    return OpInfo(subject.kind, {"flow": subject.facts["flow"], "deficient": deficient}, subject.found_by)


def _deficient(probe: Probe, x: Tensor) -> bool:
    """By finite differences, which also cover operators that autograd does not differentiate."""

    def outputs(x: Tensor) -> Tensor:
        with fixed_draws():
            out = tree_leaves(probe(x.clone()))
        return torch.cat([t.double().flatten() for t in out if isinstance(t, Tensor)])

    step = 1e-5
    units = torch.eye(x.numel(), dtype=torch.float64).reshape(-1, *x.shape)
    columns = [outputs(x + step * unit) - outputs(x - step * unit) for unit in units]
    rank = int(torch.linalg.matrix_rank(torch.stack(columns, 1) / step, rtol=1e-6))
    return rank < x.numel() - 2 * x.numel() // max(x.shape)  # two scalars per row are a residue


def _core(flow: Flow, x: Tensor) -> OpInfo | None:
    """The one operation beyond arithmetic with known numbers; arithmetic alone is a diagonal linear map."""
    cores = [call.subject for call in flow.calls if call.subject.kind not in _ARITHMETIC]
    if not flow.recovers(lambda call: True)[0] or len(cores) > 1:
        return None
    if any(call.subject.facts.get("noise") for call in flow.calls):
        return None
    if not cores and any(call.subject.kind == "elementwise_constant" for call in flow.calls):
        return OpInfo("linear", {"in": x.shape[-1], "out": x.shape[-1]}, "operations")
    if not cores or cores[0].kind not in _CORES:
        return None
    of_probe = (
        {"length", "size"} if cores[0].kind == "group_norm" else {"length"}
    )  # sizes of the probe's input, not of the module
    facts = {key: value for key, value in cores[0].facts.items() if key not in of_probe}
    return OpInfo(cores[0].kind, facts, "operations")
