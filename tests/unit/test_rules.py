"""The rules prove themselves: every witness runs, and no mutation of a rule survives."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import bwsk
from bwsk.classification.convolution import convolution, transposed_convolution
from bwsk.classification.dataflow import dispatched
from bwsk.classification.identify import identify
from bwsk.classification.operators import Operator
from bwsk.classification.rules.rule import KINDS, Rule, RuleSet
from bwsk.classification.rules.sets import rule_set
from bwsk.classification.rules.strict import BY_NAME, SPECIMENS, keeps_dimensions
from bwsk.classification.witness import Residue, Verdict, WitnessCase, WitnessError
from bwsk.errors import BwskError

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
@pytest.mark.parametrize("case", SPECIMENS, ids=lambda s: s.name)
def test_every_witness_holds_for_several_draws(case, seed):
    case.check(seed)


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
    with pytest.raises(BwskError, match="case of erasing_elementwise"):
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
    ("case", "what"),
    [
        (_specimen(invert=lambda f, y, k: y), "recovered with error"),
        (_specimen(keep=lambda f, x: x, invert=lambda f, y, k: k), "residue"),
        (_specimen(keep=lambda f, x: x, invert=lambda f, y, k: k, residue=Residue.ROW), "residue"),
        (_specimen(keep=lambda f, x: x, invert=lambda f, y, k: k, residue=Residue.BIT), "residue"),
        (_specimen(pair=lambda f, g: (torch.ones(1).double(), torch.ones(1).double() * 2)), "different outputs"),
        (_specimen(pair=lambda f, g: (torch.ones(1).double(), torch.ones(1).double())), "rounding only"),
        (_specimen(pair=lambda f, g: (torch.tensor([90.0]).double(), torch.tensor([91.0]).double())), "rounding only"),
        (_specimen(pair=lambda f, g: (torch.tensor([20.0]), torch.tensor([21.0]))), "double precision"),
        (
            _specimen(
                make=lambda g: nn.Flatten(0),
                pair=lambda f, g: (torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[1.0, 2.0]]).double()),
            ),
            "different shapes",
        ),
        (_specimen(pair=lambda f, g: (torch.ones(1).double(), torch.full((1,), torch.nan).double())), "rounding only"),
        (_specimen(pair=lambda f, g: (torch.ones(0).double(), torch.ones(0).double())), "empty"),
        (_specimen(invert=lambda f, y, k: torch.zeros_like(y), bound=1.0), "proves nothing"),
        (
            _specimen(
                keep=lambda f, x: x.view(torch.uint8),
                invert=lambda f, y, k: k.view(torch.float64),
                residue=Residue.RNG,
            ),
            "depends on the input",
        ),
        (_specimen(sample=lambda g: torch.ones(4, 9).double(), invert=lambda f, y, k: y / y), "by heart"),
    ],
)
def test_false_evidence_fails(case, what):
    with pytest.raises(WitnessError, match=what):
        case.check()


def test_an_inverse_that_is_off_by_a_little_fails():
    exact = BY_NAME["view"]
    off = replace(exact, invert=lambda f, y, k: y.reshape(3, 8) + 1e-12)
    with pytest.raises(WitnessError):
        off.check()


def test_checks_leave_the_global_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for case in SPECIMENS:
        case.check(11)
    assert torch.equal(before, torch.get_rng_state())


# --- conditions, against linear algebra ----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_linear_condition_agrees_with_the_rank_of_random_matrices(into, out, seed):
    weight = torch.randn(out, into, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    injective = int(torch.linalg.matrix_rank(weight)) == into
    assert keeps_dimensions({"in": into, "out": out}) == injective


_AXES = [
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(1, 3),
]  # kernel, stride, padding, dilation


def _rank(layer, into, length):
    """Rank of the layer's matrix, and whether it is injective."""
    with torch.no_grad():
        matrix = layer(torch.eye(into * length, dtype=torch.float64).reshape(-1, into, length)).flatten(1)
    return int(torch.linalg.matrix_rank(matrix)) == into * length


def _subject(layer):
    nn.init.normal_(layer.weight)
    return identify(layer.double())


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3), st.integers(1, 7), *_AXES)
@example(1, 3, 3, 3, 1, 1)  # the last position is in no window
@example(1, 2, 2, 2, 1, 2)  # a stride and a dilation of two: odd positions are never read
@example(1, 1, 2, 1, 1, 2)  # two taps two apart: singular for odd lengths, and for no even one
@example(1, 7, 4, 2, 0, 1)  # windows that tell all they see
def test_convolution_verdicts_agree_with_the_rank_of_its_matrix(into, out, kernel, stride, padding, dilation):
    """On inputs twice as long as the kernel reaches, or longer, that the stride divides."""
    layer = nn.Conv1d(into, out, kernel, stride, padding, dilation, bias=False)
    subject = _subject(layer)
    verdict = convolution(subject.facts)
    extent = dilation * (kernel - 1) + 1
    for length in range(stride, 9 * stride + 1, stride):
        if length >= 2 * extent and verdict is Verdict.S:
            assert _rank(layer, into, length)
    if verdict is Verdict.K:
        assert not _rank(layer, into, 60)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3), st.integers(1, 7), *_AXES, st.integers(1, 9))
