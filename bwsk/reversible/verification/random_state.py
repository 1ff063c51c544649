"""The states of all random generators that a model may draw from: torch's on CPU and GPUs, numpy's, Python's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


class RandomState:
    """The states at the time it is made. GPUs are left alone as long as nobody uses them."""

    def __init__(self) -> None:
        self.cpu, self.numpy, self.python = torch.get_rng_state(), np.random.get_state(), random.getstate()
        self.gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        """Set all generators to these states."""
        torch.set_rng_state(self.cpu)
        np.random.set_state(self.numpy)
        random.setstate(self.python)
        if self.gpus:
            torch.cuda.set_rng_state_all(self.gpus)


def seed_all(seed: int) -> None:
    """Start all generators anew."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs that are used later on
    np.random.seed(seed % 2**32)
    random.seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """A context after which the random state is the one before it."""
    state = RandomState()
    try:
        yield
    finally:
        state.restore()
