"""Ours beside what a user would otherwise run, in one go: `python bench/run.py OUT` (or `make bench`), CPU or GPU.

Every rival runs in a process of its own (`bench/worker.py`) beside one of the plain loop; the two take turns, a burst
of steps each, in the order A B, B A, A B, …, so that whatever else the machine does falls on both. Printed and written
to OUT/step-DEVICE.json, medians over the bursts: time per step and its ratio to the plain loop's neighbouring burst,
tokens/s, share of the time that the GPU was busy, peak memory on the device, evaluation windows/s in turns as well
(ours in batches of 32, the others by the publication's loop, a window at a time), and the time of the whole study that
follows from these. Not measured is null.

The JSON is written after each pair. With --seconds all ends by then: no pair is started that would last longer than
what is left, and one that hangs is ended. With --resume what the JSON holds is kept and not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bwsk.errors import BwskError
from bwsk.files import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
Answer = TypeVar("Answer")

# The published study: six runs of 13,860 steps; a validation every 500 steps and at each epoch's end (37), one test.
# Windows of WikiText-2 (raw) at stride 128: validation 2,289, test 2,641 (tests/real/test_tokens_real.py).
RUNS, STEPS = 6, 13_860
WINDOWS = 37 * 2_289 + 2_641

# What matters most comes first, in every precision: the time on a GPU may end before the list does.
EAGER_RIVALS = ["ours-conventional-eager", "ours-reversible-eager", "trainer", "trainer-ckpt", "plain-ckpt"]
RIVALS = {
    "cpu": [*EAGER_RIVALS, "ours-conventional-compile", "trainer-compile"],
    "cuda": [
        "ours-conventional-graph",
        "ours-reversible-graph",
        "trainer-compile",
        *EAGER_RIVALS,
        "ours-conventional-compile",
    ],
}
EVALUATIONS = 3  # turns
BUSY_STEPS = 5  # a profile has thousands of kernels a step


class Worker:
    """A rival's process. `ask` sends a command and waits for its answer, at most until `deadline` on the clock
    `time.monotonic`."""

    def __init__(self, rival: str, precision: str, options: list[str], deadline: float | None = None) -> None:
        self.rival, self.deadline = rival, deadline
        command = [sys.executable, str(ROOT / "bench" / "worker.py"), rival, "--precision", precision, *options]
        # Not a pipe: nobody reads it meanwhile, and a library that fills it would stop.
        self.messages = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.messages, text=True
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        """The answer to a command; RuntimeError with the process's last line if it has ended, or is ended here."""
        timer = None
        if self.deadline is not None:
            timer = threading.Timer(max(0.0, self.deadline - time.monotonic()), self.process.kill)
            timer.start()
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            if timer is not None:
                timer.cancel()
        if not line:
            raise RuntimeError(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=30)
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "no time left"
        self.messages.seek(0)
        last = (self.messages.read().strip().splitlines() or ["no message"])[-1]
        return last.removeprefix("bwsk.errors.BwskError: ")

    def close(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError):  # it has ended already
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.stdout.close()
        self.messages.close()


def _in_turns(pair: list[Worker], rounds: int, **command: Any) -> dict[str, list[dict[str, float]]]:
    """Each rival's answers to the command, given A B, B A, A B, …"""
    answers: dict[str, list[dict[str, float]]] = {worker.rival: [] for worker in pair}
    for index in range(rounds):
        for worker in pair if index % 2 == 0 else reversed(pair):
            answers[worker.rival].append(worker.ask(**command))
    return answers


def _ratio(answers: dict[str, list[dict[str, float]]], rival: str, key: str) -> float:
    """The rival's figure over the plain loop's, the median of neighbouring answers."""
    return statistics.median(
        mine[key] / theirs[key] for mine, theirs in zip(answers[rival], answers["plain"], strict=True)
    )