def test_convolution_operators_know_the_length(into, out, kernel, stride, padding, dilation, length):
    layer = nn.Conv1d(into, out, kernel, stride, padding, dilation, bias=False)
    facts = {**_subject(layer).facts, "length": (length,)}
    if length + 2 * padding >= dilation * (kernel - 1) + 1 and convolution(facts) is not Verdict.GRAY:
        assert _rank(layer, into, length) == (convolution(facts) is Verdict.S)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), *_AXES, st.integers(0, 1))
@example(2, 1, 2, 2, 0, 2, 0)  # taps of one phase only
@example(4, 2, 3, 2, 1, 1, 1)  # the upsampling of U-nets
def test_transposed_convolution_verdicts_agree_with_the_rank(into, out, kernel, stride, padding, dilation, extra):
    if extra >= max(stride, dilation):
        return
    layer = nn.ConvTranspose1d(into, out, kernel, stride, padding, extra, bias=False, dilation=dilation)
    verdict = transposed_convolution(_subject(layer).facts)
    for length in range(1, 7):
        if (length - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra >= 0 and verdict is Verdict.S:
            assert _rank(layer, into, length)
        known = transposed_convolution({**identify(layer).facts, "length": (length,)})
        if (length - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra >= 0 and known is not Verdict.GRAY:
            assert _rank(layer, into, length) == (known is Verdict.S)
    if verdict is Verdict.K:
        assert not _rank(layer, into, 40)


def test_two_axes_are_both_asked():
    assert convolution(identify(nn.Conv2d(1, 4, 2, stride=2)).facts) is Verdict.S
    assert convolution(identify(nn.Conv2d(1, 4, (2, 1), stride=2)).facts) is Verdict.K
    assert convolution(identify(nn.Conv2d(1, 3, 2, stride=2)).facts) is Verdict.K


_TYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2,
          torch.float16, torch.bfloat16, torch.float32, torch.float64]  # fmt: skip


@pytest.mark.parametrize("source", _TYPES, ids=str)
def test_a_widening_cast_holds_every_value(source):
    """There and back again, over all values of the small types and the corners of the others."""
    if source.itemsize <= 2:
        bits = torch.arange(2 ** (8 * source.itemsize)).to(torch.uint8 if source.itemsize == 1 else torch.uint16)
        values = torch.tensor([False, True]) if source == torch.bool else bits.view(source)
    elif source.is_floating_point:
        limits = torch.finfo(source)
        corners = [limits.max, limits.smallest_normal, 1 + limits.eps, 1 / 3, 0.0]
        values = torch.tensor([sign * n for n in corners for sign in (1, -1)], dtype=source)
    else:
        limits = torch.iinfo(source)
        values = torch.tensor([limits.min, limits.max, limits.max - 1, 2**24 + 1, 0], dtype=source)
    if source.is_floating_point:
        values = values[values.float().isfinite() if source.itemsize < 4 else values.isfinite()]
    for target in _TYPES:
        subject = Operator(torch.ops.aten._to_copy.default, dtype=target).subject(values)
        kept = torch.equal(values.to(target).to(source), values) if values.dtype.itemsize > 1 else torch.equal(
            values.to(target).to(source).view(torch.uint8), values.view(torch.uint8)
        )  # fmt: skip
        if subject.kind == "widening_cast":
            assert kept, target
        elif kept and {source, target} != {torch.int8, torch.uint8}:  # those two wrap around
            assert subject.kind == "identity", target


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.floats(0.3, 4), st.sampled_from(["nearest", "nearest-exact"]))
def test_upsampling_verdicts_agree_with_what_is_read(length, factor, mode):
    x = torch.arange(length, dtype=torch.float64).reshape(1, 1, -1)
    if int(length * factor) < 1:
        return
    everything = len(F.interpolate(x, scale_factor=factor, mode=mode).unique()) == length
    module = rule_set("strict").decide(identify(nn.Upsample(scale_factor=factor, mode=mode)))
    if module and module.verdict is Verdict.S:
        assert everything
    steps = dispatched(lambda x: F.interpolate(x, scale_factor=factor, mode=mode), x).calls
    assert rule_set("strict").decide(steps[-1].subject).verdict == ("S" if everything else "K")


