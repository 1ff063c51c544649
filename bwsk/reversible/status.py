"""What each module of a reversible model runs: its planned level, and how often and why the stock forward instead."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from bwsk.reversible.plan import Plan


class Fallbacks:
    """Counts the training forwards that ran stock code, by module and reason, and warns of the first one."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()

    def note(self, module: str, reason: str) -> None:
        """Count one forward of `module` that runs its stock code because of `reason`, half a sentence."""
        if not self.counts:
            warnings.warn(
                f"make_reversible: {module or 'the model'} runs its stock forward, since {reason}. Its results are "
                "right, but it saves no memory. Further modules are not reported one by one; see handle.status()",
                stacklevel=2,
            )
        self.counts[module, reason] += 1


@dataclass(frozen=True)
class _Watch:
    name: str
    fallbacks: Fallbacks


def watch(module: nn.Module, name: str, fallbacks: Fallbacks) -> None:
    """Count the stock forwards of a changed module under this name."""
    vars(module)["_bwsk_watch"] = _Watch(name, fallbacks)


def fell_back(module: nn.Module, reason: str) -> None:
    """Count that a changed module runs its stock forward in training."""
    found = module.__dict__.get("_bwsk_watch")
    if found is not None:
        found.fallbacks.note(found.name, reason)


@dataclass(frozen=True)
class ModuleStatus:
    """One module of the plan: the level it runs at, its training forwards that ran stock code, and why."""

    module: str
    runs: str
    stock_forwards: int
    reasons: tuple[str, ...]


class Status(list[ModuleStatus]):
    """The modules of a plan in forward order, and the loss head last; `str()` gives a table."""

    def __str__(self) -> str:
        width = max([len("module"), *(len(row.module) for row in self)])
        levels = max([len("runs"), *(len(row.runs) for row in self)])
        lines = [f"{'module':<{width}}  {'runs':<{levels}}  stock forwards"]
        for row in self:
            why = f" ({'; '.join(row.reasons)})" if row.reasons else ""
            lines.append(f"{row.module:<{width}}  {row.runs:<{levels}}  {row.stock_forwards}{why}")
        return "\n".join(lines)


def status_of(plan: Plan, fallbacks: Fallbacks) -> Status:
    """What a plan's modules run, with the stock forwards of everything inside them."""
    counts = dict(fallbacks.counts)
    found = Status()
    for module, level in plan.levels.items():
        inside = [key for key in counts if key[0] == module or key[0].startswith(f"{module}.")]
        found.append(_row(module, str(level), {key: counts.pop(key) for key in inside}))
    for module in dict.fromkeys(module for module, _ in counts):
        if module:
            found.append(_row(module, "as the engine's", {key: n for key, n in counts.items() if key[0] == module}))
    found.append(_row("loss head", plan.head.kind, {key: n for key, n in counts.items() if not key[0]}))
    return found


def _row(module: str, runs: str, counts: dict[tuple[str, str], int]) -> ModuleStatus:
    return ModuleStatus(module, runs, sum(counts.values()), tuple(dict.fromkeys(reason for _, reason in counts)))
