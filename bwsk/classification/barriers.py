"""Phases and barriers: what the S/K verdicts say about order and parallelism, on the dataflow graph of a step.

The graph has the data's operations as nodes and "uses the output of" as edges. K and GRAY operations are **barriers**.
The *level* of an operation is the largest number of barriers on any path that ends in it. An **S-phase** is a maximal
connected set of S operations of one level. Everything in it can run, be inverted or be recomputed without waiting for a
barrier. The longest chain of barriers is the largest level.

    level(v) = max over inputs u of level(u), + 1 if v is a barrier

What this is not: the CALM theorem (Hellerstein & Alvaro, "Keeping CALM", CACM 63(9), 2020) says that a distributed
program has a consistent, coordination-free implementation exactly if it is monotone in its growing input. That is a
statement on sets of facts, not on invertibility: a ReLU erases and needs no coordination (it is pointwise, so every
shard computes its own part), while an invertible matrix product over a sharded axis needs a sum. `pointwise` barriers
are therefore counted separately.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from bwsk.classification.recorder import Operation
from bwsk.classification.rules.rule import POINTWISE
from bwsk.classification.trace import Trace
from bwsk.errors import BwskError

_SLACK = 1.1  # a stage may have this many times its even share of the FLOPs if that saves traffic


@dataclass(frozen=True)
class Phase:
    """A maximal connected set of S operations of one level."""

    level: int
    operations: int
    flops: int
    bytes: int
    module: str  # the path that all of its modules share


@dataclass(frozen=True)
class Barrier:
    """A K or GRAY operation, with the bytes that come in and go out."""

    index: int
    operator: str
    kind: str
    verdict: str
    module: str
    level: int
    in_bytes: int
    out_bytes: int
    pointwise: bool


@dataclass(frozen=True)
class Partition:
    """`devices` stages of consecutive levels: the last level, FLOPs and operations of each, and the bytes between."""

    devices: int
    last_levels: tuple[int, ...]
    flops: tuple[int, ...]
    operations: tuple[int, ...]
    cut_bytes: tuple[int, ...]

    @property
    def balance(self) -> float | None:
        """Even share over the largest stage: 1 is perfect."""
        return sum(self.flops) / len(self.flops) / max(self.flops) if max(self.flops) else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"balance": self.balance, "cut_bytes_total": sum(self.cut_bytes)}


@dataclass(frozen=True)
class BarrierAnalysis:
    """Phases, barriers and parallelism of a traced step."""

    phases: tuple[Phase, ...]
    barriers: tuple[Barrier, ...]
    chain: tuple[int, ...]  # operations of one longest chain of barriers, in order
    crossing_bytes: tuple[int, ...]  # [d]: activations made at level <= d and used above it
    s_share: dict[str, float | None]  # of operations, FLOPs, bytes: the published parallelism ratio
    parallelism_bound: dict[str, float | None]  # all work / longest path: the most devices that it could keep busy
    levels: dict[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the levels, ready for strict JSON."""
        return {
            "phases": [asdict(p) for p in self.phases],
            "barriers": [asdict(b) for b in self.barriers],
            "pointwise_barriers": sum(b.pointwise for b in self.barriers),
            "chain_length": len(self.chain),
            "chain": list(self.chain),
            "crossing_bytes": list(self.crossing_bytes),
            "s_share": self.s_share,
            "parallelism_bound": self.parallelism_bound,
        }


def analyse(trace: Trace) -> BarrierAnalysis:
    """Phases, barriers, crossing traffic and parallelism of the forward pass, under the trace's rules."""
    operations = trace.data
    known = {op.index for op in operations}
    inputs = {op.index: [(u, n) for u, n in op.inputs if u in known] for op in operations}
    levels: dict[int, int] = {}
    before: dict[int, int | None] = {}  # the input that the level comes from
    for op in operations:  # in the order they ran, so inputs come first
        top = max(inputs[op.index], key=lambda edge: levels[edge[0]], default=None)
        levels[op.index] = (levels[top[0]] if top else 0) + (op.verdict != "S")
        before[op.index] = top[0] if top else None
    by_index = {op.index: op for op in operations}
    return BarrierAnalysis(
        phases=_phases(operations, inputs, levels),
        barriers=tuple(
            Barrier(op.index, op.operator, op.kind, op.verdict, op.module, levels[op.index],
                    sum(n for _, n in inputs[op.index]), op.out_bytes, op.kind in POINTWISE)
            for op in operations if op.verdict != "S"
        ),
        chain=_chain(by_index, levels, before),
        crossing_bytes=_crossing(operations, inputs, levels),
        s_share={name: _share(operations, weight) for name, weight in _WEIGHTS.items()},
        parallelism_bound={name: _parallelism(operations, inputs, weight) for name, weight in _WEIGHTS.items()},
        levels=levels,
    )  # fmt: skip


_WEIGHTS: dict[str, Callable[[Operation], int]] = {
    "count": lambda op: 1,
    "flops": lambda op: op.flops,
    "bytes": lambda op: op.bytes,
}
_Edges = dict[int, list[tuple[int, int]]]


def _share(operations: list[Operation], weight: Callable[[Operation], int]) -> float | None:
    total = sum(map(weight, operations))
    return sum(weight(op) for op in operations if op.verdict == "S") / total if total else None


