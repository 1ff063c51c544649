"""Progress of long steps: a bar with ETA on a terminal, plain lines of text in a log.

    with progress(total, "train finetune-conventional", unit="step") as bar:
        bar.advance(1)
        bar.advance(1, loss=3.21)        # fields are shown until they are replaced

Everything goes to standard error. Fields are plain numbers or texts that the caller already has. No tensor is read, so
showing progress never waits for a device.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

Field = int | float | str

# Seconds between two lines of a log; the first and the last line always appear.
INTERVAL = 5.0


class Bar:
    """A count towards `total` (None if unknown); get one from `progress`. This one prints plain lines."""

    def __init__(self, total: int | None, description: str, unit: str, start: int, file: TextIO) -> None:
        self.total, self.description, self.unit, self.done = total, description, unit, start
        self.fields: dict[str, Field] = {}
        self._start, self._file = start, file
        self._began = time.monotonic()
        self._printed_at = self._began
        self._printed_done: int | None = None

    def advance(self, count: int = 1, **fields: Field) -> None:
        """Count `count` more units; `fields` (loss=…) replace the earlier ones of the same name."""
        self.done += count
        self.fields.update(fields)
        self._show()

    def say(self, text: str) -> None:
        """Print a separate line, above the bar, for events like a saved checkpoint."""
        print(f"{self.description}: {text}", file=self._file, flush=True)

    @property
    def rate(self) -> float | None:
        """Units per second since the beginning (not counting what `start` skipped); None before the first."""
        elapsed = time.monotonic() - self._began
        counted = self.done - self._start
        return counted / elapsed if counted and elapsed > 0 else None

    def _show(self) -> None:
        now = time.monotonic()
        if self._printed_done is None or now - self._printed_at >= INTERVAL:
            self._print(now)

    def _print(self, now: float) -> None:
        self._printed_at, self._printed_done = now, self.done
        count = f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"
        share = f" ({self.done / self.total:.0%})" if self.total else ""
        parts = [f"{count} {self.unit}{share}", *_shown(self.fields), *self._pace()]
        print(f"{self.description}: {', '.join(parts)}", file=self._file, flush=True)

    def _pace(self) -> list[str]:
        rate = self.rate
        if rate is None:
            return []
        pace = [f"{rate:,.3g} {self.unit}/s" if rate < 1000 else f"{rate:,.0f} {self.unit}/s"]
        if self.total is not None and self.done < self.total:
            pace.append(f"ETA {_duration((self.total - self.done) / rate)}")
        return pace

    def _close(self, finished: bool) -> None:
        # The last line shows where the step ended, also after an exception.
        if self._printed_done != self.done:
            self._print(time.monotonic())
        if finished:
            print(
                f"{self.description}: done in {_duration(time.monotonic() - self._began)}", file=self._file, flush=True
            )


class _TerminalBar(Bar):
    """The same count, drawn by rich."""

    def __init__(self, total: int | None, description: str, unit: str, start: int, file: TextIO) -> None:
        super().__init__(total, description, unit, start, file)
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            RenderableColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.table import Column
        from rich.text import Text

        console = Console(file=file)
        # In a narrow window only the details are cut. No column wraps, because a bar of two lines is redrawn as
        # garbage.
        self._details = Text("", no_wrap=True, overflow="ellipsis")
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24 if console.width >= 120 else 10, table_column=Column(no_wrap=True)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            RenderableColumn(self._details),
            console=console,
        )
        self._task = self._progress.add_task(escape(description), total=total, completed=start)
        self._progress.start()

    def say(self, text: str) -> None:
        self._progress.console.print(f"{self.description}: {text}", markup=False, highlight=False)

    def _show(self) -> None:
        # rich redraws from a thread of its own, ten times a second: updating the numbers is cheap.
        pace = self._pace()[:1]
        self._details.plain = "  ".join([*_shown(self.fields), *pace])
        self._progress.update(self._task, completed=self.done)

    def _close(self, finished: bool) -> None:
        self._progress.stop()


@contextmanager
def progress(
    total: int | None, description: str, unit: str = "step", start: int = 0, file: TextIO | None = None
) -> Iterator[Bar]:
    """A bar on a terminal, lines every few seconds elsewhere.

    `total` and `start` count `unit`s; `start` is what an earlier, interrupted run has already done. `file` is standard
    error unless given.
    """
    file = sys.stderr if file is None else file
    kind = _TerminalBar if _is_terminal(file) else Bar
    bar = kind(total, description, unit, start, file)
    finished = False
    try:
        yield bar
        finished = True
    finally:
        bar._close(finished)


def _is_terminal(file: TextIO) -> bool:
    try:
        from rich.console import Console
    except ImportError:  # a bare GPU machine, where plain lines suffice
        return False
    console = Console(file=file)
    return console.is_terminal and not console.is_dumb_terminal


def _shown(fields: dict[str, Field]) -> list[str]:
    return [f"{name} {_number(value)}" for name, value in fields.items()]


def _number(value: Field) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, second = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{second:02}" if hours else f"{minutes}:{second:02}"