def _or_none(ask: Callable[..., Answer], *args: Any, **kwargs: Any) -> Answer | None:
    """What `ask` returns, or None and a line on standard error: what follows the steps must not cost their times."""
    try:
        return ask(*args, **kwargs)
    except RuntimeError as error:
        print(f"not measured: {error}", file=sys.stderr, flush=True)
        return None


def compare(
    rival: str, precision: str, args: argparse.Namespace, options: list[str], deadline: float | None = None
) -> list[dict[str, Any]]:
    """Rows of the plain loop and of one rival, measured in turns."""
    pair = [Worker(name, precision, options, deadline) for name in ("plain", rival)]
    try:
        for worker in pair if args.warm else ():
            worker.ask(do="steps", count=args.warm)
        bursts = _in_turns(pair, args.rounds, do="steps", count=args.steps)
        ratios = {key: _ratio(bursts, rival, key) for key in ("ms", "cpu_ms")}
        # Before the evaluation, whose batches need memory of their own.
        peaks = {worker.rival: worker.ask(do="memory")["peak_mib"] for worker in pair}
        evaluations = None
        if args.windows:
            evaluations = _or_none(_in_turns, pair, EVALUATIONS, do="evaluate", windows=args.windows)
        rows = []
        for worker in pair:
            found = bursts[worker.rival]
            ms = statistics.median(burst["ms"] for burst in found)
            own = worker.rival == rival
            speed = evaluations and statistics.median(one["windows_per_s"] for one in evaluations[worker.rival])
            faster = _ratio(evaluations, rival, "windows_per_s") if evaluations and own else evaluations and 1.0
            busy = _or_none(worker.ask, do="busy", count=BUSY_STEPS) if args.device == "cuda" else None
            profile = _or_none(worker.ask, do="profile", count=2) if args.profile else None
            rows.append(
                {
                    "rival": worker.rival,
                    "beside": rival,
                    "precision": precision,
                    "step_ms": round(ms, 3),
                    "ratio_to_plain": round(ratios["ms"], 4) if own else 1.0,
                    "cpu_ratio_to_plain": round(ratios["cpu_ms"], 4) if own else 1.0,
                    "tokens_per_s": round(args.batch * (args.input + args.target) / ms * 1e3, 1),
                    "bursts_ms": [round(burst["ms"], 3) for burst in found],
                    "gpu_busy": busy and busy["busy"],
                    "profile": profile,
                    "peak_mib": peaks[worker.rival],
                    "windows_per_s": None if speed is None else round(speed, 3),
                    "windows_ratio_to_plain": None if faster is None else round(faster, 4),
                    "projected_study_s": None if speed is None else round(projected(ms, speed, args)),
                }
            )
        return rows
    finally:
        for worker in pair:
            worker.close()


def projected(ms: float, windows_per_s: float, args: argparse.Namespace) -> float | None:
    """Seconds of the six published runs at these speeds, without start-up: a projection, not a measurement."""
    return RUNS * (STEPS * ms / 1e3 + WINDOWS / windows_per_s)


def machine(device: str) -> dict[str, Any]:
    """What the numbers belong to."""
    import torch
    import transformers

    model = None
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": model or platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": platform.system(),
    }


def sources() -> str:
    """sha256 over the source files of the package and of the benches."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "bwsk").rglob("*.py"), *(ROOT / "bench").glob("*.py")]):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def kept(path: Path, belongs_to: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call wrote to `path` if it was of the same machine, settings and sources, else nothing."""
    try:
        found = read_json(path)
    except BwskError:
        return {}
    return found if all(found.get(key) == value for key, value in belongs_to.items()) else {}


