"""The built-in rule sets by name."""

from __future__ import annotations

from functools import cache

from bwsk.classification.rules import published as ruleset_published
from bwsk.classification.rules import strict as ruleset_strict
from bwsk.classification.rules.rule import RuleSet
from bwsk.errors import BwskError

RULE_SETS = ("published", "strict")


@cache
def _built_in(name: str) -> RuleSet:
    return ruleset_strict.build() if name == "strict" else ruleset_published.build()


def rule_set(rules: str | RuleSet) -> RuleSet:
    """The rule set of that name ("published" or "strict"); a `RuleSet` is passed through."""
    if isinstance(rules, RuleSet):
        return rules
    if rules not in RULE_SETS:
        raise BwskError(f"rules {rules!r}: no such rule set; choose from {', '.join(RULE_SETS)}")
    return _built_in(rules)
