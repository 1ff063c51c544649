"""`same_gradients`: train a model in two set-ups side by side and compare the loss and every gradient bit by bit.

Each side is a deep copy of the model that starts from the same seed. A step is a forward and a backward pass; between
two steps each side is updated from its own gradients, p ← p − 10⁻³ g. The random numbers of a side go on from step to
step, so that a set-up that draws more or fewer of them is found as well.

Before that, set-up a is run once more, alone, to see whether it is repeatable at all. Of that run fingerprints are
kept, not gradients: in memory are never more than two copies of the model with their gradients, and a third one in
float64 where something differs.
"""

from __future__ import annotations

import copy
import gc
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from bwsk._compat import tree_map_only
from bwsk.architecture import one_line
from bwsk.errors import BwskError
from bwsk.example_batch import own_loss_of
from bwsk.reversible.patching import is_patched
from bwsk.reversible.verification.float64_reference import Float64Reference
from bwsk.reversible.verification.gradient_comparison import GradientComparison, GradientRow, SideName
from bwsk.reversible.verification.random_state import RandomState, random_state_kept, seed_all
from bwsk.reversible.verification.setups import CHECKPOINTED, Setup, Shape, require_setup, set_up, setup_name
from bwsk.reversible.verification.tensor_bits import distance, fingerprint, identical, norm, ratio
from bwsk.units import Precision, dtype_of, to_precision

STEPS = 3
# Step size of the update, small enough for freshly initialised models of any kind.
RATE = 1e-3
# In float16 the gradients of a mean loss underflow without a factor; a fixed one, so that no step is skipped.
SCALES = {"fp32": 1.0, "bf16": 1.0, "fp16": 1024.0}
Gradients = dict[str, Tensor | None]


def same_gradients(
    model: nn.Module,
    batch: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    a: Setup = "stock",
    b: Setup = "fast",
    *,
    steps: int | None = None,
    precision: str = "fp32",
    seed: int = 0,
    on_pass: Callable[[], object] | None = None,
) -> GradientComparison:
    """Compare two set-ups of a model: loss and every gradient, bit by bit, over several steps, dropout on.

    `assert same_gradients(model, batch)` is a test; the result's text says what differs and by how much.

    `batch`: inputs by name, with labels, or a list of such batches, one per step. Tensors are on the model's device.
    `a`, `b`: each one of
    - "stock": the model as it is given;
    - "checkpoint", "checkpoint-reentrant": the model's own gradient checkpointing, non-reentrant or reentrant;
    - a budget of `make_reversible`: "fast", "balanced", "max", "900 MiB", 0.6, planned for the shape of the batch;
    - "compiled": `torch.compile` of the model;
    - a function that gets a deep copy of the model, and sets it up in place or returns the module to call.
    `steps`: 3 unless given, or the number of batches. `precision`: "fp32", or "bf16" or "fp16" autocast, with a fixed
    loss scale of 1024 for the latter. `on_pass` is called after each of the 3 · steps passes.

    Two tensors are identical if `torch.equal` says so; NaNs with equal bits count as equal too. A gradient that is None
    on one side only is a difference. The model is put in training mode unless it is in it, on copies: the model, its
    gradients and buffers, and the random state of torch, numpy and Python are left as they are.

    Raises `BwskError` for an unknown set-up, a model that a set-up refuses, a batch that the model refuses or returns
    no loss for, and a loss of `a` that is not finite.
    """
    kind = to_precision(precision)
    batches = _batches(batch, steps)
    for side, setup in (("a", a), ("b", b)):
        require_setup(side, setup)
    _require_model(model)
    run = _Run(model, batches, kind, seed, on_pass or (lambda: None))
    with random_state_kept(), torch.inference_mode(False), torch.enable_grad():
        return run.compare(a, b)


