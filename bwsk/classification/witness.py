"""Witnesses: executable evidence that an operation preserves or erases its input.

A *case* is one concrete operation (a small real module, or one operator call) with evidence that a machine checks:

- **inverse** (evidence for S): `invert(f, f(x), r) = x`, bit-exactly or within a stated bound of 1 % at most, where the
  residue `r = keep(f, x)` has no more than the declared size and the state of a generator is the same whatever `x` is.
  The parameters of `f` are known. Only `x` is to be recovered, which is drawn at random and not constant.
- **collision** (evidence for K): inputs `a != b` with bit-identical `f(a) = f(b)`. The two must differ by at least
  0.1 somewhere and stay below 32 in size, in double precision, which distinguishes erasure from mere rounding.
  A case marked `saturates` shows a collision that float32 alone makes (a tanh at its plateau).

Checks draw from their own generators and never touch the global random state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor


class Verdict(StrEnum):
    """S preserves its input, K erases some of it, GRAY cannot be decided (context dependent, or unknown)."""

    S = "S"
    K = "K"
    GRAY = "GRAY"


class Residue(StrEnum):
    """What must be saved beside the output to recover the input; from ROW on it is counted in elements."""

    NOTHING = "nothing"
    RNG = "an RNG state"
    ROW = "scalars per row"
    BIT = "one bit per element"
    EVERYTHING = "everything"

    @property
    def vanishing(self) -> bool:
        """Whether it does not grow with the elements of a row: the line between S and K."""
        return self in (Residue.NOTHING, Residue.RNG, Residue.ROW)


class WitnessError(AssertionError):
    """A witness that does not prove its verdict; the message says why."""


@dataclass(frozen=True)
class WitnessCase:
    """One concrete operation and the evidence about it.

    `make(generator)` builds the operation; `sample(generator)` an input, `pair(operation, generator)` two colliding
    ones. `keep(operation, *x)` is the residue and `invert(operation, y, residue)` recovers the input, with an error of
    at most `bound` times the largest element (0: bit-exact). A K case whose residue is not EVERYTHING needs both.
    """

    name: str
    make: Callable[[torch.Generator], Any]
    sample: Callable[[torch.Generator], Any] | None = None
    invert: Callable[[Any, Any, Any], Any] | None = None
    keep: Callable[..., Any] | None = None
    pair: Callable[[Any, torch.Generator], tuple[Any, Any]] | None = None
    residue: Residue = Residue.NOTHING
    bound: float = 0.0
    saturates: bool = False

    @property
    def verdict(self) -> Verdict:
        """What the evidence is evidence for."""
        return Verdict.S if self.pair is None else Verdict.K

    @cache  # noqa: B019 - cases are few, frozen and live as long as the process
    def check(self, seed: int = 0) -> None:
        """Run the evidence; raises `WitnessError` if it does not hold. A check that has passed is not run twice."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad(), fixed_draws():
            operation = self.make(generator)
            if self.pair is not None:
                self._check_collision(operation, *self.pair(operation, generator))
            if self.pair is None or self.residue is not Residue.EVERYTHING:
                self._check_inverse(operation, generator)

    def _check_collision(self, operation: Any, a: Any, b: Any) -> None:
        a, b = _tensors(a), _tensors(b)
        if [x.shape for x in a] != [x.shape for x in b]:
            raise WitnessError(f"{self.name}: its two inputs have different shapes")
        if any(x.is_complex() or x.numel() == 0 for x in a + b):
            raise WitnessError(f"{self.name}: its inputs are complex or empty; give real numbers")
        gap = max(float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True))
        size = max(float(x.double().abs().max()) for x in a + b)
        if not self.saturates:
            if not (gap >= 0.1 and size <= 32):  # written so that NaN fails too
                raise WitnessError(f"{self.name}: inputs {gap:g} apart and up to {size:g} in size prove rounding only")
            if any(x.is_floating_point() and x.dtype != torch.float64 for x in a + b):
                raise WitnessError(f"{self.name}: collides in less than double precision")
        elif gap == 0:
            raise WitnessError(f"{self.name}: the two inputs are the same")
        left, right = run(operation, *a), run(operation, *b)
        if not all(torch.equal(x, y) for x, y in zip(left, right, strict=True)):
            raise WitnessError(f"{self.name}: the two inputs have different outputs")

    def _check_inverse(self, operation: Any, generator: torch.Generator) -> None:
        if self.invert is None or self.sample is None:
            raise WitnessError(f"{self.name}: no inverse given")
        x = _tensors(self.sample(generator))
        other = _tensors(self.sample(generator))
        kept = None if self.keep is None else self.keep(operation, *x)
        _check_size(self.name, self.residue, kept, x)
        if not self.bound <= 0.01:
            raise WitnessError(f"{self.name}: a bound of {self.bound:g} proves nothing; 0.01 at most")
        if self.residue is Residue.RNG:
            assert self.keep is not None  # else its residue would have been empty
            if not all(map(torch.equal, _tensors(kept), _tensors(self.keep(operation, *other)))):
                raise WitnessError(f"{self.name}: its RNG state depends on the input")
        elif x and all(map(torch.equal, x, other)):
            raise WitnessError(f"{self.name}: its sample is always the same, so an inverse may know it by heart")
        y = run(operation, *x)
        back = _tensors(self.invert(operation, y[0] if len(y) == 1 else y, kept))
        for t, u in zip(x, back, strict=True):
            if t.shape != u.shape:
                raise WitnessError(f"{self.name}: recovered shape {tuple(u.shape)} for {tuple(t.shape)}")
            limit = self.bound * float(t.double().abs().max())
            error = float((t.double() - u.double()).abs().max())
            if not error <= limit:
                raise WitnessError(f"{self.name}: input recovered with error {error:g}, bound {limit:g}")


@contextmanager
def fixed_draws(seed: int = 7) -> Iterator[None]:
    """Inside, torch's CPU generator starts from `seed`; afterwards it is where it was. Devices are not touched."""
    generator = torch.default_generator  # torch.manual_seed would also seed every accelerator, which costs milliseconds
    state = generator.get_state()
    try:
        generator.manual_seed(seed)
        yield
    finally:
        generator.set_state(state)


def run(operation: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Outputs of `operation` on copies of `inputs`, with the same random draws each time it is called."""
    with fixed_draws():
        return _tensors(operation(*(t.clone() for t in inputs)))


def _tensors(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _check_size(name: str, residue: Residue, kept: Any, x: tuple[Tensor, ...]) -> None:
    """Check that the residue has the declared size, so that an 'inverse' cannot simply save its input."""
    tensors = () if kept is None else _tensors(kept)
    elements = sum(t.numel() for t in x)
    rows = sum(max(1, t.numel() // max(1, t.shape[-1] if t.dim() else 1)) for t in x)
    if residue is Residue.NOTHING:
        fits = not tensors
    elif residue is Residue.ROW:
        fits = bool(tensors) and sum(t.numel() for t in tensors) <= 2 * rows < elements
    elif residue is Residue.BIT:
        fits = (
            bool(tensors)
            and all(t.dtype == torch.bool for t in tensors)
            and sum(t.numel() for t in tensors) <= elements
        )
    elif residue is Residue.RNG:
        fits = bool(tensors) and all(t.dtype == torch.uint8 for t in tensors)  # how torch holds a generator's state
    else:
        fits = False
    if not fits:
        raise WitnessError(f"{name}: its residue is not '{residue}'")
