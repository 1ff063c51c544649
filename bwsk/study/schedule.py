"""The schedule of a training run: learning rate, epochs, validations, checkpoints. Pure functions of the step.

A step t (0-based) of T has the learning rate lr * f(t), with W = floor(warmup * T) warm-up steps:

    f(t) = start + (1 - start) t / W                  for t < W      (linear, from `warmup_start`)
    f(t) = (1 + cos(pi (t - W) / (T - W))) / 2        for t >= W     (cosine, to 0 at T)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bwsk.study.params import TrainParams


@dataclass(frozen=True)
class Schedule:
    """The timetable of a run over `n_blocks` training blocks. "After step s" means s optimizer steps are done."""

    params: TrainParams
    n_blocks: int

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch; the last, smaller one counts."""
        return math.ceil(self.n_blocks / self.params.batch_size)

    @property
    def total_steps(self) -> int:
        """Steps of a run that is not stopped early."""
        steps = self.params.epochs * self.steps_per_epoch
        return steps if self.params.max_steps is None else min(steps, self.params.max_steps)

    def lr_factor(self, step: int) -> float:
        """Share of the full learning rate that step number `step` (0-based) uses."""
        warmup = int(self.params.warmup * self.total_steps)
        if step < warmup:
            return self.params.warmup_start + (1.0 - self.params.warmup_start) * step / warmup
        return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (self.total_steps - warmup)))

    def validates(self, step: int) -> bool:
        """Whether there is a validation after `step`: every `eval_every` steps, at each epoch's end, at the end."""
        due = step % self.params.eval_every == 0 or step % self.steps_per_epoch == 0 or step == self.total_steps
        return step > 0 and due

    def checkpoints(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`."""
        return step > 0 and step % self.params.checkpoint_every == 0

    def logs(self, step: int) -> bool:
        """Whether the loss curve gets a point after `step`."""
        return step > 0 and (step % self.params.log_every == 0 or step == self.total_steps)

    def batch(self, step: int, seed: int) -> np.ndarray:
        """Indices of the training blocks of step number `step`: a fresh shuffle each epoch, from seed and epoch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = self._order(seed, epoch)
        return order[position * self.params.batch_size : (position + 1) * self.params.batch_size]

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        if (cached := _ORDERS.get(key := (self.n_blocks, seed, epoch))) is None:
            _ORDERS.clear()  # one epoch at a time
            cached = _ORDERS[key] = np.random.default_rng([seed, epoch]).permutation(self.n_blocks)
        return cached


_ORDERS: dict[tuple[int, int, int], np.ndarray] = {}
