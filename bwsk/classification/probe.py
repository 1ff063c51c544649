"""Tell what a leaf module computes by running it on a few numbers (ways 2 and 3 of `identify`).

Probing works on meta-device modules and leaves the module and the global random state untouched.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bwsk._compat import tree_leaves
from bwsk.classification.dataflow import Flow, dispatched
from bwsk.classification.operators import OpInfo
from bwsk.classification.witness import fixed_draws

_MACHINERY = frozenset(vars(nn.Module())) - {"training"}
_DERIVATIVES = 1024  # of inputs of more elements none are taken
_PROBE_ELEMENTS = 1 << 23  # stand-in parameters of more elements than this are not made


def probe_key(module: nn.Module) -> Any:
    """What a module's outcome can depend on: class, shapes, settings, and which functions and configs it holds."""
    state = tuple((n, tuple(t.shape)) for n, t in [*module.named_parameters(), *module.named_buffers()])
    plain = (bool, int, float, str, tuple, type(None))
    own = sorted(
        (k, repr(v) if isinstance(v, plain) else id(v)) for k, v in vars(module).items() if k not in _MACHINERY
    )
    return type(module), state, tuple(own)


class _Probe:
    """A module with random stand-ins for its parameters, called on inputs of one precision."""

    def __init__(self, module: nn.Module, *, meta: bool = False, dtype: torch.dtype = torch.float64) -> None:
        """On the meta device it has shapes only."""
        self.module = module
        self.device = "meta" if meta else "cpu"
        self.dtype = dtype
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.elements = sum(t.numel() for t in state.values())
        self.state = {n: self._stand_in(t) for n, t in state.items()}
        # What its input may measure: features of a matrix, channels of a kernel.
        shapes = [t.shape for t in self.state.values() if t.dim()]
        self.widths = list(dict.fromkeys(d for s in shapes for d in (s[-1], s[0], s[min(1, len(s) - 1)])))

    def _stand_in(self, t: Tensor) -> Tensor:
        # Positive, so that a slope or a scale among them does not flip a sign; float tensors only, the rest is zero.
        if t.is_floating_point():
            return torch.rand(t.shape, dtype=self.dtype, device=self.device) + 0.5
        return torch.zeros(t.shape, dtype=t.dtype, device=self.device)

    def __call__(self, *inputs: Any) -> Any:
        # A twin each time: what one call keeps for the next would pass for what the module computes.
        return torch.func.functional_call(_detached(self.module), self.state, inputs)


def by_probe(module: nn.Module) -> OpInfo:
    """Kind and facts of a module by its behaviour, or else by the operators that it dispatches."""
    # The grid of numbers is fixed; what is drawn comes from a private copy of the generator.
    with torch.no_grad(), fixed_draws():
        shapes = _Probe(module, meta=True)
        runs = shapes.elements <= _PROBE_ELEMENTS
        small = _Probe(module) if runs else None
        single = _Probe(module, dtype=torch.float32) if runs else None  # some cast their input to what their weight was
        table = _Probe(_narrow(module)) if isinstance(module, nn.Embedding) else small
        tests = [(_elementwise, small), (_position, table), (_row_function, small), (_row_function, single)]
        tests += [(_table, shapes), (_lookup, table), (_operations, shapes), (_operations, small)]
        for test, probe in tests:
            found = _attempt(test, probe) if probe else None
            if found:
                return _with_rank(found, small) if "flow" in found.facts else found
        return OpInfo("unknown", {"class": type(module).__name__}, "none")


def _detached(module: nn.Module) -> nn.Module:
    """A copy without hooks, with the same parameters: a forward may count its calls, or keep a mask of the probe's."""
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, (dict, list, set)):
            vars(twin)[name] = type(value)() if name.endswith("_hooks") else copy.copy(value)
    return twin


def _narrow(module: nn.Embedding) -> nn.Embedding:
    """The same table with rows of at most eight numbers: which row is looked up does not hang on its length."""
    twin = _detached(module)
    width = min(8, module.embedding_dim)
    twin._parameters = {
        n: None if p is None else nn.Parameter(p[..., :width] if p.shape[-1:] == (module.embedding_dim,) else p)
        for n, p in module._parameters.items()
    }
    twin.embedding_dim = width
    return twin


def _attempt(test: Callable[[_Probe], OpInfo | None], probe: _Probe) -> OpInfo | None:
    try:
        return test(probe)
    except Exception:  # the probe's inputs were not what this module takes: then it is not of this kind
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


def _elementwise(probe: _Probe) -> OpInfo | None:
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


def _clamps(probe: _Probe) -> bool:
    """Whether a plateau far out is meant (a clamp runs) and is not what rounding makes of a tanh or an exponential."""
    steps = dispatched(probe, _GRID.reshape(1, -1).clone()).steps
    return any(step.subject.kind == "erasing_elementwise" for step in steps)