def load_average() -> list[float] | None:
    """Processes that wanted a core in the last 1, 5 and 15 minutes: how quiet the machine was."""
    path = Path("/proc/loadavg")
    return [float(value) for value in path.read_text().split()[:3]] if path.is_file() else None


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    heads = ("ms/step", "x plain", "CPU x plain", "tokens/s", "busy", "peak MiB", "windows/s", "x plain", "study, min")
    print(f"{'':28} {'':5}" + "".join(f"{head:>12}" for head in heads))
    for row in rows:
        study = row["projected_study_s"]
        values = (
            cell(row["step_ms"], "12.1f"),
            cell(row["ratio_to_plain"], "12.3f"),
            cell(row["cpu_ratio_to_plain"], "12.3f"),
            cell(row["tokens_per_s"], "12.0f"),
            f"{cell(row['gpu_busy'], '.0%'):>12}",
            f"{cell(row['peak_mib'], ',.0f'):>12}",
            f"{cell(row['windows_per_s'], '.2f'):>12}",
            f"{cell(row['windows_ratio_to_plain'], '.2f'):>12}",
            f"{cell(None if study is None else study / 60, ',.0f'):>12}",
        )
        print(f"{row['rival']:28} {row['precision']:5}" + "".join(values), flush=True)


def main() -> None:
    """Parse arguments, measure pair by pair, print, write."""
    import torch

    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory for the JSON")
    parser.add_argument(
        "--rivals", nargs="+", help="default: all that the device can run; compiled ones with --compile"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--model", help="config.json, directory or Hub id of a T5 (default: T5-small's shape)")
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="eager")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--input", type=int, default=256)
    parser.add_argument("--target", type=int, default=256)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10 if cuda else 5, help="bursts per rival")
    parser.add_argument("--steps", type=int, default=20 if cuda else 1, help="steps per burst")
    parser.add_argument("--warm", type=int, default=20 if cuda else 3, help="untimed steps before the first burst")
    parser.add_argument("--windows", type=int, default=256 if cuda else 32, help="evaluation windows; 0: none")
    parser.add_argument("--profile", action="store_true", help="also where the time of a step goes, by operator")
    parser.add_argument("--seconds", type=float, help="end by this time; pairs that do not fit are left out")
    parser.add_argument("--resume", action="store_true", help="keep the pairs that the JSON already has")
    parser.add_argument("--name", help="name of the JSON file (default: step-DEVICE)")
    args = parser.parse_args()
    if args.device == "cuda" and not cuda:
        parser.error("no CUDA device")
    rivals = args.rivals or [r for r in RIVALS[args.device] if args.compile or not r.endswith("-compile")]
    options = [
        f"--{key}={getattr(args, key)}" for key in ("batch", "input", "target", "attention", "device", "threads")
    ]
    options += ["--model", args.model] if args.model else []
    began = time.monotonic()
    belongs_to = {
        "machine": machine(args.device),
        "sources": sources(),
        "threads": args.threads,
        "shape": {"batch": args.batch, "input": args.input, "target": args.target},
        "model": args.model or "T5-small's shape",
        "attention": args.attention,
        "rounds": args.rounds,
        "steps_per_burst": args.steps,
    }
    path = args.out / f"{args.name or f'step-{args.device}'}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = kept(path, belongs_to).get("rows", []) if args.resume else []
    missing: list[dict[str, str]] = []
    result = {
        "command": " ".join(["python", "bench/run.py", *sys.argv[1:]]),
        **belongs_to,
        "load_average": {"before": load_average()},
        "rows": rows,
        "not_measured": missing,
    }
    show(rows)
    deadline = None if args.seconds is None else began + args.seconds
    longest = 0.0
    for rival in rivals:
        for precision in args.precisions:
            if any(row["rival"] == rival and row["precision"] == precision for row in rows):
                continue
            started = time.monotonic()
            try:
                if deadline is not None and started + longest > deadline:
                    raise RuntimeError("no time left")
                found = compare(rival, precision, args, options, deadline)
            except RuntimeError as error:  # one rival that cannot run here is not the end of the others
                missing.append({"rival": rival, "precision": precision, "reason": str(error)})
                print(f"{rival:28} {precision:5} not measured: {error}", flush=True)
            else:
                rows += found
                show(found)
                longest = max(longest, time.monotonic() - started)
            result["load_average"]["after"] = load_average()
            write_json(path, result)
    write_json(path, result)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
