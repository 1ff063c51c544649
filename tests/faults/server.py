"""A process that has imported torch and runs `bwsk` commands in forks of itself, which are then killed.

    python -m tests.faults.server < requests > answers

A request is a line of JSON: `argv`, `cwd`, `output` (file for both streams), and for a child that is to kill itself
`kill`: {"events": "calls" | "files", "at": n}. Each fork is a process of its own that runs the real command line; with
`kill` it sends SIGKILL to itself at the n-th call of a function of bwsk, or at the n-th operation on files: points
that can be drawn at random and hit again. Neither lies inside of a file's write, so {"events": "outputs", "at": n,
"inside": bytes} makes the kernel end the process (SIGXFSZ) in the first write that goes past that many bytes of a file,
from the n-th time that the training enters or leaves the writing of a folder of outputs.

Answers: {"pid"}, then {"status", "count", "place"}.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import bwsk

PACKAGE = str(Path(bwsk.__file__).parent)
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree"}


def preload() -> None:
    """Import what the commands would import, once for all of them."""
    import transformers.models.auto.modeling_auto
    import transformers.models.t5.modeling_t5
    import transformers.models.t5.tokenization_t5  # noqa: F401

    import bwsk.classification.erasure
    import bwsk.cli
    import bwsk.reversible.t5.engine
    import bwsk.study.evaluate
    import bwsk.study.non_finite
    import bwsk.study.train  # noqa: F401
    from bwsk.study.provenance import STEPS, source_digest

    for step in STEPS:  # reading the source is most of a tiny run's calls, and nothing that a kill could spoil
        source_digest(step)


def serve() -> None:
    preload()
    print(json.dumps({"ready": PACKAGE}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            child(request, write)
        os.close(write)
        print(json.dumps({"pid": pid}), flush=True)
        with os.fdopen(read) as pipe:
            told = json.loads(pipe.read() or "{}")
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), **told}), flush=True)


def child(request: dict[str, Any], report: int) -> None:
    """Run one command as its own process would; never returns."""
    status = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        out = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["cwd"])
        sys.argv = ["bwsk", *request["argv"]]
        if limit := request.get("limit"):
            # What is larger cannot be written, as on a full disk; Python itself ignores the signal that goes with it.
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if memory := request.get("memory"):
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))
        counter = Counter(report, **request["kill"]) if request.get("kill") else None
        from bwsk.cli import main

        if counter:
            counter.install()
        try:
            main()
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what comes now would find no bwsk any more
        if counter:
            counter.tell("end")
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Counter:
    """Counts events and kills the process at the `at`-th (never, if 0)."""

    def __init__(self, report: int, events: str, at: int, inside: int = 0) -> None:
        self.report, self.events, self.at, self.inside = report, events, at, inside
        self.count = 0

    def install(self) -> None:
        if self.events == "calls":
            sys.setprofile(self.on_call)
        elif self.events == "outputs":
            sys.setprofile(self.on_output)
        else:
            sys.addaudithook(self.on_audit)

    def on_call(self, frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "return") and frame.f_code.co_filename.startswith(PACKAGE):
            self.next()

    def on_output(self, frame: FrameType, event: str, argument: Any) -> None:
        if (
            event == "call"
            and frame.f_code.co_name == "atomic_directory"
            and place().endswith("finish>atomic_directory")
        ):
            self.next()

    def on_audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and not (event == "open" and arguments[1] in ("r", "rb", None)):
            self.next()

    def next(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.tell(place())
            if self.inside:
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.inside, self.inside))
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python itself ignores it
                return
            os.kill(os.getpid(), signal.SIGKILL)

    def tell(self, where: str) -> None:
        os.write(self.report, json.dumps({"count": self.count, "place": where}).encode())


def place() -> str:
    """The functions of bwsk that are running, innermost last."""
    names, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    return ">".join(reversed(names))


if __name__ == "__main__":
    serve()
