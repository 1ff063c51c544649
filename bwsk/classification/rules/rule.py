"""Rules of the S/K classification, each tied to evidence.

A rule says, for one *kind* of operation and under a condition on its facts (shape, stride, rank, training or eval),
what the verdict is, what residue must be saved to recover the input, why, and which witnesses prove it.

An operation is **S** if its input can be recovered from its output and a residue that does not grow with the elements
of a row (nothing, an RNG state, scalars per row). It is **K** if different inputs have the same output, and only a
residue per element distinguishes them. A rule whose witness does not prove its verdict cannot be registered, because
`RuleSet.register` runs the witness. The built-in sets hold many more rules than a model needs, so they run a rule's
witnesses when it first decides something. No verdict is ever given by a rule without evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from bwsk.classification.identify import identify
from bwsk.classification.operators import Facts, OpInfo
from bwsk.classification.witness import Residue, Verdict, WitnessCase, WitnessError
from bwsk.errors import BwskError

# Every kind of operation that rules can be about, in one line each.
KINDS: dict[str, str] = {
    # what a module or an operator computes
    "linear": "y = Wx + b with fixed W",
    "convolution": "linear and shift-equivariant, fixed kernel",
    "transposed_convolution": "adjoint of a convolution, fixed kernel",
    "embedding": "index -> row of a table",
    "position": "position -> rotary, sinusoidal or learned code",
    "layer_norm": "(x - mean) / deviation per row",
    "rms_norm": "x / root mean square per row",
    "group_norm": "(x - mean) / deviation per group or instance",
    "batch_norm": "(x - mean) / deviation per channel",
    "identity": "y = x",
    "reshape": "the same elements in another arrangement",
    "injective_elementwise": "strictly monotone function of each element",
    "erasing_elementwise": "function of each element that takes a value twice",
    "relu": "max(x, 0)",
    "gelu": "x times the normal distribution function, exact or approximated",
    "silu": "x times the logistic function",
    "tanh": "hyperbolic tangent",
    "sigmoid": "logistic function",
    "softmax": "exp(x) / sum exp(x), or its logarithm",
    "dropout": "random zeroing of elements or paths",
    "pooling": "mean or maximum over a window",
    "upsample": "each element repeated or interpolated",
    "recurrent": "gated or plain recurrent cell",
    "attention": "softmax(QK') V in one operator",
    "loss": "prediction and target -> scalar",
    "routing": "the top choices of each row",
    "composite": "a leaf that runs several operators",
    # what only operators do
    "constant": "no activation as input",
    "random": "output drawn from the random number generator",
    "elementwise_constant": "each element combined with a known number or parameter",
    "row_broadcast": "each row combined with a scalar of its own",
    "merge": "two activations combined element by element",
    "product": "matrix product of two activations",
    "widening_cast": "to a type that holds every value",
    "narrowing_cast": "to a type that rounds",
    "selection": "some of the elements",
    "reduction": "sum, mean, maximum or norm over an axis",
    "prefix_sum": "cumulative sum",
    "sorting": "sorted values with their indices",
    "comparison": "truth value per element",
    "masking": "elements replaced where a mask says so",
}
# Kinds in which no element of a tensor influences another one, so that they need no communication under any sharding.
POINTWISE = frozenset({
    "identity", "reshape", "injective_elementwise", "erasing_elementwise", "relu", "gelu", "silu", "tanh", "sigmoid",
    "dropout", "elementwise_constant", "row_broadcast", "merge", "widening_cast", "narrowing_cast", "selection",
    "comparison", "masking", "constant", "random", "position",
})  # fmt: skip


def always(facts: Facts) -> bool:
    return True


@dataclass(frozen=True)
class Rule:
    """One verdict on a kind of operation: its residue, reason, source and witnesses, and the condition it holds under.

    `kind` is one of `KINDS` or the name of an operator such as "aten::mm". `condition` says in words what `when`
    tests on the facts. `witnesses` are cases; S needs an inverse, K a collision, GRAY one of each.
    """

    kind: str
    verdict: Verdict
    residue: Residue
    reason: str
    source: str
    witnesses: tuple[WitnessCase, ...]
    condition: str = "always"
    when: Callable[[Facts], bool] = always

    @property
    def name(self) -> str:
        return self.kind if self.condition == "always" else f"{self.kind} ({self.condition})"


class RuleSet:
    """Rules by kind; within a kind the first whose condition holds decides. No rule: GRAY."""

    def __init__(self, name: str, *, opinion: bool) -> None:
        """`opinion`: verdicts may go beyond the evidence (the published set); else they must match it."""
        self.name = name
        self.opinion = opinion
        self.rules: dict[str, list[Rule]] = {}
        self._proven: set[int] = set()  # ids of rules whose witnesses have held

    def register(self, rule: Rule, *, prove: bool = True) -> Rule:
        """Check `rule`'s evidence and add it; raises `BwskError` if the kind is unknown or a witness fails.

        With `prove=False` the witnesses themselves run when the rule is first used, or in `prove`.
        """
        if not isinstance(rule.verdict, Verdict) or not isinstance(rule.residue, Residue):
            raise BwskError(f"rule for {rule.kind!r}: {rule.verdict!r}, {rule.residue!r}: give a Verdict and a Residue")
        if rule.kind not in KINDS and not _operator_exists(rule.kind):
            raise BwskError(f"rule for {rule.kind!r}: no such kind or operator; kinds are {', '.join(KINDS)}")
        self._check(rule, self._fits)
        if prove:
            self._check(rule, self._prove)
        self.rules.setdefault(rule.kind, []).append(rule)
        return rule

    def prove(self) -> None:
        """Run the witnesses of all rules; raises `BwskError` for the first that fails."""
        for rule in self:
            self._check(rule, self._prove)

    def _check(self, rule: Rule, test: Callable[[Rule], None]) -> None:
        try:
            test(rule)
        except WitnessError as error:
            raise BwskError(f"rule {rule.name} = {rule.verdict} in {self.name!r}: {error}") from None
        except BwskError:
            raise
        except Exception as error:  # evidence is arbitrary code by the rule's author
            text = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise BwskError(
                f"rule {rule.name} = {rule.verdict} in {self.name!r}: its evidence fails: {text}"
            ) from error

    def _fits(self, rule: Rule) -> None:
        """Check that the witnesses are of the type that the verdict needs, with its residue."""
        shown = {w.verdict for w in rule.witnesses}
        needed = {Verdict.S, Verdict.K} if rule.verdict is Verdict.GRAY else {rule.verdict}
        if shown != needed:
            have = "/".join(sorted(shown)) or "no"
            raise WitnessError(f"needs witnesses for {'/'.join(sorted(needed))} and has {have} witness")
        strict = not self.opinion
        if strict and rule.verdict is not Verdict.GRAY and rule.residue.vanishing != (rule.verdict is Verdict.S):
            raise WitnessError(f"a residue of '{rule.residue}' is not what {rule.verdict} means")
        for witness in rule.witnesses:
            if strict and witness.saturates:
                raise WitnessError(f"{witness.name} shows rounding, which is not erasure")
            if witness.verdict is rule.verdict and witness.residue is not rule.residue:
                raise WitnessError(f"{witness.name} shows a residue of '{witness.residue}', not '{rule.residue}'")

    def _prove(self, rule: Rule) -> None:
        """Check that the witnesses are of the rule's kind, satisfy its condition, and hold when they run."""
        self._proven.add(id(rule))  # at once, because an operator of a composite witness may need this very rule
        try:
            for witness in rule.witnesses:
                subject = subject_of(witness)
                if rule.kind not in (subject.kind, subject.found_by):
                    raise WitnessError(f"{witness.name} is a case of {subject.kind}, by {subject.found_by}")
                if not self._applies(rule, subject.facts):
                    raise WitnessError(f"{witness.name} is outside of the condition '{rule.condition}'")
                witness.check()
        except BaseException:
            self._proven.discard(id(rule))
            raise

    def _applies(self, rule: Rule, facts: Facts) -> bool:
        try:
            return bool(rule.when(facts))
        except BwskError:
            raise
        except Exception as error:
            known = ", ".join(facts) or "none"
            text = f"{type(error).__name__}: {error}"
            raise BwskError(
                f"rule {rule.name} in {self.name!r}: its condition fails: {text}; facts are {known}"
            ) from error

    def decide(self, subject: OpInfo, operator: str | None = None) -> Rule | None:
        """The rule that applies, or None. A rule for the operator itself goes before one for its kind."""
        for key in (operator, subject.kind):
            for rule in self.rules.get(key, ()) if key else ():
                if self._applies(rule, subject.facts):
                    if id(rule) not in self._proven:
                        self._check(rule, self._prove)
                    return rule
        return None

    def contradictions(self, cases: Iterable[WitnessCase]) -> list[str]:
        """Cases whose evidence contradicts this set: none for a strict set, the disputed ones for the published set."""
        found = []
        for case in cases:
            if case.saturates:
                continue
            rule = self.decide(subject_of(case))
            if rule is None:
                found.append(f"{case.name}: evidence for {case.verdict}, no rule")
            elif rule.verdict is Verdict.GRAY and case in rule.witnesses:
                continue
            elif (rule.verdict, rule.residue) != (case.verdict, case.residue):
                found.append(
                    f"{case.name}: evidence for {case.verdict} ({case.residue}), "
                    f"rule {rule.name} says {rule.verdict} ({rule.residue})"
                )
        return found

    def __iter__(self) -> Iterator[Rule]:
        return (rule for rules in self.rules.values() for rule in rules)


def subject_of(case: WitnessCase) -> OpInfo:
    """Kind and facts of a case's operation, found exactly as a census or a trace finds them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        operation = case.make(generator)
        if isinstance(operation, nn.Module):
            return identify(operation)
        if case.sample is not None:
            inputs = case.sample(generator)
        elif case.pair is not None:
            inputs = case.pair(operation, generator)[0]
        else:
            raise WitnessError(f"{case.name}: has neither a sample nor a pair of inputs")
        return operation.subject(*((inputs,) if isinstance(inputs, torch.Tensor) else inputs))


def _operator_exists(name: str) -> bool:
    space, colons, packet = name.partition("::")
    return bool(colons) and hasattr(getattr(torch.ops, space, None), packet.partition(".")[0])
