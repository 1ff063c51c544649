"""Signals that ask a training run to stop: SIGTERM from a cluster, SIGINT from a keyboard."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class Interrupted(Exception):
    """A signal asked the run to stop; a checkpoint has been written. `signum` is the signal."""

    def __init__(self, signum: int, checkpoint: Path, step: int) -> None:
        self.signum = signum
        super().__init__(f"{signal.Signals(signum).name}: stopped after step {step}, resumes from {checkpoint}")


class StopSignal:
    """Remembers the first signal, so that the run stops where it can write a checkpoint; a second one stops at once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.number: int | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Handle the signals while the block runs, and restore their handlers afterwards."""
        previous = {number: signal.signal(number, self._came) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _came(self, signum: int, frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = signum
        self.say(f"{signal.Signals(signum).name}: writing a checkpoint, then stopping (again to stop at once)")
