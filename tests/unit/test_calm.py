"""Phases, barriers and partitions, on graphs small enough to work out by hand and on a T5."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import T5Config

from bwsk.classification.barriers import analyse, partition
from bwsk.classification.counts import Counts
from bwsk.classification.recorder import Operation
from bwsk.classification.trace import Trace, trace
from bwsk.errors import BwskError

TINY = T5Config(d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, vocab_size=50, decoder_start_token_id=0)


def _graph(*nodes: tuple[str, list[int], int]) -> Trace:
    """A trace of (verdict, inputs, FLOPs) in order; every tensor has 100 bytes."""
    kinds = {"S": "linear", "K": "relu"}
    operations = tuple(
        Operation(i, f"op{i}", kinds[v], v, v, None, None, "", f"block.{i}", True, flops, 10, 100,
                  0, tuple((u, 100) for u in inputs))
        for i, (v, inputs, flops) in enumerate(nodes)
    )  # fmt: skip
    return Trace(
        **vars(Counts.of(op.verdict for op in operations)),
        model="graph", rules="strict", setting={}, operations=operations, backward=None, parameter_bytes=0,
    )  # fmt: skip


#          0S -> 1K -> 2S -> 5K(2,4)
#          0S -> 3S -> 4S ---^
DIAMOND = _graph(("S", [], 1), ("K", [0], 1), ("S", [1], 1), ("S", [0], 1), ("S", [3], 1), ("K", [2, 4], 1))


def test_levels_count_barriers_on_the_worst_path():
    assert analyse(DIAMOND).levels == {0: 0, 1: 1, 2: 1, 3: 0, 4: 0, 5: 2}


def test_phases_are_connected_and_not_the_order_of_running():
    """0, 3 and 4 are one phase although 1 and 2 ran in between; 2 is behind the barrier 1."""
    calm = analyse(DIAMOND)
    assert [(phase.level, phase.operations) for phase in calm.phases] == [(0, 3), (1, 1)]


def test_separate_branches_of_a_level_are_separate_phases():
    calm = analyse(_graph(("S", [], 1), ("S", [], 1), ("K", [0, 1], 1)))
    assert len(calm.phases) == 2


def test_a_shortcut_around_a_barrier_does_not_join_its_sides():
    """u -> K -> v and u -> v: v waits for the barrier, so it is not in u's phase."""
    calm = analyse(_graph(("S", [], 1), ("K", [0], 1), ("S", [0, 1], 1)))
    assert [(p.level, p.operations) for p in calm.phases] == [(0, 1), (1, 1)]


def test_longest_chain():
    assert analyse(DIAMOND).chain == (1, 5)


def test_crossing_bytes_count_what_lives_across():
    # level 0 -> 1: op 0 (into 1) and op 4 (into 5); level 1 -> 2: op 2 and op 4
    assert analyse(DIAMOND).crossing_bytes == (200, 200)


def test_gray_is_a_barrier():
    gray = replace(DIAMOND.operations[3], verdict="GRAY")
    operations = tuple(gray if op.index == 3 else op for op in DIAMOND.operations)
    calm = analyse(replace(DIAMOND, operations=operations))
    assert [b.index for b in calm.barriers] == [1, 3, 5]


def test_the_parallelism_bound_is_work_over_the_longest_path():
    calm = analyse(DIAMOND)
    assert calm.parallelism_bound["flops"] == 6 / 4
    assert calm.s_share["count"] == 4 / 6


def _chain_of_barriers(loads: list[int]) -> Trace:
    return _graph(*[("S" if i == 0 else "K", [i - 1] if i else [], load) for i, load in enumerate(loads)])


def test_partition_finds_the_balanced_cut():
    cut = partition(_chain_of_barriers([5, 5, 5, 5]), 2)
    assert cut.flops == (10, 10)
    assert cut.balance == 1
    assert cut.cut_bytes == (100,)


def test_partition_prefers_less_traffic_within_the_slack():
    """Op 2 uses 0 and 1, so the even cut 50 : 50 moves two tensors; 48 : 52 moves one."""
    graph = _graph(("S", [], 48), ("K", [0], 2), ("K", [1, 0], 50))
    assert analyse(graph).crossing_bytes == (100, 200)
    assert partition(graph, 2).flops == (48, 52)
    heavier = _graph(("S", [], 40), ("K", [0], 10), ("K", [1, 0], 50))
    assert partition(heavier, 2).flops == (50, 50)  # 40 : 60 would leave the slack


@pytest.mark.parametrize("devices", [1, 2, 3, 4])
def test_partition_is_optimal_by_enumeration(devices):
    loads = [7, 1, 9, 4, 4, 2, 8]
    cut = partition(_chain_of_barriers(loads), devices)
    assert sum(cut.flops) == sum(loads)
    best = min(
        max(sum(loads[a:b]) for a, b in itertools.pairwise((0, *ends, len(loads))))
        for ends in itertools.combinations(range(1, len(loads)), devices - 1)
    )
    assert max(cut.flops) <= max(best, 1.1 * sum(loads) / devices)


@pytest.mark.parametrize("devices", [0, 4])
def test_too_many_or_no_devices(devices):
    with pytest.raises(BwskError, match="3 levels"):
        partition(DIAMOND, devices)


def test_nothing_to_cut():
    with pytest.raises(BwskError, match="nothing to cut"):
        partition(trace(nn.Identity(), inputs={"input": torch.ones(2)}), 1)


@pytest.fixture(scope="module")
def t5():
    return trace(TINY, batch=2, input_length=8, target_length=6)


def test_phases_and_barriers_cover_a_real_graph(t5):
    calm = analyse(t5)
    assert sum(phase.operations for phase in calm.phases) == t5.s
    assert len(calm.barriers) == t5.k
    assert len(calm.chain) == max(calm.levels.values())
    for op in t5.data:  # an edge never goes back, and rises exactly at barriers or where another input is deeper
        for u, _ in op.inputs:
            if u in calm.levels:
                assert calm.levels[u] + (op.verdict != "S") <= calm.levels[op.index]
    json.dumps(calm.to_dict(), allow_nan=False)


def test_encoder_states_cross_into_the_decoder(t5):
    """The first operation of the decoder's own attention does not wait for the encoder; its cross-attention does."""
    calm = analyse(t5)
    level = {op.module: calm.levels[op.index] for op in reversed(t5.data)}
    last_encoder = max(calm.levels[op.index] for op in t5.data if op.module.startswith("encoder."))
    assert level["decoder.block.0.layer.0.SelfAttention.q"] < last_encoder
    assert level["decoder.block.1.layer.1.EncDecAttention.k"] == last_encoder


def test_a_partition_of_a_real_graph(t5):
    calm = analyse(t5)
    cut = partition(t5, 2, calm)
    assert sum(cut.operations) == t5.total
    assert cut.cut_bytes[0] == calm.crossing_bytes[cut.last_levels[0]]
    assert 0.5 < cut.balance <= 1