def _parallelism(operations: list[Operation], inputs: _Edges, weight: Callable[[Operation], int]) -> float | None:
    """Total work over the heaviest path (Brent): the largest speed-up that any number of devices can give."""
    finish: dict[int, int] = {}
    for op in operations:
        finish[op.index] = weight(op) + max((finish[u] for u, _ in inputs[op.index]), default=0)
    longest = max(finish.values(), default=0)
    return sum(map(weight, operations)) / longest if longest else None


def _phases(operations: list[Operation], inputs: _Edges, levels: dict[int, int]) -> tuple[Phase, ...]:
    """Union-find over edges between S operations of one level."""
    parent = {op.index: op.index for op in operations if op.verdict == "S"}

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for index in parent:
        for u, _ in inputs[index]:
            if u in parent and levels[u] == levels[index]:
                parent[root(index)] = root(u)
    groups: dict[int, list[Operation]] = defaultdict(list)
    for op in operations:
        if op.index in parent:
            groups[root(op.index)].append(op)
    return tuple(
        Phase(levels[g[0].index], len(g), sum(op.flops for op in g), sum(op.bytes for op in g), _common(g))
        for g in sorted(groups.values(), key=lambda g: (levels[g[0].index], g[0].index))
    )


def _common(group: list[Operation]) -> str:
    """The longest module path that is a prefix of all."""
    paths = [op.module.split(".") if op.module else [] for op in group]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _chain(by_index: dict[int, Operation], levels: dict[int, int], before: dict[int, int | None]) -> tuple[int, ...]:
    at: int | None = max(levels, key=lambda i: levels[i], default=None)
    chain = []
    while at is not None:
        if by_index[at].verdict != "S":
            chain.append(at)
        at = before[at]
    return tuple(reversed(chain))


def _crossing(operations: list[Operation], inputs: _Edges, levels: dict[int, int]) -> tuple[int, ...]:
    """Bytes of activations that live across each level boundary; a view is its base's storage, counted once."""
    base: dict[int, int] = {}
    for op in operations:
        view = op.bytes == 0 and len(inputs[op.index]) == 1
        base[op.index] = base[inputs[op.index][0][0]] if view else op.index
    size: dict[int, int] = defaultdict(int)
    last: dict[int, int] = {}
    for op in operations:
        for u, n in inputs[op.index]:
            b = base[u]
            size[b] = max(size[b], n)
            last[b] = max(last.get(b, 0), levels[op.index])
    change = [0] * (max(levels.values(), default=0) + 1)
    for b, end in last.items():
        if end > levels[b]:
            change[levels[b]] += size[b]
            change[end] -= size[b]
    total, crossing = 0, []
    for step in change[:-1]:
        total += step
        crossing.append(total)
    return tuple(crossing)


def partition(trace: Trace, devices: int, calm: BarrierAnalysis | None = None) -> Partition:
    """Cut the step into `devices` stages at barriers, with the least traffic that leaves the stages balanced.

    Stages are runs of consecutive levels. Among all cuts whose largest stage is within 10 % of the even share (or of
    the best possible, where one level outweighs that), those with the fewest bytes across are taken. A tensor that
    skips a stage is passed on and counts at each cut. Raises `BwskError` if there are fewer levels than devices.
    """
    calm = calm or analyse(trace)
    count = max(calm.levels.values(), default=-1) + 1
    if not count:
        raise BwskError(f"{trace.model}: runs no operation on its input; there is nothing to cut")
    if not 1 <= devices <= count:
        raise BwskError(f"{devices} devices: the graph has {count} levels between barriers; give 1 to {count}")
    load, number = [0] * count, [0] * count
    for op in trace.data:
        load[calm.levels[op.index]] += op.flops
        number[calm.levels[op.index]] += 1
    sums = [0]
    for x in load:
        sums.append(sums[-1] + x)
    best = _cuts(sums, calm.crossing_bytes, devices, math.inf, by_load=True)[0]
    limit = max(best, _SLACK * sums[-1] / devices)
    ends = _cuts(sums, calm.crossing_bytes, devices, limit, by_load=False)[1]
    starts = [0, *ends[:-1]]
    return Partition(
        devices,
        tuple(e - 1 for e in ends),
        tuple(sums[e] - sums[s] for s, e in zip(starts, ends, strict=True)),
        tuple(sum(number[s:e]) for s, e in zip(starts, ends, strict=True)),
        tuple(calm.crossing_bytes[e - 1] for e in ends[:-1]),
    )


def _cuts(
    sums: list[int], crossing: tuple[int, ...], stages: int, limit: float, *, by_load: bool
) -> tuple[float, list[int]]:
    """Dynamic program over (stages, end level): least largest load, or least traffic with no load above `limit`."""
    count = len(sums) - 1
    cost = [[math.inf] * (count + 1) for _ in range(stages + 1)]
    back = [[0] * (count + 1) for _ in range(stages + 1)]
    cost[0][0] = 0
    for stage in range(1, stages + 1):
        for end in range(stage, count + 1):
            for start in range(stage - 1, end):
                load = sums[end] - sums[start]
                if load > limit or cost[stage - 1][start] == math.inf:
                    continue
                traffic = crossing[start - 1] if start else 0
                total = max(cost[stage - 1][start], load) if by_load else cost[stage - 1][start] + traffic
                if total < cost[stage][end]:
                    cost[stage][end], back[stage][end] = total, start
    ends, end = [], count
    for stage in range(stages, 0, -1):
        ends.append(end)
        end = back[stage][end]
    return cost[stages][count], ends[::-1]
