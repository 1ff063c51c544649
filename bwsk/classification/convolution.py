"""Which convolutions keep their input: from kernel, strides, padding, dilation and channels to S, K or GRAY.

A convolution is a linear map whose entries are the kernel's numbers. If one kernel makes it injective, almost all do
(its minors are polynomials in those numbers), so a construction is a proof:

- a kernel with a single 1 per output channel copies one input position, of one phase of the stride, into each window;
  enough output channels and a tap for each phase copy everything;
- or each window has at least as many output channels as numbers that it reads, and every position is read.

K is certain if a position is never read, or if the output has fewer numbers than the input. If neither S nor K can be
shown, the verdict is GRAY: it then depends on the length of the input, which a layer does not know. Without a given
length, the input is assumed to be long and a multiple of the stride. `kernel` is the kernel's extent (with dilation),
`padding` counts both ends.
"""

from __future__ import annotations

import math
from functools import cache

from bwsk.classification.operators import Facts
from bwsk.classification.witness import Verdict

_Axis = tuple[int, int, int, int, int | None]  # extent, stride, padding, dilation, length


def convolution(f: Facts) -> Verdict:
    """Whether a convolution with these facts preserves (S), erases (K), or whether that depends on more (GRAY)."""
    lengths = f.get("length", (None,) * len(f["kernel"]))
    axes = list(zip(f["kernel"], f["stride"], f["padding"], _dilation(f), lengths, strict=True))
    if not all(_reads_all(axis) for axis in axes):
        return Verdict.K
    taps = math.prod((k - 1) // d + 1 for k, _, _, d, _ in axes)
    copies = all(_copies_all(axis) for axis in axes) and f["out"] >= f["in"] * math.prod(f["stride"])
    if copies or f["out"] >= f["in"] * taps:
        return Verdict.S
    return Verdict.K if _fewer(f, [_windows(axis) for axis in axes]) else Verdict.GRAY


def transposed_convolution(f: Facts) -> Verdict:
    """The same for a transposed convolution, where a tap of the kernel copies an input into one phase of the output."""
    extra = f.get("output_padding", (0,) * len(f["kernel"]))
    lengths = f.get("length", (None,) * len(f["kernel"]))
    whole, written, taken = 1, f["out"], f["in"]
    spare = []
    for k, s, p, d, o, n in zip(f["kernel"], f["stride"], f["padding"], _dilation(f), extra, lengths, strict=True):
        whole *= len({t % s for t in range(0, k, d) if p // 2 <= t <= k - 1 - p // 2 + o})  # never cropped
        long = 1 if n is None else n  # without a length, count what one more input adds
        end = (long - 1) * s + k - p + o
        written *= len({t % s for t in range(0, k, d)} if n is None else _written(long, s, k, p, d, end))
        taken *= long
        spare.append(k - s - p + o)  # output - stride x input
    if f["out"] * whole >= f["in"]:
        return Verdict.S
    exact = "length" not in f and f["out"] * math.prod(f["stride"]) == f["in"] and max(spare) <= 0 > min(spare)
    return Verdict.K if written < taken or exact else Verdict.GRAY


def _written(length: int, stride: int, kernel: int, padding: int, dilation: int, end: int) -> set[int]:
    """Positions of a transposed convolution's output that depend on its input."""
    places = (i * stride + t - padding // 2 for i in range(length) for t in range(0, kernel, dilation))
    return {place for place in places if 0 <= place < end}


def _dilation(f: Facts) -> tuple[int, ...]:
    return f.get("dilation", (1,) * len(f["kernel"]))


def _windows(axis: _Axis) -> tuple[int, int]:
    """Number of windows and of positions; without a given length, those of a long input."""
    kernel, stride, padding, _, length = axis
    length = stride * (kernel + padding + 2) if length is None else length
    return max(0, (length + padding - kernel) // stride + 1), length


@cache
def _reads_all(axis: _Axis) -> bool:
    kernel, stride, padding, dilation, _ = axis
    windows, length = _windows(axis)
    read = {i * stride + t - padding // 2 for i in range(windows) for t in range(0, kernel, dilation)}
    return read.issuperset(range(length))


@cache
def _copies_all(axis: _Axis) -> bool:
    """For each phase there is a tap that finds all of its positions in windows that exist."""
    kernel, stride, padding, dilation, _ = axis
    windows, length = _windows(axis)
    for phase in range(min(stride, length)):
        last = (length - 1 - phase) // stride
        shifts = [phase + padding // 2 - t for t in range(0, kernel, dilation)]
        if not any(n % stride == 0 and 0 <= n // stride <= windows - 1 - last for n in shifts):
            return False
    return True


def _fewer(f: Facts, counts: list[tuple[int, int]]) -> bool:
    """Whether the output has fewer numbers than the input, at the given lengths or else asymptotically."""
    if "length" in f:
        return f["out"] * math.prod(n for n, _ in counts) < f["in"] * math.prod(n for _, n in counts)
    volume = f["in"] * math.prod(f["stride"])
    spare = [windows * stride - length for (windows, length), stride in zip(counts, f["stride"], strict=True)]
    return f["out"] < volume or (f["out"] == volume and max(spare) <= 0 > min(spare))