# Single operators with every kind of number, on every kind of size: what the strict rules call S must be injective.
_NUMBERS = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, float("inf")])
_CALLS = {
    "leaky_relu": (_NUMBERS,),
    "elu": (_NUMBERS,),
    "celu": (st.sampled_from([-1.0, 0.5, 1.0]),),
    "softplus": (st.sampled_from([0.5, 1.0]), st.sampled_from([0.0, 1.0, 20.0])),
    "clamp": (st.sampled_from([None, -torch.inf, -1.0]), st.sampled_from([torch.inf, 1.0])),
    "hardtanh": (_NUMBERS, _NUMBERS),
    "pow": (_NUMBERS,),
    "mul": (_NUMBERS,),
    "add": (_NUMBERS,),
    "tan": (),
    "logical_not": (),
    "atan": (),
    "sinh": (),
    "cumsum": (st.just(-1),),
    "cumprod": (st.just(-1),),
    "softmax": (st.just(-1),),
    "flip": (st.just([-1]),),
    "roll": (st.integers(-2, 2), st.just(-1)),
    "sum": (st.just([-1]),),
    "amax": (st.just([-1]),),
    "var": (st.just([-1]),),
    "linalg_vector_norm": (st.just(2), st.just([-1])),
    "any": (st.just(-1),),
    "constant_pad_nd": (st.lists(st.integers(-1, 2), min_size=2, max_size=2),),
    "unfold": (st.just(-1), st.integers(1, 4), st.integers(1, 4)),
    "narrow": (st.just(-1), st.just(0), st.integers(1, 2)),
}


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(_CALLS)), st.integers(1, 6), st.data())
def test_no_two_inputs_meet_where_the_strict_rules_say_s(name, width, data):
    """Grids of small numbers in a row, which take equal values often, and pairs of them; residues are let off."""
    arguments = [data.draw(strategy) for strategy in _CALLS[name]]
    packet = getattr(torch.ops.aten, name)
    values = torch.tensor([-7.0, -4, -2, -1, -0.5, 0, 0.5, 1, 2, 4, torch.pi], dtype=torch.float64)
    rows = values[torch.randint(len(values), (400, width), generator=torch.Generator().manual_seed(1))].unique(dim=0)
    try:
        step = dispatched(lambda x: packet(x, *arguments), rows).calls[-1]
        out = packet(rows, *arguments)
    except (RuntimeError, IndexError):
        return  # no such call
    rule = rule_set("strict").decide(step.subject, step.name)
    if rule is None or rule.verdict is not Verdict.S or out.isnan().any():
        return
    assert rule.residue is Residue.NOTHING or width > 2
    if rule.residue is Residue.NOTHING:
        assert len(out.reshape(len(rows), -1).unique(dim=0)) == len(rows)


# --- rules of one's own --------------------------------------------------------------------------------------------


def test_a_rule_for_an_operator_goes_before_its_kind():
    rules = _copy(rule_set("strict"))
    case = WitnessCase(
        "exp", lambda g: Operator(torch.ops.aten.exp.default), sample=lambda g: torch.randn(4, generator=g).double(),
        invert=lambda f, y, k: y.log(), bound=1e-9,
    )  # fmt: skip
    own = Rule("aten::exp", Verdict.S, Residue.NOTHING, "logarithm", "own", (case,))
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
    with pytest.raises(BwskError, match="case of"):
        _copy(rule_set("strict")).register(Rule("aten::log", Verdict.S, Residue.NOTHING, "x", "own", (BY_NAME["exp"],)))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"verdict": "S"}, "give a Verdict and a Residue"),
        ({"residue": "nothing"}, "give a Verdict and a Residue"),
        ({"when": lambda facts: facts["no such fact"]}, "its condition fails: KeyError.*facts are in, out"),
        ({"witnesses": (replace(BY_NAME["linear 4->4"], make=lambda g: 1 / 0),)}, "evidence fails: ZeroDivisionError"),
        ({"witnesses": (replace(BY_NAME["linear 4->4"], invert=lambda: 0),)}, "evidence fails: TypeError"),
    ],
)
def test_a_rule_that_is_badly_written_is_one_line(changes, what):
    rule = next(r for r in STRICT if r.kind == "linear" and r.verdict is Verdict.S)
    rules = RuleSet("own", opinion=False)
    with pytest.raises(BwskError, match=what) as caught:
        rules.register(replace(rule, **changes))
    assert "\n" not in str(caught.value)
    assert list(rules) == []


def test_unknown_rule_set():
    with pytest.raises(BwskError, match="published, strict"):
        rule_set("lenient")


def test_the_rules_of_ones_own_in_the_docs_work():
    text = (Path(__file__).parents[2] / "docs" / "classification.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "RuleSet(" in block]
    names = {"bwsk": bwsk, "model_or_config_or_path": nn.Sequential(nn.ELU(), nn.ReLU())}
    exec(code.partition("step = ")[0], names)
    assert (names["census"].s, names["census"].k, names["census"].gray) == (1, 0, 1)
