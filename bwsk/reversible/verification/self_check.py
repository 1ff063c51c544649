"""The self-check of an installation: one tiny batch through the stock model and through the engine, compared by bits.

The model itself is run, on its own device and in its own dtype, with dropout on. Its random state, gradients, buffers
and hooks are left as they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bwsk._compat import FakeTensor
from bwsk.architecture import one_line
from bwsk.errors import BwskError
from bwsk.example_batch import loss_of
from bwsk.reversible.patching import Observer, without_hooks
from bwsk.reversible.plan import Plan
from bwsk.reversible.verification.random_batch import random_batch
from bwsk.reversible.verification.random_state import random_state_kept, seed_all
from bwsk.reversible.verification.tensor_bits import distance, identical, norm
from bwsk.units import Precision, dtype_of

# Sequences and tokens of the batch: small enough for the weights, not the batch, to decide what it costs.
_SHAPE = (2, 4, 3)
# Rows of a token table beyond which only as many are used: the gradients of whole tables would cost more than all else.
_ROWS = 512
# What "as exact as stock" means for a loss head that is not bit-identical: relative to the tensor's norm.
_TOLERANCE = 1e-3


@dataclass
class _Step:
    """The loss and the gradients of one step, by parameter name; `outputs`: what each module returned, in order."""

    loss: Tensor
    gradients: dict[str, Tensor | None]
    outputs: dict[str, Tensor] = field(default_factory=dict)


class SelfCheck:
    """Compares a model's step before and after a change; made before it, `difference` is called after it."""

    def __init__(self, model: nn.Module, precision: Precision, plan: Plan, *, cut_tables: bool) -> None:
        """Run the stock step.

        Bits are compared, or values to a relative 1e-3 if the plan promises no more. Of blocks that are alike and run
        alike, the weights of the first get gradients. `cut_tables`: whether large token tables are replaced by their
        first rows while a step runs, which a T5 allows. Those of other models get no gradient meanwhile.
        """
        self.model, self.precision, self.cut_tables = model, precision, cut_tables
        self.exact = plan.head.kind != "chunked"
        self.repeated = _repeated_blocks(model, plan)
        self.inputs, self.stock = self._first_step()
        self.summary = ""  # what was compared, once `difference` has

    def difference(self, undo: Callable[[], object]) -> str | None:
        """What the step does differently now, as half a sentence; None if it is the stock one.

        If there is a difference, `undo` is called, which makes the model stock again. What the stock model itself does
        not repeat (CUDA without deterministic mode) is not compared.
        """
        try:
            ours = self._step(self.inputs)
        except Exception as error:  # whatever it is, the stock step did not end in it
            undo()
            return f"its step fails where the stock model's does not ({one_line(error)})"
        count = sum(gradient is not None for gradient in self.stock.gradients.values())
        same = "bit-identical" if self.exact else "within a relative 1e-3"
        self.summary = f"on a tiny batch the loss and {count} gradients are {same}"
        if not self._differing(ours):
            return None
        ours = self._step(self.inputs, observed=True)
        undo()
        stock = self._step(self.inputs, observed=True)
        unsteady = self._differing(stock)
        differing = [name for name in self._differing(ours) if name not in unsteady]
        if not differing:
            self.summary += f", {len(unsteady)} of them not compared: the stock model itself does not repeat them"
            if "loss" in unsteady:
                warnings.warn(
                    f"make_reversible: {type(self.model).__name__} gives another loss each time for the same batch and "
                    "seed, so the self-check could not compare it",
                    stacklevel=3,
                )
            return None
        for name, output in stock.outputs.items():
            if name and name in ours.outputs and not self._same_output(output, ours.outputs[name]):
                return f"{name} returns something else than the stock model's"
        if "loss" in differing:
            return f"the loss is {ours.loss.item():.9g}, the stock model's is {self.stock.loss.item():.9g}"
        # A backward goes from the last module to the first, and what is wrong there spoils everything before it.
        order = {name: index for index, name in enumerate(stock.outputs)}
        last = max(differing, key=lambda name: order.get(name.rpartition(".")[0], -1))
        return f"the gradient of {last} is not the stock model's"

    def _differing(self, other: _Step) -> list[str]:
        """ "loss" and the parameters in which a step differs from the stock one."""
        found = [] if self._same(self.stock.loss, other.loss) else ["loss"]
        return found + [n for n, g in self.stock.gradients.items() if not self._same(g, other.gradients[n])]

    def _same(self, a: Tensor | None, b: Tensor | None) -> bool:
        if self.exact or a is None or b is None:
            return identical(a, b)
        return distance(a, b) <= _TOLERANCE * norm(a)

    def _same_output(self, a: Tensor, b: Tensor) -> bool:
        """The same for what a module returns; a head without logits passes on the hidden states in their place."""
        return self._same(a, b) if self.exact or a.shape == b.shape else True

    def _first_step(self) -> tuple[dict[str, Any], _Step]:
        """A batch that the stock model accepts, and its step; raises `BwskError` if there is none."""
        reason: Exception | None = None
        for labelled in (True, False):
            try:
                with _tables(self.model, self.cut_tables):
                    inputs = random_batch(self.model, *_SHAPE, seed=0, labelled=labelled, device=_device_of(self.model))
                inputs.pop("use_cache", None)  # as the model has it by default
                return inputs, self._step(inputs)
            except Exception as error:  # models refuse inputs in as many ways as there are models
                reason = reason or error
        assert reason is not None
        raise BwskError(
            f"make_reversible: the stock {type(self.model).__name__} does not run on the tiny batch of the self-check "
            f"({one_line(reason)}); pass verify=False to leave the check out"
        )

    def _step(self, inputs: dict[str, Any], *, observed: bool = False) -> _Step:
        """A step of the model as it is; `observed` keeps what each module returns."""
        outputs: dict[str, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(_as_in_training(self.model))
            stack.enter_context(_tables(self.model, self.cut_tables))
            stack.enter_context(_frozen([p for block in self.repeated for p in block.parameters() if p.requires_grad]))
            weights = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            if observed:
                for name, module in self.model.named_modules():
                    stack.enter_context(_observed(name, module, outputs))
            with _autocast(self.model, self.precision):
                loss = loss_of(self.model(**inputs))
            if loss is None:
                raise BwskError("it returns nothing to train on")
            found: Any = (None,) * len(weights)
            if loss.requires_grad and weights:
                found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        return _Step(loss.detach(), dict(zip(weights, found, strict=True)), outputs)


def can_be_checked(model: nn.Module) -> bool:
    """Whether the model has values: on the meta device and under fake tensors there is nothing to compare."""
    return not any(p.is_meta or isinstance(p, FakeTensor) for p in model.parameters())


def _device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _autocast(model: nn.Module, precision: Precision) -> torch.autocast:
    return torch.autocast(_device_of(model).type, dtype_of(precision), enabled=precision != "fp32")


def _repeated_blocks(model: nn.Module, plan: Plan) -> list[nn.Module]:
    """The blocks of which an earlier one has the same modules, weights of the same shapes, and the same levels."""
    seen: set[Any] = set()
    found = []
    for unit, choice in zip(plan.units, plan.choices, strict=True):
        block = model.get_submodule(unit.name)
        modules, shapes = tuple(map(type, block.modules())), tuple(p.shape for p in block.parameters())
        kind = (modules, shapes, tuple(level for _, level in choice.levels))
        if kind in seen:
            found.append(block)
        seen.add(kind)
    return found


@contextmanager
def _frozen(weights: list[nn.Parameter]) -> Iterator[None]:
    """Weights without gradients for a while."""
    try:
        for weight in weights:
            weight.requires_grad = False
        yield
    finally:
        for weight in weights:
            weight.requires_grad = True


@contextmanager
def _tables(model: Any, cut: bool) -> Iterator[None]:
    """Large token tables replaced by their first rows (`cut`), or without a gradient."""
    special = [v for k, v in model.config.to_dict().items() if k.endswith("_token_id") and isinstance(v, int)]
    rows = max(_ROWS, *(1 + token for token in special), 1)
    tables = {
        id(table.weight): table.weight
        for table in (model.get_input_embeddings(), model.get_output_embeddings())
        if isinstance(getattr(table, "weight", None), nn.Parameter)
        and table.weight.shape[0] > 2 * rows
        and table.weight.requires_grad
    }
    if not cut:
        with _frozen(list(tables.values())):
            yield
        return
    short = {key: nn.Parameter(weight.detach()[:rows]) for key, weight in tables.items()}
    places = [(m, n, p) for m in model.modules() for n, p in m._parameters.items() if p is not None and id(p) in short]
    try:
        for module, name, weight in places:
            module._parameters[name] = short[id(weight)]
        yield
    finally:
        for module, name, weight in places:
            module._parameters[name] = weight


@contextmanager
def _observed(name: str, module: nn.Module, outputs: dict[str, Tensor]) -> Iterator[None]:
    """Keep the first output of a module, the first time that it is called."""

    def keep(output: Any) -> None:
        first = (
            output
            if isinstance(output, Tensor)
            else next(iter(output.values() if isinstance(output, dict) else output), None)
        )
        if isinstance(first, Tensor):
            outputs.setdefault(name, first.detach().clone())

    handle = module.register_forward_hook(Observer(keep))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    """The model in training mode, with a seed and without hooks; afterwards everything is as it was."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    buffers = [{name: (b, b.clone()) for name, b in module._buffers.items() if b is not None} for module in modules]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(random_state_kept())
        stack.enter_context(without_hooks(model))
        seed_all(0)
        try:
            for module in modules:
                module.training = True
            yield
        finally:
            for module, mode, kept in zip(modules, modes, buffers, strict=True):
                module.training = mode
                for name, (buffer, values) in kept.items():
                    with torch.no_grad():
                        if not torch.equal(buffer, values):
                            buffer.copy_(values)
                    module._buffers[name] = buffer