def _random_zeroing(probe: _Probe) -> OpInfo | None:
    """Dropout of elements or of whole rows (stochastic depth): every output is zero or x / (1 - p)."""
    x = _GRID[_GRID != 0]
    y = torch.cat([probe(x.reshape(1, -1).clone()).reshape(-1).double() for _ in range(8)])
    factors = (y / x.repeat(8))[y != 0]
    if factors.numel() and float(factors.max() - factors.min()) < 1e-6:
        return OpInfo("dropout", {"p": round(1 - 1 / float(factors[0]), 6), "training": True}, "behaviour")
    return None


_PLACES = 5


def _position(probe: _Probe) -> OpInfo | None:
    """A code of its own for each place, with no activation in it: rotary, sinusoidal and learned positions."""
    for given in _places(probe):
        try:
            codes, again = _codes(probe(*given)), _codes(probe(*given))
            reads = _is_real(given[0]) and dispatched(lambda _, given=given: probe(*given), given[0]).reads
        except Exception:
            continue
        if codes is None or again is None or not torch.equal(codes, again) or reads:  # drawn, or made of data
            continue
        views = (codes.flatten(0, -2), *((codes.flatten(1).T,) if codes.dim() > 2 else ()))
        for rows in views:  # the code lies in the last dimension or, of an image, in the first
            if len(rows) >= _PLACES and len(rows.unique(dim=0)) == len(rows):
                return OpInfo("position", {}, "behaviour")
    return None


def _places(probe: _Probe) -> Iterator[tuple[Any, ...]]:
    """What position modules are fed: activations, a mask, a shape or a length, none of which tells the places apart.

    Or the positions themselves beside an activation, with the type of the layer where the module knows several.
    """
    where, mask = torch.arange(_PLACES).reshape(1, _PLACES), torch.ones(1, _PLACES, dtype=torch.long)
    grid = torch.cartesian_prod(torch.arange(2), torch.arange(_PLACES))
    config = getattr(probe.module, "config", None)
    layers = getattr(probe.module, "layer_types", None) or getattr(config, "layer_types", None) or ()
    for width in probe.widths or [8]:
        x = torch.randn(1, _PLACES, width, dtype=probe.dtype)
        for positions in (where, where.expand(3, 1, _PLACES), grid, grid[None]):
            yield x, positions
            for layer in sorted(set(layers)):
                yield x, positions, layer
        yield (x,)
        yield torch.Size((1, width, _PLACES, _PLACES)), x.device, x.dtype
    yield (mask,)
    yield (mask[None],)
    yield (mask.shape,)
    yield mask.shape, mask.device
    yield (_PLACES,)


def _codes(out: Any) -> Tensor | None:
    """The floating point tensors of an output, side by side and without a batch of one; None if they hold no rows."""
    tensors = [torch.view_as_real(t).flatten(-2) if t.is_complex() else t for t in tree_leaves(out) if _is_real(t)]
    if not tensors or any(t.shape[:-1] != tensors[0].shape[:-1] for t in tensors):
        return None
    codes = torch.cat([t.double() for t in tensors], -1)
    while codes.dim() > 2 and len(codes) == 1:
        codes = codes[0]
    return codes if codes.dim() >= 2 else None


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _row_function(probe: _Probe) -> OpInfo | None:
    """Norms and softmax: functions of rows that are what defines them."""
    shapes = [(s, w) for w in probe.widths or [8] for s in ((3, w), (2, 5, w), (2, w, 3, 3), (2, w, 5))]
    heads = [tuple(t.shape) for t in probe.state.values() if t.dim() == 2]  # a scale for each feature of each head
    for shape, width in shapes + [((2, 5, *s), math.prod(s)) for s in heads]:
        x = torch.randn(shape, dtype=probe.dtype)
        try:
            y = probe(30 * x)  # large against any epsilon
        except Exception:
            continue
        if isinstance(y, Tensor) and y.is_floating_point() and y.shape == x.shape:
            return _norm(probe, x, y.double(), width) or _softmax(probe, x)
    return None


