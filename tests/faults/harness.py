"""Kill a training at a given point, run the same command again, and compare every byte with an undisturbed run."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]
# Wall-clock figures: the only things in which two runs may differ.
TIMES = (
    *("wall_time_s", "training_time_s", "validation_time_s", "tokens_per_s", "seconds"),
    *("step_time_ms", "step_time_q1_ms", "step_time_q3_ms"),
)


class Server:
    """A fork server (`tests.faults.server`) for the package `bwsk` that lies in `root`."""

    def __init__(self, root: Path = PROJECT) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(root), str(PROJECT)]),
            "OMP_NUM_THREADS": "1",  # whatever the tests run with: threads do not outlive a fork
            "HF_HUB_OFFLINE": "1",
            "NO_COLOR": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=root,
        )
        assert self._answer()["ready"] == str(root / "bwsk")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()

    def run(
        self,
        argv: list[str],
        cwd: Path,
        output: Path,
        kill: dict[str, Any] | None = None,
        after: tuple[float, int] | None = None,
        limit: int | None = None,
        memory: int | None = None,
    ) -> dict[str, Any]:
        """Run a command; `status` is its exit status (negative: the signal that ended it).

        `kill` is the server's; `after`: (seconds, signal) sends a signal from outside; `limit` caps the size of
        files, `memory` what may be allocated, both in bytes.
        """
        request = {"argv": argv, "cwd": str(cwd), "output": str(output), "kill": kill, "limit": limit, "memory": memory}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        pid = self._answer()["pid"]
        timer = threading.Timer(after[0], _send, (pid, after[1])) if after else None
        if timer:
            timer.start()
        answer = self._answer()
        if timer:
            timer.cancel()
        return answer

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        assert line, "the fork server ended"
        return json.loads(line)


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


@dataclass
class Training:
    """The training of one variant of the study in `study`, with everything that it writes below `case`."""

    study: Path
    params: Path
    variant: str
    case: Path

    @property
    def argv(self) -> list[str]:
        build = self.study / "build"
        return [
            *("train", self.variant, "--params", str(self.params), "--gpus", "0"),
            *("--tokens", str(build / "tokens"), "--tokenizer", str(build / "tokenizer")),
            *("--base", str(build / "base"), "--census", str(build / "analysis" / "census.json")),
            *("--checkpoints", str(self.case / "checkpoints"), "--curves", str(self.case / "curves")),
            *("--out", str(self.case / "out")),
        ]

    @property
    def log(self) -> Path:
        return self.case / "log"

    def run(self, server: Server, **how: Any) -> dict[str, Any]:
        self.case.mkdir(parents=True, exist_ok=True)
        return server.run(self.argv, self.case, self.log, **how)

    def files(self) -> dict[str, str]:
        """Hash of every finished file, the wall-clock figures left out of training_results.json."""
        found = {}
        for root in ("out", "curves"):
            for path in sorted((self.case / root).rglob("*")):
                name = str(path.relative_to(self.case))
                if path.is_file() and ".partial-" not in name:
                    found[name] = digest(path)
        return found


def digest(path: Path) -> str:
    content = path.read_bytes()
    if path.name == "training_results.json":
        content = json.dumps(_without_times(json.loads(content)), sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(part) for key, part in value.items() if key not in TIMES}
    return [_without_times(part) for part in value] if isinstance(value, list) else value


def finish_and_compare(server: Server, training: Training, reference: dict[str, str]) -> None:
    """Run the interrupted command again, as it was; what comes out is the undisturbed run to the byte."""
    for name, found in training.files().items():
        assert found == reference.get(name), f"{name} looked finished after the kill and was not"
    before = training.log.read_text() if training.log.exists() else ""
    ended = training.run(server)
    said = training.log.read_text()[len(before) :]
    assert ended["status"] == 0, said
    assert "damaged" not in said, said
    assert training.files() == reference
    left = [path for path in training.case.rglob("*") if ".partial-" in path.name]
    assert not left, left
    assert not list((training.case / "checkpoints").rglob("step-*"))


def killed_then_same(server: Server, training: Training, reference: dict[str, str], **how: Any) -> dict[str, Any]:
    """Start, kill (see `Server.run`), finish, compare; what the killed process told."""
    told = training.run(server, **how)
    finish_and_compare(server, training, reference)
    return told


def kind_of_place(place: str) -> str:
    """Where a kill hit, in the words of the docs, from the functions that ran."""
    running = place.split(">")
    for name, kind in (
        ("_checkpoint", "checkpoint write"),
        ("_validate", "validation"),
        ("_step", "step"),
        ("_perplexity", "final test"),
        ("finish", "output write"),
        ("run", "between"),
    ):
        if name in running:
            return kind
    return "start"


SIGKILL = -int(signal.SIGKILL)
