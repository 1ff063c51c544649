"""Tell what a leaf module computes by running it on a few numbers (ways 2 and 3 of `identify`).

Probing works on meta-device modules and leaves the module and the global random state untouched.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

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
    """A module with random stand-ins for its parameters, called on double-precision inputs."""

    def __init__(self, module: nn.Module, *, meta: bool = False) -> None:
        """On the meta device it has shapes only."""
        self.module = module
        self.device = "meta" if meta else "cpu"
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.elements = sum(t.numel() for t in state.values())
        self.state = {n: self._stand_in(t) for n, t in state.items()}
        # What its input may measure: features of a matrix, channels of a kernel.
        shapes = [t.shape for t in self.state.values() if t.dim()]
        self.widths = list(dict.fromkeys(d for s in shapes for d in (s[-1], s[0], s[min(1, len(s) - 1)])))

    def _stand_in(self, t: Tensor) -> Tensor:
        # Positive, so that a slope or a scale among them does not flip a sign; float tensors only, the rest is zero.
        if t.is_floating_point():
            return torch.rand(t.shape, dtype=torch.float64, device=self.device) + 0.5
        return torch.zeros(t.shape, dtype=t.dtype, device=self.device)

    def __call__(self, *inputs: Any) -> Any:
        return torch.func.functional_call(self.module, self.state, inputs)


def by_probe(module: nn.Module) -> OpInfo:
    """Kind and facts of a module by its behaviour, or else by the operators that it dispatches."""
    # The grid of numbers is fixed; what is drawn comes from a private copy of the generator.
    with torch.no_grad(), fixed_draws():
        module = _detached(module)
        shapes = _Probe(module, meta=True)
        small = _Probe(module) if shapes.elements <= _PROBE_ELEMENTS else None
        tests = [(_elementwise, small), (_rotary, small), (_row_function, small), (_table, shapes)]
        for test, probe in [*tests, (_operations, shapes), (_operations, small)]:
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


def _rotary(probe: _Probe) -> OpInfo | None:
    positions = torch.arange(5).reshape(1, 5)
    out = probe(torch.zeros(1, 5, 8, dtype=torch.float64), positions)
    if not (isinstance(out, tuple) and len(out) == 2 and all(isinstance(t, Tensor) for t in out)):
        return None
    squares = out[0].double() ** 2 + out[1].double() ** 2
    return OpInfo("position", {}, "behaviour") if float((squares - squares.mean()).abs().max()) < 1e-3 else None


def _row_function(probe: _Probe) -> OpInfo | None:
    """Norms and softmax: functions of rows that are what defines them."""
    for width in probe.widths or [8]:
        for shape in ((3, width), (2, 5, width), (2, width, 3, 3), (2, width, 5)):
            x = torch.randn(shape, dtype=torch.float64)
            try:
                y = probe(30 * x)  # large against any epsilon
            except Exception:
                continue
            if isinstance(y, Tensor) and y.is_floating_point() and y.shape == x.shape:
                return _norm(probe, x, y.double(), width) or _softmax(probe, x)
    return None


def _norm(probe: _Probe, x: Tensor, y: Tensor, width: int) -> OpInfo | None:
    """y = (x - m) / s * w + b, with a scale s (and mean m) per row and w and b per feature.

    b is what a row of zeros gives; then log|y - b| - log|x - m| is a sum of a part per row and a part per feature.
    """
    scaled = probe(90 * x).double()
    if not torch.allclose(scaled, y, rtol=1e-4, atol=1e-4 * float(y.abs().max())) or torch.equal(y, 30 * x):
        return None
    y = y - probe(torch.zeros_like(x)).double()
    for axis in {-1, 1}:
        if x.shape[axis] == width and width > 1:
            for kind, rows in (("rms_norm", x), ("layer_norm", x - x.mean(axis, keepdim=True))):
                ratio = (y / rows).movedim(axis, -1).reshape(-1, width)
                if (ratio != 0).all() and torch.allclose(
                    ratio * ratio[0, 0], ratio[:1] * ratio[:, :1], rtol=1e-3, atol=0
                ):
                    return OpInfo(kind, {"size": width}, "behaviour")
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
_CORES = frozenset({"linear", "convolution", "transposed_convolution", "embedding"})


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
    facts = {key: value for key, value in cores[0].facts.items() if key != "length"}  # that of the probe
    return OpInfo(cores[0].kind, facts, "operations")