def _norm(probe: _Probe, x: Tensor, y: Tensor, width: int) -> OpInfo | None:
    """y = (x - m) / s * w + b, with a scale s (and mean m) per row or part of a row, and w and b per feature.

    b is what a row of zeros gives; then log|y - b| - log|x - m| is a sum of a part per row and a part per feature.
    """
    scaled = probe(90 * x).double()
    if not torch.allclose(scaled, y, rtol=1e-4, atol=1e-4 * float(y.abs().max())) or torch.equal(y, 30 * x):
        return None
    y, x = y - probe(torch.zeros_like(x)).double(), x.double()
    axes = [axis for axis in (-1, 1) if x.shape[axis] == width] or [None]  # None: all but the first two dimensions
    sizes = [n for n in range(width, 2, -1) if width % n == 0] or [2]
    for axis, size in ((axis, size) for axis in axes for size in sizes if width > 1):
        parts, out = (
            (t if axis is None else t.movedim(axis, -1)).reshape(-1, width // size, size) for t in (x, y)
        )  # rows, parts of a row, features of a part
        for kind, rows in (("rms_norm", parts), ("layer_norm", parts - parts.mean(-1, keepdim=True))):
            ratio = out / rows
            if (ratio != 0).all() and torch.allclose(
                ratio * ratio[:1, :, :1], ratio[:1] * ratio[:, :, :1], rtol=1e-3, atol=0
            ):
                return OpInfo(kind, {"size": size}, "behaviour")
    return None


def _softmax(probe: _Probe, x: Tensor) -> OpInfo | None:
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


def _table(probe: _Probe) -> OpInfo | None:
    """A table of positions or of words with a forward of its own: fed indices, a shape, or nothing at all."""
    inputs: list[tuple[Any, ...]] = [()]
    if isinstance(probe.module, nn.Embedding):
        rows = min(5, probe.module.num_embeddings)
        inputs = [(torch.zeros(1, rows, dtype=torch.long, device="meta"),), (torch.Size((1, rows)),), ()]
    for given in inputs:
        x = given[0] if given and isinstance(given[0], Tensor) else torch.zeros(1, device="meta")
        try:
            flow = dispatched(lambda _, given=given: probe(*given), x)
        except Exception:
            continue
        if not flow.steps:  # the shape is all that it looks at
            return OpInfo("position", {}, "operations")
        return _core(flow, x) or OpInfo("composite", {"flow": flow}, "operations")
    return None


def _lookup(probe: _Probe) -> OpInfo | None:
    """A row for each index, the same wherever it stands and no other index's; numbers that are no index are refused."""
    count = getattr(probe.module, "num_embeddings", _PLACES)
    index = torch.randperm(count).reshape(1, count)
    rows = probe(index)
    if not _is_real(rows) or rows.shape[:-1] != index.shape or len(rows[0].unique(dim=0)) < count:
        return None
    if not torch.equal(probe(index.flip(1)), rows.flip(1)) or not torch.equal(probe(index[:, :1]), rows[:, :1]):
        return None
    try:
        probe(index.double())
    except Exception:
        return OpInfo("embedding", {"rows": count, "out": rows.shape[-1]}, "behaviour")
    return None


def _operations(probe: _Probe) -> OpInfo | None:
    for width in probe.widths or [8]:
        for shape in ((3, width), (2, 5, width), (2, width, 12, 12), (2, width, 12)):
            x = torch.randn(shape, dtype=torch.float64, device=probe.device)
            try:
                flow = dispatched(probe, x)
            except Exception:
                continue
            if flow.steps:
                routes = any(step.subject.kind == "routing" for step in flow.steps)
                kind = "routing" if routes else "composite"
                return _core(flow, x) or OpInfo(kind, {"flow": flow, "shape": shape}, "operations")
    return None


def _with_rank(subject: OpInfo, probe: _Probe | None) -> OpInfo:
    """Also whether the outputs depend on fewer numbers than go in: the rank of the derivative at a random input."""
    shape = (1, *subject.facts.get("shape", ())[1:])
    if len(shape) == 4:  # images: small ones will do
        shape = (*shape[:2], 4, 4)
    deficient = None
    if probe and len(shape) > 1 and math.prod(shape) <= _DERIVATIVES:
        deficient = _attempt(lambda p: _deficient(p, torch.randn(shape, dtype=torch.float64)), probe)
    return OpInfo(subject.kind, {"flow": subject.facts["flow"], "deficient": deficient}, subject.how)


def _deficient(probe: _Probe, x: Tensor) -> bool:
    """Differences, not derivatives: they see what autograd does not."""

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
    """The one operation that is more than arithmetic with known numbers; arithmetic alone is a diagonal linear map."""
    cores = [step.subject for step in flow.steps if step.subject.kind not in _ARITHMETIC]
    if not flow.kept(lambda step: True)[0] or len(cores) > 1:
        return None
    if any(step.subject.facts.get("noise") for step in flow.steps):
        return None
    if not cores and any(step.subject.kind == "elementwise_constant" for step in flow.steps):
        return OpInfo("linear", {"in": x.shape[-1], "out": x.shape[-1]}, "operations")
    if not cores or cores[0].kind not in _CORES:
        return None
    of_probe = {"length", "size"} if cores[0].kind == "group_norm" else {"length"}  # sizes that are the probe's
    facts = {key: value for key, value in cores[0].facts.items() if key not in of_probe}
    return OpInfo(cores[0].kind, facts, "operations")
