"""The timetable of a run: the published one to the step, and its edge cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bwsk.study.params import TrainParams
from bwsk.study.schedule import Schedule


def test_the_published_run_has_its_number_of_steps_and_validations() -> None:
    schedule = Schedule(TrainParams(), n_blocks=5543)
    assert schedule.steps_per_epoch == 1386
    assert schedule.total_steps == 13_860
    validations = [step for step in range(schedule.total_steps + 1) if schedule.validates(step)]
    # "35-37 validations": 27 by steps, 10 by epochs, of which none coincide.
    assert len(validations) == 37
    assert validations[:4] == [500, 1000, 1386, 1500]


@pytest.mark.parametrize(("warmup", "steps"), [(0.1, 100), (0.0, 7), (0.5, 1), (0.99, 10)])
def test_learning_rate_is_torchs_linear_warmup_then_cosine(warmup: float, steps: int) -> None:
    schedule = Schedule(TrainParams(warmup=warmup, max_steps=steps, batch_size=1, epochs=1), n_blocks=steps)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    rising = int(warmup * steps)
    parts = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - rising)]
    if rising:
        parts.insert(0, torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=rising))
    reference = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[rising] if rising else [])
    for step in range(steps):
        assert schedule.lr_factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        reference.step()


def test_an_epoch_is_a_permutation_and_epochs_differ() -> None:
    schedule = Schedule(TrainParams(batch_size=4, epochs=2), n_blocks=10)
    batches = [schedule.batch(step, seed=7) for step in range(schedule.total_steps)]
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    first, second = np.concatenate(batches[:3]), np.concatenate(batches[3:])
    assert sorted(first) == sorted(second) == list(range(10))
    assert not np.array_equal(first, second)


def test_order_depends_on_the_seed_alone_not_on_what_was_asked_before() -> None:
    schedule = Schedule(TrainParams(batch_size=4, epochs=3), n_blocks=100)
    late = schedule.batch(60, seed=1)
    schedule.batch(0, seed=2)
    assert np.array_equal(schedule.batch(60, seed=1), late)
    assert not np.array_equal(schedule.batch(60, seed=2), late)


def test_max_steps_caps_and_the_last_step_validates_and_logs() -> None:
    schedule = Schedule(TrainParams(max_steps=7, eval_every=5, log_every=5), n_blocks=1000)
    assert schedule.total_steps == 7
    assert [step for step in range(8) if schedule.validates(step)] == [5, 7]
    assert [step for step in range(8) if schedule.logs(step)] == [5, 7]
