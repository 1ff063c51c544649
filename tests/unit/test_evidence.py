"""The first screen: a row per topic, with what its verdicts rest on, and nothing that the results do not say."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
from rich.console import Console

from bwsk.cli import summary
from bwsk.study.evidence import Evidence, evidence, verdicts
from bwsk.study.formats import added_time, spread
from tests.unit.published_results import published_params, published_results, with_claims

PARAMS = published_params()


def rows(**variants: dict[str, Any]) -> dict[str, Evidence]:
    """Rows by claim, of the published study with figures of variants replaced, `__` standing for the dash."""
    results = copy.deepcopy(published_results(PARAMS))
    for name, values in variants.items():
        results["variants"][name.replace("_", "-")] |= values
    return {row.claim: row for row in evidence(with_claims(PARAMS, results))}


def test_every_claim_counts_in_one_topic() -> None:
    results = with_claims(PARAMS, published_results(PARAMS))
    assert sum(int(part.split()[0]) for row in evidence(results) for part in row.verdict.split(", ")) == 28
    assert verdicts(results) == "26 reproduced, 2 not reproduced"


def test_bit_identical_modes_are_said_to_be_so_only_where_their_weights_are() -> None:
    name = "Spread of perplexity over modes"
    assert rows()[name].basis == "the modes end with bit-identical weights (sha256)"
    results = copy.deepcopy(published_results(PARAMS))
    results["variants"]["scratch-bwsk-reversible"]["provenance"]["weights_sha256"] = "1" * 64
    found = {row.claim: row for row in evidence(with_claims(PARAMS, results))}
    assert found[name].basis == "the modes end with different weights (from scratch)"
    alone = published_params(variants={"modes": ["conventional"]})
    found = {row.claim: row for row in evidence(with_claims(alone, published_results(alone)))}
    assert (found[name].basis, found[name].ours) == ("one mode alone: nothing to compare", "—")


@pytest.mark.parametrize(
    ("saving", "ours", "basis"),
    [
        ({"measured": 0.4, "predicted": 0.5}, "40.0 % (measured)", "measured by CUDA's allocator on NVIDIA"),
        ({"measured": None, "predicted": 0.5}, "50.0 % (predicted)", "predicted for CUDA, not measured: trained on"),
        ({"measured": None, "predicted": None}, "—", "neither measured nor predicted"),
    ],
)
def test_a_saving_is_called_what_it_is(saving: dict[str, Any], ours: str, basis: str) -> None:
    results = copy.deepcopy(published_results(PARAMS))
    results["memory_saving"] = dict.fromkeys(("finetune", "scratch"), saving)
    row = next(row for row in evidence(with_claims(PARAMS, results)) if row.claim.startswith("Peak memory"))
    assert row.ours == ours
    assert row.basis.startswith(basis)
    assert row.basis.endswith("published less its leaked copy of the model: 40.7 %")


def test_a_time_added_below_the_noise_is_no_number() -> None:
    row = rows(finetune_bwsk_analyzed={"step_time_ms": 16.0})["Time added to a step, reversible"]
    assert row.ours == "within noise (±100 %)"
    assert row.verdict == "2 reproduced, 2 not comparable"
    assert row.basis.endswith("conventional and bwsk-analyzed run the same step and differ by 100 %")


def test_two_times_added_share_their_noise() -> None:
    median = published_results(PARAMS)["variants"]["scratch-conventional"]["step_time_ms"]
    edits = {"finetune_bwsk_reversible": 1.14, "scratch_bwsk_reversible": 1.07, "scratch_bwsk_analyzed": 1.091}
    found = rows(**{name: {"step_time_ms": factor * median} for name, factor in edits.items()})
    assert found["Time added to a step, reversible"].ours == "14 % / within noise (±9.1 %)"


def test_the_digits_of_a_time_added_follow_its_noise() -> None:
    values = [(18.64, 0.4), (18.64, 3.21), (-22.04, 3.21), (18.64, 18.64), (-22.0, 46.8), (18.64, None), (None, 2.0)]
    assert [added_time(*value) for value in values] == [
        "18.6 % (±0.4 %)",
        "19 % (±3.2 %)",
        "−22 % (±3.2 %)",
        "within noise (±19 %)",
        "within noise (±47 %)",
        "19 % (noise unknown)",
        "—",
    ]
    assert spread(61.94, 66.1, 71.25) == "66.1 (61.9–71.2)"
    assert spread(60.0, 124.2, 130.0) == "124 (60–130)"


def test_show_begins_with_the_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr(summary, "console", lambda: shown)
    summary.print_results(with_claims(PARAMS, published_results(PARAMS)))
    text = shown.file.getvalue()
    screen = text.splitlines()[:24]
    assert screen[1] == "Claims of tzervas/bwsk-t5-small: 26 reproduced, 2 not reproduced."
    for row in evidence(with_claims(PARAMS, published_results(PARAMS))):
        assert f"{row.claim}: published {row.published}, here {row.ours}" in screen
    assert "one run per variant on NVIDIA GeForce RTX 3090 Ti" in " ".join(text.split())
