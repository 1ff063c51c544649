"""The state of a training run: its counters and curves."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class TrainState:
    """Counters and curves of a run, as strict JSON; together with a checkpoint's tensors it determines the run."""

    step: int = 0
    validated_step: int = 0
    stopped_early: bool = False
    stale_validations: int = 0
    best_step: int | None = None
    best_perplexity: float | None = None
    pending_losses: list[float] = field(default_factory=list)
    last_loss: float | None = None
    train_loss_steps: list[int] = field(default_factory=list)
    train_loss_curve: list[float] = field(default_factory=list)
    val_steps: list[int] = field(default_factory=list)
    val_perplexity_curve: list[float] = field(default_factory=list)
    erasure_curve: list[dict[str, Any]] = field(default_factory=list)
    nan_count: int = 0  # steps whose loss was not finite
    skipped_steps: int = 0  # steps that the gradient scaler skipped
    nan_in_a_row: int = 0
    skipped_in_a_row: int = 0
    step_times_s: list[float] = field(default_factory=list)
    training_time_s: float = 0.0
    validation_time_s: float = 0.0
    peak_memory_mib: float | None = None

    def note_steps(self, losses: list[float], seconds: float) -> None:
        """The losses of the latest steps, and the time that they took together."""
        self.training_time_s += seconds
        self.step_times_s.append(seconds / len(losses))
        finite = [loss for loss in losses if math.isfinite(loss)]  # the others are counted, and have no JSON
        self.pending_losses += finite
        self.last_loss = finite[-1] if finite else self.last_loss

    def close_point(self) -> None:
        """Add a point to the loss curve: the mean of the losses since the last one, at the current step."""
        if self.pending_losses:
            self.train_loss_steps.append(self.step)
            self.train_loss_curve.append(statistics.fmean(self.pending_losses))
            self.pending_losses = []

    def note_validation(self, perplexity: float, patience: int) -> bool:
        """Add a point to the validation curve; True if it is the best so far. `patience` worse ones stop the run."""
        self.val_steps.append(self.step)
        self.val_perplexity_curve.append(perplexity)
        if self.best_perplexity is None or perplexity < self.best_perplexity:
            self.best_step, self.best_perplexity, self.stale_validations = self.step, perplexity, 0
            return True
        self.stale_validations += 1
        self.stopped_early = self.stale_validations >= patience
        return False

    def count_not_finite(self, loss: float, norm: float, scaled: bool) -> tuple[str | None, int]:
        """Count what is not finite in one step: "loss", "gradient" or None, and how many such steps in a row.

        `norm`: of the gradients; with a gradient scaler (`scaled`) a step whose norm is not finite was skipped.
        """
        forward, skipped = not math.isfinite(loss), not math.isfinite(norm)
        self.nan_count += forward
        self.nan_in_a_row = self.nan_in_a_row + 1 if forward else 0
        self.skipped_steps += scaled and skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if forward:
            return "loss", self.nan_in_a_row
        return ("gradient" if skipped else None), self.skipped_in_a_row

    def figures(self, tokens_per_step: int) -> dict[str, Any]:
        """The training figures of a variant's results, under the published names."""
        times = self.step_times_s  # a single point has no spread
        low, step_time_s, high = statistics.quantiles(times, method="inclusive") if times[1:] else times * 3
        return {
            "final_train_loss": self.last_loss,
            "best_val_metric": self.best_perplexity,
            "total_steps": self.step,
            "best_step": self.best_step,
            "early_stopped": self.stopped_early,
            "wall_time_s": self.training_time_s + self.validation_time_s,
            "training_time_s": self.training_time_s,
            "validation_time_s": self.validation_time_s,
            "step_time_ms": 1000.0 * step_time_s,
            "step_time_q1_ms": 1000.0 * low,
            "step_time_q3_ms": 1000.0 * high,
            "tokens_per_s": tokens_per_step / step_time_s,
            "peak_memory_mb": self.peak_memory_mib,
            "nan_count": self.nan_count,
            "skipped_steps": self.skipped_steps,
            "val_steps": self.val_steps,
            "val_perplexity_curve": self.val_perplexity_curve,
            "train_loss_steps": self.train_loss_steps,
            "train_loss_curve": self.train_loss_curve,
        }

    def write_curves(self, folder: Path) -> None:
        """train.csv (step, loss) and validation.csv (step, perplexity), with all digits."""
        _write_csv(folder / "train.csv", "loss", self.train_loss_steps, self.train_loss_curve)
        _write_csv(folder / "validation.csv", "perplexity", self.val_steps, self.val_perplexity_curve)


def _write_csv(path: Path, name: str, steps: list[int], values: list[float]) -> None:
    rows = [f"{step},{value!r}" for step, value in zip(steps, values, strict=True)]
    path.write_text("\n".join([f"step,{name}", *rows]) + "\n")
