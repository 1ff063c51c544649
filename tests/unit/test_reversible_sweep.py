"""Every causal, masked and sequence-to-sequence class of transformers trains with stock's bits, or is refused."""

from __future__ import annotations

import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from bench.coverage import Outcome, classes, document, outcome_of, sweep, versions

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
# Of all classes, the part that is compared at the least: with transformers 5.23 it is 67 %, 25 % are refused.
AT_LEAST = 0.6
QUICK = [
    "BigBirdForMaskedLM",
    "BloomForCausalLM",
    "DebertaV2ForMaskedLM",
    "GPTNeoForCausalLM",
    "MBartForCausalLM",
    "OPTForCausalLM",
    "T5ForConditionalGeneration",
    "XGLMForCausalLM",
]


def draws_for_nothing(name: str) -> bool:
    """Whether a class draws random numbers for dropping layers even at a rate of 0, as before transformers 5.23."""
    source = inspect.getsource(sys.modules[getattr(transformers, name).__module__])
    return re.search(r"if self\.training:\s+dropout_probability = torch\.rand", source) is not None


@pytest.mark.parametrize("name", QUICK)
def test_a_class_trains_with_the_stock_bits(name: str) -> None:
    found = outcome_of(name)
    if draws_for_nothing(name):
        assert found.result == "refused"
        assert "layers dropped at random" in found.detail
        return
    assert (found.result, found.detail.replace("sdpa", "")) == ("compared", "")
    assert found.saved[1] < 0.7


def test_a_class_that_is_refused_says_why() -> None:
    found = outcome_of("MixtralForCausalLM")
    assert found.result == "refused"
    assert "routes tokens to experts" in found.detail


@pytest.mark.parametrize("change", ["a bit", "a step more", "nothing"])
def test_the_sweep_sees_faults(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    from bwsk.reversible import checkpointed

    def other(self, *args, **kwargs):
        if change == "a step more" and self.training:
            torch.rand(1)
        found = stock(self, *args, **kwargs)
        if change == "a bit":
            flat = found[0] if isinstance(found, tuple) else found
            flat.data.view(torch.int32).view(-1)[5] ^= 1
        return found

    stock = checkpointed._block
    monkeypatch.setattr(checkpointed, "_block", other)
    assert outcome_of("BertForMaskedLM").result == ("compared" if change == "nothing" else "FAULT")


def test_the_document_lists_every_class_once() -> None:
    found = [Outcome(name, kind, "not built", "for a test") for name, kind in classes().items()]
    assert listed(document(found)) == {"Not built": set(classes())}


def listed(page: str) -> dict[str, set[str]]:
    """The classes below each heading of the document."""
    found: dict[str, set[str]] = defaultdict(set)
    title = ""
    for line in page.splitlines():
        if line.startswith("## "):
            title = line.removeprefix("## ")
        elif names := {name for name in re.findall(r"`(\w+)`", line) if name in classes()}:
            found[title] |= names
    return dict(found)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Steps this small are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_every_class_is_compared_or_refused_and_the_document_says_which() -> None:
    found = sweep(classes())
    assert [one for one in found if one.result == "FAULT"] == []
    compared = {one.name for one in found if one.result == "compared"}
    assert len(compared) >= AT_LEAST * len(found)
    page = PAGE.read_text(encoding="utf-8")
    assert "## Faults" not in page
    if versions() in page:
        assert listed(page) == listed(document(found))
