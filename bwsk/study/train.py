"""Train one variant of a study: the published recipe, resumable to the bit.

AdamW (decoupled weight decay on everything, fused kernel), linear warm-up then cosine (`schedule`), gradient clipping
by global norm, autocast with float32 weights (float16 with a gradient scaler), validation by the published perplexity,
early stopping, and the best model as the result. Variants of one initialisation differ in their mode alone:

    conventional      stock training
    bwsk-analyzed     the same, plus the S/K census and the erasure measured at each validation
    bwsk-reversible   bit-identical gradients with less memory (`reversible`)

The training loop does not wait for the device: losses and gradient norms stay there until a point of the loss curve is
due.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bwsk.errors import BwskError
from bwsk.files import atomic_directory, read_json, sha256_file, write_json
from bwsk.reversible.t5.float16 import keep_projection_out_of_float16
from bwsk.study.checkpoint import Checkpoints, optimizer_state, random_states, restore_optimizer, restore_random_states
from bwsk.study.cpu_tuning import give_back_freed_memory, keep_freed_memory
from bwsk.study.device import autocast, check_precision, configure, device_name
from bwsk.study.model import (
    embedding_count,
    initial_model,
    load_weights,
    move,
    save_variant,
    split_block,
    weights,
)
from bwsk.study.non_finite import first_not_finite, should_abort
from bwsk.study.params import SPLITS, Params
from bwsk.study.perplexity import evaluation_starts, published_perplexity
from bwsk.study.progress import Bar, progress
from bwsk.study.provenance import identity, versions
from bwsk.study.repository import SETTINGS, WEIGHTS
from bwsk.study.schedule import Schedule
from bwsk.study.signals import Interrupted, StopSignal
from bwsk.study.tokens import blocks, load_tokens
from bwsk.study.train_inputs import TrainInputs
from bwsk.study.train_state import TrainState
from bwsk.study.train_step import check_backend, make_optimizer, make_step
from bwsk.units import MIB


class _Stopped(Exception):
    """Leaves a validation when a signal has asked the run to stop."""


class Run:
    """One training run. `run()` trains to the end; `finish()` tests the best model and writes the variant."""

    def __init__(
        self,
        params: Params,
        variant: str,
        inputs: TrainInputs,
        checkpoints: Path,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self.params, self.variant, self.inputs, self.device, self.say = params, variant, inputs, device, say
        self.init, self.mode = params.split_variant(variant)
        train = params.train
        check_precision("train.precision", train.precision, device)
        check_backend(train.backend, device)
        check_precision("evaluate.precision", params.evaluate.precision, device)
        configure(device, threads=train.threads, deterministic=train.deterministic, tf32=train.tf32)

        self.provenance = self._provenance()
        self.tokens = {split: load_tokens(inputs.tokens, split) for split in SPLITS}
        self.blocks = blocks(self.tokens["train"], params.tokens.block)
        self.schedule = Schedule(train, len(self.blocks))

        self.model = initial_model(self.init, inputs.base, params.seed)
        vocabulary = embedding_count(self.model)
        if (largest := max(int(self.tokens[split].max()) for split in SPLITS)) >= vocabulary:
            raise BwskError(f"{inputs.tokens}: found token {largest}, the model's vocabulary has {vocabulary}")
        move(self.model, device)
        self.model.train()
        if "fp16" in (train.precision, params.evaluate.precision):
            keep_projection_out_of_float16(self.model)
        self.reversible = None
        if self.mode == "bwsk-reversible":
            from bwsk.reversible.handle import make_reversible

            self.reversible = make_reversible(self.model, train.budget, batch=train.batch_size, **params.step)
        self.optimizer = make_optimizer(self.model, train, self._lr(0))
        self.scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")
        self.train_step = make_step(
            train.backend, self.model, self.optimizer, self.scaler, train.precision, train.max_grad_norm
        )
        self.meter = None
        if self.mode == "bwsk-analyzed":
            from bwsk.classification.erasure import ErasureMeter

            self.meter = ErasureMeter(self.model)

        self.state = TrainState()
        self.best: dict[str, Tensor] | None = None
        # Device scalars of the steps since the last point of the loss curve; fetched together in `_collect`.
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.stop = StopSignal(say)
        self.checkpoints = Checkpoints(checkpoints, self.provenance, warn=say)
        self.saved = self.checkpoints.folder  # the newest checkpoint, once there is one
        self._resume()

    def run(self) -> None:
        """Train until the last step or an early stop. Raises `Interrupted` after a signal, checkpoint written."""
        state, schedule = self.state, self.schedule
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # count training only, not loading or an earlier run
        with (
            self.stop.watched(),
            progress(schedule.total_steps, f"train {self.variant}", unit="step", start=state.step) as bar,
        ):
            clock = time.perf_counter()
            resumed_at, resumed_validated = state.step, state.validated_step
            while True:
                if schedule.logs(state.step) and self.losses:
                    clock = self._collect(clock)
                    bar.advance(
                        0,
                        loss=state.last_loss or math.inf,
                        **{"tokens/s": self._tokens_per_step / state.step_times_s[-1]},
                    )
                if schedule.validates(state.step) and state.validated_step != state.step:
                    clock = self._collect(clock, point=False)
                    with suppress(_Stopped):  # the checkpoint is then from before the validation
                        self._validate(bar)
                    clock = time.perf_counter()
                ended = state.step == schedule.total_steps or state.stopped_early
                if ended or schedule.checkpoints(state.step) or self.stop.number:
                    clock = self._collect(clock, point=ended)
                    if state.step != resumed_at or state.validated_step != resumed_validated:
                        self.saved = self._checkpoint()
                    clock = time.perf_counter()
                    if self.stop.number:
                        raise Interrupted(self.stop.number, self.saved, state.step)
                if ended:
                    return
                self._step()
                bar.advance()

    def finish(self, out: Path, curves: Path | None) -> dict[str, Any]:
        """Test the best model, write the variant's folder and its curves, and drop the checkpoints.

        Raises `Interrupted` after a signal; the checkpoint is that of the last step.
        """
        assert self.best is not None
        load_weights(self.model, self.best)
        with self.stop.watched(), progress(self._n_windows("test"), f"test {self.variant}", unit="window") as bar:

            def on_batch(count: int) -> None:
                bar.advance(count)
                if self.stop.number:
                    raise Interrupted(self.stop.number, self.saved, self.state.step)

            test = self._perplexity("test", on_batch)
        with atomic_directory(out) as folder:
            save_variant(self.model, self.inputs.tokenizer, folder)
            results = self._results(test, _hashes(folder))
            write_json(folder / "training_results.json", results)
        if curves is not None:
            with atomic_directory(curves) as folder:
                self.state.write_curves(folder)
        self.checkpoints.discard()
        return results

    def _step(self) -> None:
        state = self.state
        batch = split_block(self.blocks[self.schedule.batch(state.step, self.params.seed)], self.device)
        loss, norm = self.train_step(batch, self._lr(state.step))
        self.losses.append(loss)
        self.norms.append(norm)
        state.step += 1

    def _collect(self, clock: float, point: bool = True) -> float:
        """Fetch the losses of the steps since the last call; with `point`, close a point of the loss curve.

        Returns the new start of the step clock. Stops the run if the loss can no longer recover.
        """
        state = self.state
        if self.losses:
            losses = torch.stack(self.losses).tolist()
            norms = torch.stack(self.norms).tolist()
            now = time.perf_counter()
            state.note_steps(losses, now - clock)
            clock = now
            self._check_finite(losses, norms)
            self.losses, self.norms = [], []
            if self.device.type == "cpu":
                keep_freed_memory()
        if point:
            state.close_point()
        return clock

    def _validate(self, bar: Bar) -> None:
        state, started = self.state, time.perf_counter()
        self._note_peak()
        n_windows, seen = self._n_windows("validation"), 0

        def on_batch(count: int) -> None:
            nonlocal seen
            seen += count
            bar.advance(0, validation=f"{seen / n_windows:.0%}")
            if self.stop.number:
                raise _Stopped

        value = self._perplexity("validation", on_batch)
        bar.advance(0, validation="done", perplexity=value)
        if state.note_validation(value, self.params.train.patience):
            # On the host, because a second model on the device would count as training memory.
            self.best = {name: tensor.to("cpu", copy=True) for name, tensor in weights(self.model).items()}
        if self.meter is not None:
            batch = split_block(self.blocks[self.schedule.batch(state.step - 1, self.params.seed)], self.device)
            with autocast(self.device, self.params.train.precision):
                measured = self.meter.measure(batch)
            state.erasure_curve.append({"step": state.step, **measured})
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            give_back_freed_memory()
        state.validated_step = state.step
        state.validation_time_s += time.perf_counter() - started

    def _perplexity(self, split: str, on_batch: Callable[[int], None]) -> float:
        shape = self.params.tokens
        return published_perplexity(
            self.model,
            self.tokens[split],
            window=shape.window,
            stride=shape.stride,
            params=self.params.evaluate,
            on_batch=on_batch,
        )

    def _n_windows(self, split: str) -> int:
        shape = self.params.tokens
        starts, _ = evaluation_starts(
            len(self.tokens[split]), shape.window, shape.stride, self.params.evaluate.max_windows
        )
        return len(starts)

    def _checkpoint(self) -> Path:
        tensors = {
            "model": weights(self.model),
            "optimizer": optimizer_state(self.optimizer),
            "random": random_states(self.device),
        }
        if self.best is not None:
            tensors["best"] = self.best
        self._note_peak()
        state = {"run": asdict(self.state), "scaler": self.scaler.state_dict()}
        return self.checkpoints.save(self.state.step, tensors, state)

    def _resume(self) -> None:
        if (loaded := self.checkpoints.load(self.device)) is None:
            return
        tensors, state = loaded
        self.saved = self.checkpoints.folder / f"step-{state['run']['step']:08d}"
        try:
            load_weights(self.model, tensors["model"])
            restore_optimizer(self.optimizer, tensors["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            restore_random_states(tensors["random"], self.device)
            self.best = tensors.get("best")
            self.state = TrainState(**state["run"])
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BwskError(f"{self.saved}: is not a checkpoint of this model ({reason}); delete it") from None
        self.say(f"resuming after step {self.state.step} of {self.schedule.total_steps}")

    def _check_finite(self, losses: list[float], norms: list[float]) -> None:
        """Count non-finite losses and skipped steps; BwskError once no later step can be better (`non_finite`)."""
        state, scaled = self.state, self.scaler.is_enabled()
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=state.step - len(losses) + 1):
            what, in_a_row = state.count_not_finite(loss, norm, scaled)
            if what and should_abort(what == "loss", in_a_row, state.nan_count, self.schedule.total_steps, scaled):
                raise self._not_finite(step, what)

    def _not_finite(self, step: int, what: str) -> BwskError:
        """The error for a loss or gradient that is not finite at `step` (1-based), with the module where it began."""
        train, state = self.params.train, self.state
        run = self
        if any(not bool(tensor.isfinite().all()) for tensor in weights(self.model).values()):
            # Without a scaler the step has corrupted the weights: repeat the steps from the last checkpoint.
            move(self.model, "cpu")
            root = self.checkpoints.folder.parent
            run = Run(self.params, self.variant, self.inputs, root, self.device, say=lambda text: None)
            while run.state.step < step - 1:
                run._step()
        if run.reversible is not None:
            run.reversible.undo()  # stock modules compute the same numbers and can be hooked

        def loss_of_step() -> Tensor:
            batch = split_block(run.blocks[run.schedule.batch(step - 1, run.params.seed)], run.device)
            with autocast(run.device, train.precision):
                return run.scaler.scale(run.model(**batch, use_cache=False).loss)

        where = first_not_finite(run.model, loss_of_step) or "nowhere when the step was run again"
        advice = (
            "set train.precision to bf16 or fp32"
            if train.precision == "fp16"
            else f"set train.lr_{self.init} lower or train.warmup higher"
        )
        skipped = f", {state.skipped_steps} steps skipped so far" if self.scaler.is_enabled() else ""
        return BwskError(
            f"{self.variant}: the {what} is not finite at step {step} ({train.precision}{skipped}); "
            f"first in {where}; {advice}"
        )

    def _note_peak(self) -> None:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / MIB
            self.state.peak_memory_mib = max(peak, self.state.peak_memory_mib or 0.0)

    def _lr(self, step: int) -> float:
        train = self.params.train
        return (train.lr_finetune if self.init == "finetune" else train.lr_scratch) * self.schedule.lr_factor(step)

    @property
    def _tokens_per_step(self) -> int:
        return self.params.train.batch_size * self.params.tokens.block

    def _provenance(self) -> dict[str, Any]:
        base, shas = self.inputs.check(self.init)
        return {
            "identity": identity(self.params, "train", self.variant),
            "seed": self.params.seed,
            "precision": self.params.train.precision,
            "device": device_name(self.device),
            "versions": versions(),
            "tokens_sha256": shas,
            "base_sha256": base["sha256"] if self.init == "finetune" else None,
            "config_sha256": base["config_sha256"],
        }

    def _results(self, test: float, hashes: dict[str, Any]) -> dict[str, Any]:
        state, census = self.state, read_json(self.inputs.census)
        analyzed = self.mode == "bwsk-analyzed"
        return {
            "variant": self.variant,
            "init": self.init,
            "mode": self.mode,
            **state.figures(self._tokens_per_step),
            "test_metric": test,
            "epochs_completed": -(-state.step // self.schedule.steps_per_epoch),
            "planned_steps": self.schedule.total_steps,
            "predicted_peak_memory_mb": read_json(self.inputs.memory)["peak_mib"] if self.inputs.memory else None,
            "erasure_budget": census["k_ratio"] if analyzed else None,
            "parallelism_ratio": census["s_ratio"] if analyzed else None,
            "erasure_curve": state.erasure_curve if analyzed else None,
            "provenance": {**self.provenance, **hashes},
        }


def finished(out: Path, curves: Path | None, provenance: dict[str, Any]) -> dict[str, Any] | None:
    """The results of a variant in `out` if it is complete and of exactly this provenance, else None."""
    try:
        results = read_json(out / "training_results.json")
        same = results["provenance"] == {**provenance, **_hashes(out)}
    except (BwskError, OSError, KeyError, TypeError, ValueError):
        return None
    complete = curves is None or (curves / "validation.csv").is_file()
    return results if same and complete else None


def _hashes(folder: Path) -> dict[str, Any]:
    """sha256 of the weights of a variant, and of the files that say what to do with them."""
    return {
        "weights_sha256": sha256_file(folder / WEIGHTS),
        "files_sha256": {name: sha256_file(folder / name) for name in SETTINGS},
    }
