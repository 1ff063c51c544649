"""Trainings killed at seeded random points end with the bytes of undisturbed ones.

Points are drawn over the calls of bwsk's functions (mid-step, mid-validation, …), over the operations on files (between
any two of a checkpoint's or an output's writes, between best model and checkpoint), and over the clock (inside of
whatever runs then). Every kill is SIGKILL to a real process; what continues is the same command line.
"""

from __future__ import annotations

import random
import signal
from collections import Counter

import pytest

from tests.faults.conftest import CASES, Cases
from tests.faults.harness import SIGKILL, finish_and_compare, killed_then_same, kind_of_place

SEED = 20260106
full = pytest.mark.faults
ALL = list(CASES)


def points(count: int) -> list[tuple[str, int]]:
    """`count` pairs (case, seed), over all cases."""
    return [(ALL[index % len(ALL)], SEED + index) for index in range(count)]


# Entries into the writing of a folder of outputs, and a file of each whose half is more than all files before it: there
# the process ends. Weights would show little, safetensors itself writes them under another name.
OUTPUTS = [(1, "out/tokenizer.json"), (3, "curves/train.csv")]


def killed_inside(cases: Cases, name: str, at: int, file: str) -> None:
    """Kill the process in the middle of the write of an output, and go on."""
    reference, _, _ = cases.reference(name)
    kill = {"events": "outputs", "at": at, "inside": cases.sizes[name][file] // 2}
    told = killed_then_same(cases.server, cases.training(name), reference, kill=kill)
    assert told["status"] == -signal.SIGXFSZ, told


def at_event(cases: Cases, figures: Counter[str], name: str, seed: int, events: str) -> None:
    reference, counts, _ = cases.reference(name)
    at = random.Random(seed).randint(1, counts[events])
    told = killed_then_same(cases.server, cases.training(name), reference, kill={"events": events, "at": at})
    assert told["status"] == SIGKILL, told
    figures["kills"] += 1
    figures[f"kills in {kind_of_place(told['place'])}"] += 1


@pytest.mark.parametrize(("name", "seed"), points(5))
def test_killed_at_an_operation_on_files(cases: Cases, figures: Counter[str], name: str, seed: int) -> None:
    at_event(cases, figures, name, seed, "files")


@pytest.mark.parametrize(("name", "seed"), points(3))
def test_killed_in_a_function(cases: Cases, figures: Counter[str], name: str, seed: int) -> None:
    at_event(cases, figures, name, seed, "calls")


@full
@pytest.mark.parametrize(("name", "seed"), points(42)[5:])
def test_killed_at_many_operations_on_files(cases: Cases, figures: Counter[str], name: str, seed: int) -> None:
    at_event(cases, figures, name, seed, "files")


@full
@pytest.mark.parametrize(("name", "seed"), points(42)[3:])
def test_killed_in_many_functions(cases: Cases, figures: Counter[str], name: str, seed: int) -> None:
    at_event(cases, figures, name, seed, "calls")


@pytest.mark.parametrize(("at", "file"), OUTPUTS)
@pytest.mark.parametrize("name", [ALL[0], *(pytest.param(name, marks=full) for name in ALL[1:])])
def test_killed_inside_the_write_of_an_output(
    cases: Cases, figures: Counter[str], name: str, at: int, file: str
) -> None:
    killed_inside(cases, name, at, file)
    figures["kills"] += 1
    figures["kills inside a write"] += 1


@full
@pytest.mark.parametrize(("name", "seed"), points(21))
def test_killed_by_the_clock(cases: Cases, figures: Counter[str], name: str, seed: int) -> None:
    reference, _, seconds = cases.reference(name)
    after = (random.Random(seed).uniform(0.05, seconds), signal.SIGKILL)
    told = killed_then_same(cases.server, cases.training(name), reference, after=after)
    assert told["status"] in (SIGKILL, 0)  # 0: it was faster than its measure
    figures["kills"] += told["status"] == SIGKILL
    figures["kills by the clock"] += told["status"] == SIGKILL


@full
@pytest.mark.parametrize("name", [ALL[2], ALL[4], ALL[6]])
def test_killed_again_and_again(cases: Cases, figures: Counter[str], name: str) -> None:
    reference, counts, _ = cases.reference(name)
    training, draw = cases.training(name), random.Random(SEED)
    for _ in range(5):
        kill = {"events": "calls", "at": draw.randint(counts["calls"] // 20, counts["calls"] // 3)}
        figures["kills"] += training.run(cases.server, kill=kill)["status"] == SIGKILL
    finish_and_compare(cases.server, training, reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=full) for seed in range(1, 6))])
def test_a_signal_writes_a_checkpoint_first(
    cases: Cases, figures: Counter[str], number: signal.Signals, seed: int
) -> None:
    name = ALL[seed % len(ALL)]
    reference, _, seconds = cases.reference(name)
    training = cases.training(name)
    told = training.run(cases.server, after=(random.Random(seed).uniform(0.25, seconds), number))
    log = training.log.read_text()
    stopped = f"{number.name}: stopped after step" in log
    if stopped:
        assert told["status"] == 128 + number
        assert "resumes from" in log
        assert list((training.case / "checkpoints").rglob("step-*")) or "after step 0," in log
        figures["signals answered with a checkpoint"] += 1
    else:  # before training began, or after it had ended
        assert told["status"] in (0, 1, 130, -number), log
        assert "Traceback" not in log
    figures["signals"] += 1
    finish_and_compare(cases.server, training, reference)


def test_a_damaged_checkpoint_is_reported_and_costs_nothing_but_time(cases: Cases) -> None:
    name = ALL[3]
    reference, counts, _ = cases.reference(name)
    training = cases.training(name)
    training.run(cases.server, kill={"events": "calls", "at": int(counts["calls"] * 0.8)})
    newest = sorted((training.case / "checkpoints").rglob("step-*"))[-1]
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    # A bit of a number, not of the header: such damage still loads, and only a checksum can see it.
    content[-9] ^= 4
    weights.write_bytes(content)
    ended = training.run(cases.server)
    assert ended["status"] == 0
    assert f"checkpoint {newest.name} is damaged and not used" in training.log.read_text()
    assert training.files() == reference
