"""`make_reversible`: plan what a training step saves, set that up on the model, and remove it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from bwsk._compat import inside_compiled
from bwsk.architecture import load_config
from bwsk.errors import BwskError
from bwsk.memory.fake_step import require_shape
from bwsk.memory.training_loop import PLAIN, TrainingLoop, precision_in
from bwsk.reversible import checkpointed
from bwsk.reversible.budget import NAMED
from bwsk.reversible.patching import is_patched, patched_modules, state_of
from bwsk.reversible.plan import Plan, solve
from bwsk.reversible.status import Fallbacks, Status, status_of, watch
from bwsk.reversible.t5 import engine as t5
from bwsk.reversible.verification.self_check import SelfCheck, can_be_checked
from bwsk.units import Precision, to_precision

if TYPE_CHECKING:
    from bwsk.reversible.plan_row import PlanRow

# The batch that a named budget is planned for when none is given: the published study's.
DEFAULT_SHAPE = (4, 256, 256)


class Engine(Protocol):
    """What the module of an engine has: planning, setting up a plan, and removing it."""

    def plan(
        self,
        model: Any,
        budget: Any,
        shape: tuple[int, int, int],
        precision: Precision = ...,
        loop: TrainingLoop = ...,
    ) -> Plan:
        """The plan for a model or config in a loop: `shape` is (batch, input tokens, target tokens)."""

    def install(self, model: nn.Module, plan: Plan) -> list[nn.Module]:
        """Set up a plan; returns the modules changed."""

    def uninstall(self, modules: list[nn.Module]) -> None:
        """Remove what `install` set up."""


@dataclass(repr=False)
class Reversible:
    """A model whose training steps follow `plan`; `undo()` or the end of a `with` block restores the stock model."""

    model: nn.Module
    plan: Plan
    verified: str | None = None  # what the self-check compared; None if it was left out
    fallbacks: Fallbacks = field(default_factory=Fallbacks)
    _changed: dict[nn.Module, Any] = field(default_factory=dict)  # module -> its state, by which it is known later
    _uninstall: Callable[[list[nn.Module]], None] | None = None

    def __repr__(self) -> str:
        return f"<Reversible {type(self.model).__name__}, {self.plan!r}>"

    def __enter__(self) -> Reversible:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def _set_up(self, engine: Engine) -> None:
        self._uninstall = engine.uninstall
        self._take(engine.install(self.model, self.plan))

    def _take(self, changed: list[nn.Module]) -> None:
        """Undo these modules with the handle, and count their stock forwards."""
        names = {id(module): name for name, module in self.model.named_modules()}
        for module in changed:
            self._changed[module] = state_of(module)
            watch(module, names[id(module)], self.fallbacks)

    def rows(self) -> list[PlanRow]:
        """The operations of the plan, each with its S/K verdict and whether its result is saved or recomputed."""
        from bwsk.reversible.report import rows

        return rows(self.plan)

    def status(self) -> Status:
        """Per module of the plan what it runs, how many of its training forwards ran stock code, and why."""
        return status_of(self.plan, self.fallbacks)

    def undo(self) -> nn.Module:
        """Restore the stock forward of every module; returns the model. Calling it again does nothing.

        What another `make_reversible` has set up since then stays.
        """
        mine = [m for m, state in self._changed.items() if is_patched(m) and state_of(m) is state]
        if self._uninstall is not None:
            self._uninstall(mine)
        self._changed.clear()
        return self.model


def undo(model: nn.Module) -> nn.Module:
    """Restore the stock forward of every module of `model`; returns the model. For a stock model it does nothing.

    For a model whose handle is not at hand, such as a deep copy or an unpickled model: a copy is as reversible as its
    original, and neither changes with the other. Raises `BwskError` if `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise BwskError(f"undo: found {type(model).__name__}, not a model; pass the model that make_reversible got")
    checkpointed.uninstall(list(patched_modules(model)))
    return model


def make_reversible(
    model: nn.Module,
    budget: str | float | None = "fast",
    *,
    batch: int | None = None,
    input_length: int | None = None,
    target_length: int | None = None,
    precision: str | None = None,
    training_args: Any = None,
    verify: bool = True,
) -> Reversible:
    """Selective activation recomputation for a stock Hugging Face model, in place, with bit-identical gradients.

    `budget`:
    - "fast": the lowest peak for at most 2 % more FLOPs; gradients are bit-identical to the stock model's.
    - "balanced": at most 3 % more FLOPs, and a loss head that never makes the logits (outputs.logits is None while
      training). Gradients are as exact as the stock ones but not bit-identical. Under autocast the head is the exact
      one, and gradients are bit-identical.
    - "max": the lowest peak, for about one more forward pass; bit-identical.
    - a size such as "900 MiB" or "8 GB", or a fraction of the stock step's peak such as 0.6: the fewest FLOPs found
      that stay within it. This needs the shape of a batch: `batch`, `input_length` and `target_length` (tokens).

    `precision`: "fp32", "bf16" or "fp16" (autocast), which the sizes of the plan depend on. `training_args`: the
    `TrainingArguments` of a Trainer, for a plan with what it adds to a step; batch and precision, if not given, are
    taken from it. `verify`: run one tiny
    batch through the stock model and through the engine, compare loss and gradients bit by bit (under "balanced" to a
    relative 1e-3), and refuse the model if they differ. That takes two small steps and, for as long as it runs, memory
    for two copies of the gradients. On CUDA bits are promised under `torch.use_deterministic_algorithms(True)` only,
    for stock models are not repeatable without it; what the model itself does not repeat is not compared.

    Weights, state_dict, save_pretrained, eval mode and generate are untouched. Raises `BwskError` if the model is not
    supported, the budget cannot be met, or the self-check finds a difference.
    """
    _check_model(model)
    kind = precision_in(training_args, precision)
    shape = _shape(budget, batch, input_length, target_length, training_args)
    engine = engine_for(model)
    chosen = engine.plan(model, budget, shape, kind, TrainingLoop.of(training_args))
    handle = Reversible(model, chosen)
    handle._set_up(engine)
    if not verify or not can_be_checked(model):
        return handle
    handle.undo()
    check = SelfCheck(model, kind, chosen, cut_tables=engine is t5)
    handle._set_up(engine)
    if found := check.difference(handle.undo):
        raise BwskError(
            f"make_reversible: {found}; this {type(model).__name__} does something that the engine does not know. "
            "Leave make_reversible out, or report it (verify=False skips this check and trains another model)"
        )
    if not handle._changed:  # undone to see what the stock model itself repeats
        handle._set_up(engine)
    handle.fallbacks.counts.clear()
    handle.verified = check.summary
    return handle


def engine_for(model: Any) -> Engine:
    """The engine of a model or config: T5's own, or checkpointing of the stock graph for everything else."""
    if t5.covers(model):
        return t5
    return checkpointed


def _check_model(model: nn.Module) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        inner = inside_compiled(model) or getattr(model, "module", None)
        hint = "call it on the model inside, before wrapping it" if inner is not None else "pass a transformers model"
        raise BwskError(f"make_reversible: found {type(model).__name__}, not a transformers model; {hint}")
    if any(is_patched(module) for module in model.modules()):
        raise BwskError("make_reversible: this model already is; call bwsk.undo(model) first")
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise BwskError(
            "make_reversible: gradient checkpointing is on; call model.gradient_checkpointing_disable() first"
        )


def _shape(
    budget: Any, batch: int | None, input_length: int | None, target_length: int | None, training_args: Any
) -> tuple[int, int, int]:
    """(batch, input tokens, target tokens), as given, the batch of a Trainer, or the default ones."""
    if batch is None and training_args is not None:
        batch = training_args.per_device_train_batch_size
    if (batch is None or training_args is not None) and input_length is None and target_length is None:
        if isinstance(budget, str) and budget in NAMED:
            return batch or DEFAULT_SHAPE[0], *DEFAULT_SHAPE[1:]
        raise BwskError(
            f"budget {budget!r}: how much fits depends on the batch; give batch=, input_length= (and target_length=)"
        )
    if batch is None or input_length is None:
        raise BwskError("make_reversible: give batch= and input_length= together (and target_length=), or neither")
    require_shape(batch, input_length, target_length)
    return batch, input_length, target_length or input_length


def plan(
    model: Any,
    budget: str | float = "fast",
    *,
    batch: int = 4,
    input_length: int = 256,
    target_length: int | None = None,
    precision: str | None = None,
    training_args: Any = None,
) -> Plan:
    """What `make_reversible` would do, without a model in memory.

    `model`: a model, a config, a Hub id, a directory or a `config.json`; the other arguments are those of
    `make_reversible`. Raises `BwskError` for a model or a budget that it would refuse.
    """
    model = model if isinstance(model, nn.Module) else load_config(model)
    precision, loop = precision_in(training_args, precision), TrainingLoop.of(training_args)
    return plan_of(model, budget, (batch, input_length, target_length or input_length), precision, loop)


def plan_of(
    model: Any, budget: Any, shape: tuple[int, int, int], precision: str = "fp32", loop: TrainingLoop = PLAIN
) -> Plan:
    """The plan for a model or config in a loop: `shape` is (batch, input tokens, target tokens)."""
    require_shape(*shape)
    return engine_for(model).plan(model, budget, shape, to_precision(precision), loop)


def curve_of(config: Any, shape: tuple[int, int, int], precision: str = "fp32", points: int = 12) -> list[Plan]:
    """Plans along the trade-off between memory and FLOPs, from the least recomputation to the lowest peak."""
    first = plan_of(config, NAMED["fast"].name, shape, precision)
    first.choice_indices = [0] * len(first.units)
    lowest = solve(_copy(first), None, None)
    found = [first]
    for i in range(1, points):
        cap = first.peak - (first.peak - lowest.peak) * i // (points - 1)
        found.append(solve(_copy(first), cap, None))
    return found


def _copy(plan: Plan) -> Plan:
    return Plan(plan.budget, plan.units, list(plan.choice_indices), plan.head, plan.base, plan.guarantee, plan.context)
