"""The rules prove themselves: every witness runs, and no mutation of a rule survives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from bwsk.errors import BwskError
from bwsk.operators import Operator
from bwsk.rules import KINDS, Rule, RuleSet
from bwsk.ruleset_strict import BY_NAME, SPECIMENS, keeps_dimensions, keeps_positions
from bwsk.rulesets import rule_set
from bwsk.witness import Residue, Specimen, Verdict, WitnessError

STRICT = list(rule_set("strict"))
PUBLISHED = list(rule_set("published"))
_FLIP = {Verdict.S: Verdict.K, Verdict.K: Verdict.S, Verdict.GRAY: Verdict.S}


def _copy(rules: RuleSet) -> RuleSet:
    mutant = RuleSet(rules.name, opinion=rules.opinion)
    mutant.rules = {kind: list(cases) for kind, cases in rules.rules.items()}
    return mutant


def _name(rule: Rule) -> str:
    return rule.name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda s: s.name)
def test_every_witness_holds_for_several_draws(specimen, seed):
    specimen.check(seed)


@pytest.mark.parametrize("rules", ["published", "strict"])
def test_every_rule_of_the_built_in_sets_has_passing_witnesses(rules):
    rule_set(rules).prove()


def test_the_strict_rules_say_what_the_evidence_says_everywhere():
    assert rule_set("strict").contradictions(SPECIMENS) == []


def test_every_kind_has_a_strict_rule_and_every_specimen_is_used():
    assert {rule.kind for rule in STRICT} == set(KINDS)
    assert {w.name for rule in STRICT for w in rule.witnesses} == set(BY_NAME)


# --- mutation: deleting, weakening or flipping ---------------------------------------------------------------------


@pytest.mark.parametrize("rule", STRICT, ids=_name)
def test_deleting_a_strict_rule_leaves_evidence_unexplained(rule):
    mutant = _copy(rule_set("strict"))
    mutant.rules[rule.kind].remove(rule)
    assert mutant.contradictions(SPECIMENS)


@pytest.mark.parametrize("rule", [r for r in STRICT if len(rule_set("strict").rules[r.kind]) > 1], ids=_name)
def test_dropping_a_condition_contradicts_the_evidence(rule):
    mutant = _copy(rule_set("strict"))
    mutant.rules[rule.kind].remove(rule)
    mutant.rules[rule.kind].insert(0, replace(rule, when=lambda facts: True))
    assert mutant.contradictions(SPECIMENS)


@pytest.mark.parametrize("rule", STRICT + PUBLISHED, ids=_name)
def test_a_flipped_verdict_cannot_be_registered(rule):
    rules = RuleSet("mutant", opinion=False)
    with pytest.raises(BwskError, match=r"witness|residue"):
        rules.register(replace(rule, verdict=_FLIP[rule.verdict]))
    assert list(rules) == []


@pytest.mark.parametrize("rule", [r for r in STRICT if r.verdict != "GRAY"], ids=_name)
def test_a_wrong_residue_cannot_be_registered(rule):
    for residue in Residue:
        if residue is not rule.residue:
            with pytest.raises(BwskError):
                RuleSet("mutant", opinion=False).register(replace(rule, residue=residue))


@pytest.mark.parametrize("rule", STRICT, ids=_name)
def test_a_rule_without_witness_cannot_be_registered(rule):
    with pytest.raises(BwskError, match="no witness"):
        RuleSet("mutant", opinion=False).register(replace(rule, witnesses=()))


@pytest.mark.parametrize("rule", [r for r in STRICT if r.condition != "always" and r.verdict != "GRAY"], ids=_name)
def test_a_negated_condition_excludes_its_own_witness(rule):
    with pytest.raises(BwskError, match="outside of the condition"):
        RuleSet("mutant", opinion=False).register(replace(rule, when=lambda facts: not rule.when(facts)))


def test_a_witness_of_another_kind_is_refused():
    rule = next(r for r in STRICT if r.kind == "relu")
    with pytest.raises(BwskError, match="specimen of erasing_elementwise"):
        RuleSet("mutant", opinion=False).register(replace(rule, witnesses=(BY_NAME["clamp"],)))


def test_rounding_is_no_evidence_for_the_strict_rules():
    rule = next(r for r in PUBLISHED if r.kind == "tanh")
    RuleSet("opinion", opinion=True).register(rule)
    with pytest.raises(BwskError, match="rounding"):
        RuleSet("mutant", opinion=False).register(rule)


# --- a false witness is found out ----------------------------------------------------------------------------------


def _specimen(**changes):
    base = BY_NAME["tanh"]
    return replace(base, name="false", **changes)


@pytest.mark.parametrize(
    ("specimen", "what"),
    [
        (_specimen(invert=lambda f, y, k: y), "comes back with error"),
        (_specimen(keep=lambda f, x: x, invert=lambda f, y, k: k), "residue"),
        (_specimen(keep=lambda f, x: x, invert=lambda f, y, k: k, residue=Residue.ROW), "residue"),
        (_specimen(keep=lambda f, x: x, invert=lambda f, y, k: k, residue=Residue.BIT), "residue"),
        (_specimen(pair=lambda f, g: (torch.ones(1).double(), torch.ones(1).double() * 2)), "different outputs"),
        (_specimen(pair=lambda f, g: (torch.ones(1).double(), torch.ones(1).double())), "rounding only"),
        (_specimen(pair=lambda f, g: (torch.tensor([90.0]).double(), torch.tensor([91.0]).double())), "rounding only"),
        (_specimen(pair=lambda f, g: (torch.tensor([20.0]), torch.tensor([21.0]))), "double precision"),
    ],
)
def test_false_evidence_fails(specimen, what):
    with pytest.raises(WitnessError, match=what):
        specimen.check()


def test_an_inverse_that_is_off_by_a_little_fails():
    exact = BY_NAME["view"]
    off = replace(exact, invert=lambda f, y, k: y.reshape(3, 8) + 1e-12)
    with pytest.raises(WitnessError):
        off.check()


def test_checks_leave_the_global_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for specimen in SPECIMENS:
        specimen.check(11)
    assert torch.equal(before, torch.get_rng_state())


# --- conditions, against linear algebra ----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_linear_condition_agrees_with_the_rank_of_random_matrices(into, out, seed):
    weight = torch.randn(out, into, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    injective = int(torch.linalg.matrix_rank(weight)) == into
    assert keeps_dimensions({"in": into, "out": out}) == injective


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
@example(into=1, out=3, kernel=3, stride=3, padding=1)  # the last position is in no window
def test_convolution_condition_agrees_with_the_rank_of_its_matrix(into, out, kernel, stride, padding):
    """On lengths that the stride divides; the condition may be careful, but S must always be injective."""
    length = 6
    if 2 * padding + length < kernel:
        return
    layer = nn.Conv1d(into, out, kernel, stride=stride, padding=padding, bias=False).double()
    nn.init.normal_(layer.weight)
    with torch.no_grad():
        matrix = layer(torch.eye(into * length, dtype=torch.float64).reshape(-1, into, length)).flatten(1)
    facts = {"in": into, "out": out, "kernel": (kernel,), "stride": (stride,), "padding": (2 * padding,)}
    if keeps_positions(facts):
        assert int(torch.linalg.matrix_rank(matrix)) == into * length
    elif kernel < stride or out * matrix.shape[1] // out < into * length:
        assert int(torch.linalg.matrix_rank(matrix)) < into * length


# --- rules of one's own --------------------------------------------------------------------------------------------


def test_a_rule_for_an_operator_goes_before_its_kind():
    rules = _copy(rule_set("strict"))
    specimen = Specimen(
        "exp", lambda g: Operator(torch.ops.aten.exp.default), sample=lambda g: torch.randn(4, generator=g).double(),
        invert=lambda f, y, k: y.log(), bound=1e-9,
    )  # fmt: skip
    own = Rule("aten::exp", Verdict.S, Residue.NOTHING, "logarithm", "own", (specimen,))
    rules.register(own)
    subject = Operator(torch.ops.aten.exp.default).subject(torch.ones(2))
    assert rules.decide(subject, "aten::exp") is own
    assert rules.decide(subject, "aten::log") is not own


@pytest.mark.parametrize("kind", ["aten::no_such_operator", "linearr", "nowhere::mm", ""])
def test_a_rule_for_what_does_not_exist_is_one_line(kind):
    rule = replace(STRICT[0], kind=kind)
    with pytest.raises(BwskError, match="no such kind or operator") as caught:
        rule_set("strict").register(rule)
    assert "\n" not in str(caught.value)


def test_an_operator_rule_needs_a_witness_of_that_operator():
    with pytest.raises(BwskError, match="specimen of"):
        _copy(rule_set("strict")).register(Rule("aten::log", Verdict.S, Residue.NOTHING, "x", "own", (BY_NAME["exp"],)))


def test_unknown_rule_set():
    with pytest.raises(BwskError, match="published, strict"):
        rule_set("lenient")
