"""The progress helper: plain lines in a log, a bar on a terminal."""

from __future__ import annotations

import io
import itertools
import os
import pty
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

from bwsk.study import progress as module
from bwsk.study.progress import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A millisecond from one look at the clock to the next."""
    ticks = itertools.count()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 1000))


def test_log_lines_name_the_step_the_share_the_fields_and_the_end(clock: None) -> None:
    log = io.StringIO()
    with progress(4, "train demo", file=log) as bar:
        bar.advance(1, loss=3.25)
        bar.advance(3)
    lines = log.getvalue().splitlines()
    assert lines[0].startswith("train demo: 1/4 step (25%), loss 3.25, ")
    assert lines[1].startswith("train demo: 4/4 step (100%), loss 3.25, ")
    assert lines[2] == "train demo: done in 0:00"
    assert len(lines) == 3


def test_log_is_quiet_between_intervals(clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    with progress(1000, "long", file=log) as bar:
        for _ in range(1000):
            bar.advance()
    assert len(log.getvalue().splitlines()) == 3  # first, last, done
    monkeypatch.setattr(module, "INTERVAL", 0.0)
    log = io.StringIO()
    with progress(10, "long", file=log) as bar:
        for _ in range(10):
            bar.advance()
    assert len(log.getvalue().splitlines()) == 11


def test_a_resumed_step_starts_at_what_was_done_and_does_not_count_it_as_speed() -> None:
    log = io.StringIO()
    with progress(10, "resumed", start=8, file=log) as bar:
        assert bar.rate is None
        bar.advance(2)
        assert bar.done == 10
    assert "10/10 step (100%)" in log.getvalue()


def test_an_exception_leaves_the_last_count_and_no_done() -> None:
    log = io.StringIO()

    def fail() -> None:
        with progress(10, "broken", file=log) as bar:
            bar.advance(1)
            bar.advance(2)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert "3/10" in log.getvalue()
    assert "done in" not in log.getvalue()


def test_unknown_total_and_events() -> None:
    log = io.StringIO()
    with progress(None, "stream", unit="row", file=log) as bar:
        bar.advance(12345, note="[red]x")
        bar.say("saved [bold]a.json")
    lines = log.getvalue().splitlines()
    assert lines[0].startswith("stream: 12,345 row, note [red]x, ")
    assert lines[1] == "stream: saved [bold]a.json"
    assert "ETA" not in lines[0]


def on_a_terminal(script: str, columns: int) -> str:
    """Everything that a script writes to standard error when that is a terminal of this width."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns)}
    environment.pop("FORCE_COLOR", None)
    process = subprocess.Popen([sys.executable, "-c", script], stderr=slave, stdout=subprocess.PIPE, env=environment)
    os.close(slave)
    seen = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:
            break
        if not chunk:
            break
        seen += chunk
    os.close(master)
    assert process.stdout is not None
    assert process.stdout.read() == b""
    process.stdout.close()
    assert process.wait() == 0
    return seen.decode()


def test_a_terminal_gets_a_bar_with_description_count_and_fields() -> None:
    script = textwrap.dedent(
        """
        from bwsk.study.progress import progress
        with progress(3, "train [demo]", unit="step") as bar:
            for _ in range(3):
                bar.advance(1, loss=1.5, tokens="9/s")
            bar.say("saved [x]")
        """
    )
    text = on_a_terminal(script, 140)
    for part in ("train [demo]", "3/3", "loss 1.5", "tokens 9/s", "saved [x]"):
        assert part in text
    assert "\x1b[" in text  # redrawn in place


def test_a_narrow_terminal_cuts_the_details_and_keeps_bar_count_and_time() -> None:
    script = (
        "from bwsk.study.progress import progress\n"
        "with progress(1026, 'train finetune-bwsk-reversible') as bar:\n"
        "    bar.advance(500, loss=4.957, validation='done', perplexity=94.77)\n"
    )
    lines = on_a_terminal(script, 80).splitlines()
    drawn = next(line for line in reversed(lines) if "500/1026" in line)
    assert "━" in drawn
    assert "-:--:--" in drawn  # one update is no rate yet
    assert "loss 4.957" in drawn
    assert "…" in drawn
    assert "perplexity" not in drawn


def test_the_same_script_in_a_pipe_writes_no_escape_sequences() -> None:
    script = "from bwsk.study.progress import progress\nwith progress(2, 'a') as bar:\n    bar.advance(2)\n"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    assert "a: 2/2 step (100%)" in result.stderr
    assert "\x1b" not in result.stderr