class _Run:
    """One comparison: what both sides share, and what differs so far."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[Mapping[str, Any]],
        precision: Precision,
        seed: int,
        on_pass: Callable[[], object],
    ) -> None:
        self.model, self.batches, self.precision, self.seed, self.on_pass = model, batches, precision, seed, on_pass
        self.device = next(model.parameters()).device
        self.shape = shape_of(model, batches)
        self.rows: dict[str, GradientRow] = {}
        self.losses: list[tuple[float | None, float | None]] = []
        self.loss_steps: list[int] = []
        self.reference: Float64Reference | None = None  # made in the first step that differs

    def compare(self, a: Setup, b: Setup) -> GradientComparison:
        prints = self._fingerprints(a)
        one, other = _Side(self, "a", a), _Side(self, "b", b)
        if one.parameters.keys().isdisjoint(other.parameters):
            raise BwskError(f"b: {other.title} has no parameter in common with the model; nothing can be compared")
        unstable: dict[str, None] = {}
        for step, batch in enumerate(self.batches, 1):
            start = one.random
            loss_a, grads_a = one.step(batch, step)
            now = {"loss": loss_a, **grads_a}
            unstable |= dict.fromkeys(name for name in now if prints[step - 1].get(name) != fingerprint(now[name]))
            loss_b, grads_b = other.step(batch, step)
            self.losses.append((_finite(loss_a), _finite(loss_b)))
            if not identical(loss_a, loss_b):
                self.loss_steps.append(step)
            changed = self._note(step, grads_a, grads_b)
            if self.reference is None and (changed or self.loss_steps):
                start.restore()
                self.reference = self._reference(one.parameters, batch)
                dtypes = {p.dtype for p in one.parameters.values()} | {dtype_of(self.precision)}
                self.reference.require_near((loss_a.item(), grads_a), (loss_b.item(), grads_b), dtypes=dtypes)
                for name in changed:
                    self._measure(name, grads_a.get(name), grads_b.get(name))
                self.reference.forget()
            if step < len(self.batches):
                one.update(grads_a)
                other.update(grads_b)
        rows = list(self.rows.values())
        if (reference := self.reference) is not None:
            rows.sort(key=lambda row: reference.place(row.module))
        return GradientComparison(
            type(self.model).__name__, one.title, other.title, len(self.batches), self.precision, self.seed,
            str(self.device), {name: version(name) for name in ("torch", "transformers")},
            tuple(unstable), what_to_set(self.device) if unstable else "",
            tuple(self.losses), tuple(self.loss_steps), reference.missing if reference else "", self._hint(a, b),
            tuple(replace(row, repeatable=row.name not in unstable) for row in rows),
        )  # fmt: skip

    def _hint(self, a: Setup, b: Setup) -> str:
        """A cause of a difference that is known beforehand, or nothing."""
        checkpointed = [setup in CHECKPOINTED for setup in (a, b) if not callable(setup)]
        caches = getattr(getattr(self.model, "config", None), "use_cache", False)
        if sorted(checkpointed) != [False, True] or not caches or all("use_cache" in batch for batch in self.batches):
            return ""
        return (
            "Checkpointing switches the cache of keys and values off, whose layout affects rounding: "
            "give use_cache=False in the batch to leave that aside"
        )

    def _fingerprints(self, setup: Setup) -> list[dict[str, bytes | None]]:
        """Fingerprints of the loss and of every gradient, per step, of a run of its own."""
        side, prints = _Side(self, "a", setup), []
        for step, batch in enumerate(self.batches, 1):
            loss, gradients = side.step(batch, step)
            prints.append({name: fingerprint(value) for name, value in {"loss": loss, **gradients}.items()})
            side.update(gradients)
        del side
        gc.collect()  # models often hang in cycles
        return prints

    def _note(self, step: int, a: Gradients, b: Gradients) -> list[str]:
        """Add to the rows which gradients differ in a step; returns their names."""
        changed = []
        for name in dict.fromkeys([*a, *b]):
            row = self.rows.setdefault(name, GradientRow(name, name.rpartition(".")[0]))
            x, y = a.get(name), b.get(name)
            if not identical(x, y):
                changed.append(name)
                missing: SideName | None = "a" if x is None else "b" if y is None else None
                self.rows[name] = replace(row, steps=(*row.steps, step), missing=row.missing or missing)
        return changed

    def _measure(self, name: str, a: Tensor | None, b: Tensor | None) -> None:
        """Add to a row how far apart its gradients are, and how far from the reference."""
        assert self.reference is not None
        apart = None if a is None or b is None else ratio(distance(a, b), max(norm(a), norm(b)))
        error_a, error_b = self.reference.errors(name, a, b)
        self.rows[name] = replace(self.rows[name], difference=apart, error_a=error_a, error_b=error_b)

    def _reference(self, weights: dict[str, nn.Parameter], batch: Mapping[str, Any]) -> Float64Reference:
        """The step in float64, from these weights and the present random state, with the same loss scale."""
        found = Float64Reference(_copy(self.model), dict(weights))
        found.run(*_own(batch, torch.float64), SCALES[self.precision], loss_in)
        return found


class _Side:
    """A deep copy of the model in one set-up, with the random state that it has reached."""

    def __init__(self, run: _Run, name: SideName, setup: Setup) -> None:
        self.run, self.name, self.title = run, name, setup_name(setup)
        model = _copy(run.model)
        seed_all(run.seed)
        self.module = set_up(model, setup, run.shape, run.precision)
        seed_all(run.seed)
        self.random = RandomState()
        own, called = dict(model.named_parameters()), dict(self.module.named_parameters())
        wraps = not {id(p) for p in own.values()}.isdisjoint(map(id, called.values()))
        self.parameters = own if wraps else called  # under the model's names, whatever wraps it

    def step(self, batch: Mapping[str, Any], step: int) -> tuple[Tensor, Gradients]:
        """Forward and backward pass; returns the loss and the gradient of every parameter, as the owner of them."""
        run = self.run
        self.random.restore()
        inputs, leaves = _own(batch)
        given = ", ".join(f"{key} {tuple(v.shape)}" for key, v in inputs.items() if isinstance(v, Tensor))
        where = f"{type(run.model).__name__} ({self.name}: {self.title})"
        try:
            with torch.autocast(run.device.type, dtype=dtype_of(run.precision), enabled=run.precision != "fp32"):
                outputs = self.module(**inputs)
        except (BwskError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # models refuse inputs in as many ways as there are models
            raise BwskError(f"{where}: does not run on {given or 'this batch'}: {one_line(error)}") from error
        loss = loss_in(outputs)
        if loss is None:
            raise BwskError(f"{where}: returns no loss for {given}; give a batch with labels to a model with a loss")
        if loss.numel() != 1 or not loss.requires_grad:
            found = f"of shape {tuple(loss.shape)}" if loss.numel() != 1 else "that requires no gradient"
            raise BwskError(f"{where}: returns a loss {found}; it must be one number with a gradient")
        if self.name == "a" and _finite(loss) is None:
            raise BwskError(f"{where}: the loss of step {step} is {loss.item()}; give a batch with a finite loss")
        del outputs
        try:
            (loss * SCALES[run.precision]).backward()
        except (BwskError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise BwskError(f"{where}: its backward pass fails in step {step}: {one_line(error)}") from error
        gradients = {name: p.grad for name, p in self.parameters.items()} | {n: x.grad for n, x in leaves.items()}
        for parameter in self.parameters.values():
            parameter.grad = None
        self.random = RandomState()
        run.on_pass()
        return loss.detach(), gradients

    def update(self, gradients: Gradients) -> None:
        """One step of plain gradient descent."""
        rate = RATE / SCALES[self.run.precision]
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if (gradient := gradients[name]) is not None:
                    parameter.add_(gradient, alpha=-rate)


def what_to_set(device: torch.device) -> str:
    """What to set for repeatable results on this device, where they are not; says so if all of it is set."""
    missing = []
    if not torch.are_deterministic_algorithms_enabled() or torch.is_deterministic_algorithms_warn_only_enabled():
        missing.append("torch.use_deterministic_algorithms(True)")
    if device.type == "cuda":
        if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
            missing.append("CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment before torch uses the GPU")
        if torch.backends.cudnn.benchmark:
            missing.append("torch.backends.cudnn.benchmark = False")
    if missing:
        return "set " + " and ".join(missing)
    kernels = " or uses an attention kernel that is not repeatable (try eager attention)" * (device.type == "cuda")
    return f"deterministic algorithms are on already: the model draws from a random generator of its own{kernels}"


def loss_in(outputs: Any) -> Tensor | None:
    """The loss that a model returned, which may be all that it returned."""
    return outputs if isinstance(outputs, Tensor) else own_loss_of(outputs)


def shape_of(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> Shape | None:
    """(batch, input tokens, target tokens) that no batch exceeds; None if that cannot be told from their names.

    Images have no tokens: 1. Target tokens are None unless the model is an encoder-decoder.
    """
    names = (getattr(model, "main_input_name", "input_ids"), "input_ids", "inputs_embeds")
    shapes = []
    for batch in batches:
        given = next((x for name in names if isinstance(x := batch.get(name), Tensor) and x.dim() > 1), None)
        if given is None:
            return None
        target = next(
            (
                x.shape[1]
                for name in ("labels", "decoder_input_ids", "decoder_inputs_embeds")
                if isinstance(x := batch.get(name), Tensor) and x.dim() > 1
            ),
            None,
        )
        shapes.append((given.shape[0], given.shape[1] if given.dim() < 4 else 1, target))
    rows, ins, outs = zip(*shapes, strict=True)
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return max(rows), max(ins), max((x for x in outs if x is not None), default=None) if decodes else None


def _batches(batch: Any, steps: int | None) -> list[Mapping[str, Any]]:
    """The batch of each step."""
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise BwskError(f"steps: must be a whole number of at least 1, found {steps!r}")
    if isinstance(batch, Mapping):
        return [batch] * (STEPS if steps is None else steps)
    if not isinstance(batch, Sequence) or not batch or not all(isinstance(one, Mapping) for one in batch):
        found = f"{type(batch).__name__}" if not isinstance(batch, Sequence) else f"{batch!r:.60}"
        raise BwskError(f"batch: found {found}; give inputs by name, {{name: tensor}}, or a list of such batches")
    if steps is not None and len(batch) < steps:
        raise BwskError(f"batch: found {len(batch)} batches for {steps} steps; give one per step")
    return list(batch[:steps])


def _require_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise BwskError(f"same_gradients: found {type(model).__name__}, not a model; give a torch.nn.Module")
    name = type(model).__name__
    parameters = list(model.parameters())
    if not parameters or any(parameter.is_meta for parameter in parameters):
        found = "weights without values (device meta)" if parameters else "no parameters"
        raise BwskError(f"same_gradients: {name} has {found}; give a model with weights")
    if any(is_patched(module) for module in model.modules()):
        raise BwskError(f"same_gradients: {name} is reversible already; call undo() on the handle, or give a copy")


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy in training mode, without gradients."""
    try:
        found = copy.deepcopy(model)
    except Exception as error:  # whatever a model holds that cannot be copied
        raise BwskError(f"same_gradients: {type(model).__name__} cannot be copied: {one_line(error)}") from error
    found.zero_grad(set_to_none=True)
    return found if found.training else found.train()


def _own(batch: Mapping[str, Any], dtype: torch.dtype | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Copies of the inputs, floating-point ones in `dtype`, and by name those whose gradient is asked for."""

    def own(x: Tensor) -> Tensor:
        made = x.detach().clone()
        return (made.to(dtype) if dtype and x.is_floating_point() else made).requires_grad_(x.requires_grad)

    inputs = tree_map_only(Tensor, own, dict(batch))
    leaves = {f"inputs.{name}": x for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}
    return inputs, leaves


def _finite(loss: Tensor) -> float | None:
    value = loss.item()
    return value if math.isfinite(value) else None
