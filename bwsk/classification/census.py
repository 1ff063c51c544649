"""Census of a model's leaf modules: how many are S-type, K-type and GRAY, under either rule set.

As in the publication, it covers the leaves of `named_modules()`, each counted once however often it runs. Two things
escape it. Parameters of a module that has children are listed in the result (`outside`). Operations outside of modules
(softmax, residual additions) are counted by the census of operations (`bwsk.classification.trace`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from bwsk.classification.counts import Counts
from bwsk.classification.identify import identify, leaves
from bwsk.classification.operators import OpInfo
from bwsk.classification.rules.rule import KINDS, Rule, RuleSet
from bwsk.classification.rules.sets import rule_set
from bwsk.classification.rules.strict import composition
from bwsk.errors import BwskError


@dataclass(frozen=True)
class ModuleRow:
    """One leaf module: `verdict` is "S", "K" or "GRAY"; `found_by` says how its kind was determined (see `OpInfo`)."""

    name: str
    cls: str
    kind: str
    verdict: str
    condition: str | None
    residue: str | None
    reason: str
    source: str | None
    found_by: str
    facts: dict[str, Any]
    parameters: int


@dataclass(frozen=True)
class Census(Counts):
    """Leaf modules of `model` under the rule set `rules`, with the model in `mode` ("training" or "eval")."""

    model: str
    rules: str
    mode: str
    rows: tuple[ModuleRow, ...]
    outside: tuple[str, ...]  # parameters that belong to no leaf and so to no row

    def by_kind(self) -> list[dict[str, Any]]:
        """Rows that share kind, verdict and condition, with their number, most first."""
        groups = Counter((r.kind, r.verdict, r.condition, r.residue, r.reason) for r in self.rows)
        keys = ("kind", "verdict", "condition", "residue", "reason")
        classes = {
            key: sorted({r.cls for r in self.rows if (r.kind, r.verdict, r.condition) == key[:3]}) for key in groups
        }
        return [
            dict(zip(keys, key, strict=True)) | {"count": n, "classes": classes[key]} for key, n in groups.most_common()
        ]

    def unknown(self) -> list[str]:
        """Names and classes of the GRAY rows."""
        return [f"{row.name} ({row.cls})" for row in self.rows if row.verdict == "GRAY"]

    def differences(self, other: Census) -> list[dict[str, Any]]:
        """Where two rule sets disagree on the same model: groups of rows with both verdicts and the other's reason."""
        theirs = {row.name: row for row in other.rows}
        groups: Counter[tuple[Any, ...]] = Counter()
        for row in self.rows:
            its = theirs[row.name]
            if its.verdict != row.verdict:
                groups[row.kind, its.condition, row.verdict, its.verdict, its.residue, its.reason] += 1
        keys = ("kind", "condition", self.rules, other.rules, "residue", "reason")
        return [dict(zip(keys, key, strict=True)) | {"count": n} for key, n in groups.most_common()]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for strict JSON."""
        rows = [{"class" if key == "cls" else key: value for key, value in asdict(row).items()} for row in self.rows]
        head = {"model": self.model, "rules": self.rules, "mode": self.mode}
        return head | self.totals() | {"by_kind": self.by_kind(), "rows": rows, "outside": list(self.outside)}

    def beside(self, other: Census) -> dict[str, Any]:
        """`to_dict` with the totals of another rule set's census of the same model, and where the two disagree."""
        return self.to_dict() | {"differences": self.differences(other), other.rules: other.totals()}


def classify(
    model: Any,
    rules: str | RuleSet = "published",
    *,
    revision: str | None = None,
    training: bool | None = None,
    ranks: bool = False,
) -> Census:
    """Classify every leaf module of a model.

    `model` is a module (taken in the mode it is in), a transformers config, a Hub id, a directory or a `config.json`
    (built without weights, in training mode unless `training=False`). `rules` is "published", "strict" or a `RuleSet`.
    `ranks=True` measures the rank of every linear layer that has weights, instead of assuming it is full (an SVD each).
    Raises `BwskError` if the model cannot be loaded or the rule set does not exist.
    """
    chosen = rule_set(rules)
    built, name = _model(model, revision, training)
    cache: dict[Any, OpInfo] = {}
    rows = []
    covered: set[int] = set()
    for path, module in leaves(built):
        subject = identify(module, cache)
        if ranks:
            subject = _with_rank(path, subject, module)
        rows.append(_row(path, module, subject, chosen.decide(subject)))
        covered.update(id(p) for p in module.parameters())
    outside = tuple(n for n, p in built.named_parameters() if id(p) not in covered)
    return Census(
        **vars(Counts.of(row.verdict for row in rows)),
        model=name,
        rules=chosen.name,
        mode="training" if built.training else "eval",
        rows=tuple(rows),
        outside=outside,
    )


def _model(source: Any, revision: str | None, training: bool | None) -> tuple[nn.Module, str]:
    if isinstance(source, nn.Module):
        if training not in (None, source.training):
            mode = "training" if source.training else "eval"
            raise BwskError(f"{type(source).__name__}: is in {mode} mode; call .train() or .eval() on it first")
        if any(isinstance(module, torch.jit.ScriptModule) for module in source.modules()):
            raise BwskError(f"{type(source).__name__}: holds compiled TorchScript; give the Python module")
        lazy = [name for name, p in source.named_parameters() if is_lazy(p)]
        if lazy:
            raise BwskError(f"{type(source).__name__}: {lazy[0]} has no shape yet; run the model on a batch first")
        return source, type(source).__name__
    from bwsk.architecture import load

    model, name = load(source, revision=revision)
    return model.train(training is not False), name


def _row(path: str, module: nn.Module, subject: OpInfo, rule: Rule | None) -> ModuleRow:
    head = (path, type(module).__name__, subject.kind)
    facts = composition(subject.facts) if "flow" in subject.facts else subject.facts
    tail = (subject.found_by, {k: list(v) if isinstance(v, tuple) else v for k, v in facts.items()})
    size = sum(p.numel() for p in module.parameters())
    if rule is None:
        why = "no rule for this kind" if subject.kind in KINDS else "not recognised by type, behaviour or operations"
        return ModuleRow(*head, "GRAY", None, None, why, None, *tail, size)
    return ModuleRow(*head, str(rule.verdict), rule.condition, str(rule.residue), rule.reason, rule.source, *tail, size)


def _with_rank(name: str, subject: OpInfo, module: nn.Module) -> OpInfo:
    weight = getattr(module, "weight", None)
    if subject.kind != "linear" or weight is None or weight.is_meta or weight.dim() != 2:
        return subject
    if not bool(weight.isfinite().all()):
        raise BwskError(f"{name or type(module).__name__}: its weight is not finite, so it has no rank")
    rank = int(torch.linalg.matrix_rank(weight.detach().double()))
    return OpInfo(subject.kind, {**subject.facts, "rank": rank}, subject.found_by)
