"""Correctness on the device, before anything is timed: `python bench/gpu.py OUT [--device cuda]`.

Each check trains a T5 for a few steps in two ways, dropout on, every third batch smaller, and compares losses, gradient
norms, weights, optimizer states and the gradient scale bit by bit:

    reversible      reversible against conventional, for each precision; with T5-small's shape on CUDA
    deterministic   the same run again, with and without torch's deterministic mode (without: reported, not required)
    interrupted     stopped, saved, loaded into a new model and continued, against the whole run
    scaler          float16 with a scale that overflows at first: steps skipped, scale halved, no weight spoilt (CUDA)
    graph           graph against eager, for each mode and precision, and as above (CUDA only)

and a negative control that must differ: other dropout. Peaks of memory on the device are noted beside them.

OUT/correctness-DEVICE.json is written after each check. A check that raises is a failed one; on CUDA the rest then goes
on in a new process, for an error there can spoil what follows. With --resume what the file holds is not checked again.
Exit status 1 if a required check failed.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.rivals import config, release
from bench.run import kept, machine, sources
from bwsk import make_reversible
from bwsk.files import write_json
from bwsk.reversible.t5.float16 import keep_projection_out_of_float16
from bwsk.study.checkpoint import optimizer_state, random_states, restore_optimizer, restore_random_states
from bwsk.study.device import configure
from bwsk.study.model import load_weights, weights
from bwsk.study.train_step import make_optimizer, make_step
from bwsk.units import MIB, PRECISIONS

# How the name of a mode continues after "reversible-": the budget.
MODES = ("conventional", "reversible-fast", "reversible-max")
RECIPE = SimpleNamespace(betas=[0.9, 0.999], eps=1e-8, weight_decay=0.01)


class Outcome(dict):
    """sha256 of every tensor of a run, by name, and the few figures that a check or a reader wants as such."""

    norms: list[float]
    scale: float
    spoilt: bool  # a weight is not finite
    peak_mib: float | None = None  # on a CUDA device, without what was there before

    def note(self, name: str, value: torch.Tensor) -> None:
        """Add a tensor. By its bytes: a NaN equals itself here."""
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self[name] = hashlib.sha256(data).hexdigest()

    def same(self, other: Outcome) -> tuple[int, int]:
        """(equal tensors, tensors)."""
        return sum(other.get(name) == value for name, value in self.items()), len(self)


class Check(NamedTuple):
    """`run` gives (equal tensors, tensors); all must be equal, or with `differ` not all."""

    name: str
    run: Callable[[], tuple[int, int]]
    required: bool = True
    differ: bool = False


@functools.cache
def _drawn(model: str | None) -> torch.nn.Module:
    from transformers import T5ForConditionalGeneration

    torch.manual_seed(0)
    return T5ForConditionalGeneration(config(model, "eager"))


class Setting(NamedTuple):
    """What decides a run's bits, beside the command's arguments."""

    mode: str
    backend: str
    precision: str
    seed: int = 1
    scale: float = 65536.0
    deterministic: bool = True
    steps: int = 6
    interrupt: int | None = None  # the step before which everything is saved and loaded


def _made(args: argparse.Namespace, setting: Setting) -> Any:
    """A step with its model, optimizer and scaler, as `bwsk train` makes them."""
    device = torch.device(args.device)
    model = copy.deepcopy(_drawn(args.model)).to(device).train()
    if setting.precision == "fp16":
        keep_projection_out_of_float16(model)
    if setting.mode != "conventional":
        sizes = {"batch": 4, "input_length": args.length, "target_length": args.length}
        make_reversible(model, setting.mode.removeprefix("reversible-"), precision=setting.precision, **sizes)
    scaler = torch.amp.GradScaler(device.type, init_scale=setting.scale, enabled=setting.precision == "fp16")
    return make_step(setting.backend, model, make_optimizer(model, RECIPE, 1e-4), scaler, setting.precision, 1.0)


def _continued(args: argparse.Namespace, setting: Setting, step: Any) -> Any:
    """Another step like this one, with what a checkpoint holds of it."""
    saved = {name: value.cpu().clone() for name, value in weights(step.model).items()}
    states = {name: value.cpu().clone() for name, value in optimizer_state(step.optimizer).items()}
    random, scale = random_states(step.device), step.scaler.state_dict()
    torch.manual_seed(99)
    other = _made(args, setting)
    load_weights(other.model, saved)
    restore_optimizer(other.optimizer, {name: value.to(step.device) for name, value in states.items()})
    other.scaler.load_state_dict(scale)
    restore_random_states(random, step.device)
    return other


def trained(args: argparse.Namespace, setting: Setting) -> Outcome:
    """Everything that a short run decides."""
    cuda = args.device == "cuda"
    configure(torch.device(args.device), threads=args.threads, deterministic=setting.deterministic, tf32=False)
    release(args.device)
    before = 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    step = _made(args, setting)
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(setting.seed)
    found = Outcome()
    norms = []
    for index in range(setting.steps):
        size = 2 if index % 3 == 2 else 4
        tokens = torch.randint(1, step.model.config.vocab_size, (size, 2 * args.length), generator=generator)
        tokens = tokens.to(step.device)
        batch = {"input_ids": tokens[:, : args.length], "labels": tokens[:, args.length :].contiguous()}
        if index == setting.interrupt:
            step = _continued(args, setting, step)
        loss, norm = step(batch, 1e-4 * (index + 1) / setting.steps)
        found.note(f"loss.{index}", loss)
        found.note(f"norm.{index}", norm)
        norms.append(norm)
    for name, value in step.model.named_parameters():
        found.note(f"weight.{name}", value)
    for name, value in optimizer_state(step.optimizer).items():
        found.note(f"state.{name}", value)
    found.norms, found.scale = torch.stack(norms).tolist(), step.scaler.get_scale()
    found.note("scale", torch.tensor(found.scale))
    found.spoilt = not all(bool(value.isfinite().all()) for value in step.model.parameters())
    if cuda:
        found.peak_mib = round((torch.cuda.max_memory_allocated() - before) / MIB, 2)
    return found


def scaler_is_sound(outcome: Outcome, setting: Setting) -> bool:
    """Whether steps were skipped until the scale fitted, the scale halved at each, and no weight spoilt."""
    skipped = sum(not math.isfinite(norm) for norm in outcome.norms)
    halved = outcome.scale == setting.scale / 2**skipped
    return 0 < skipped < setting.steps and halved and not outcome.spoilt


def checks(args: argparse.Namespace, run: Callable[[Setting], Outcome]) -> Iterator[Check]:
    """All of them, those that do without a graph first. `run` trains, or remembers."""
    cuda = args.device == "cuda"
    precisions = list(PRECISIONS) if cuda else ["fp32", "bf16"]
    whole = functools.partial(Setting, steps=args.steps)
    again = functools.partial(trained, args)  # not remembered

    def compare(one: Setting, other: Setting, train: Callable[[Setting], Outcome] = run) -> Callable:
        return lambda: run(one).same(train(other))

    for precision in precisions:
        plain = whole("conventional", "eager", precision)
        yield Check(f"deterministic, again, {precision}", compare(plain, plain, again))
        for mode in MODES[1:]:
            ours = whole(mode, "eager", precision)
            yield Check(f"{mode} = conventional, eager, {precision}", compare(plain, ours))
        yield Check(f"interrupted = whole, eager, {precision}", compare(plain, plain._replace(interrupt=3), again))
    plain = whole("conventional", "eager", "fp32")
    yield Check("negative control: other dropout must differ", compare(plain, plain._replace(seed=2)), differ=True)
    if not cuda:
        return
    free = plain._replace(deterministic=False)
    yield Check("deterministic mode changes no bit, fp32", compare(plain, free), required=False)
    yield Check("repeatable without deterministic mode, fp32", compare(free, free, again), required=False)
    high = whole("conventional", "eager", "fp16")._replace(scale=2.0**27, steps=16)
    for backend in ("eager", "graph"):
        setting = high._replace(backend=backend)
        yield Check(
            f"scaler skips and recovers, {backend}, fp16",
            lambda setting=setting: (int(scaler_is_sound(run(setting), setting)), 1),
        )
        if backend == "graph":
            yield Check("scaler: graph = eager through skipped steps", compare(high, setting))
            continue
        for precision in precisions:
            for mode in MODES:
                eager = whole(mode, "eager", precision)
                yield Check(f"graph = eager, {mode}, {precision}", compare(eager, eager._replace(backend="graph")))
            graph = whole("conventional", "graph", precision)
            yield Check(f"interrupted = whole, graph, {precision}", compare(graph, graph._replace(interrupt=3), again))
    eager = whole("reversible-balanced", "eager", "fp32")
    yield Check("graph = eager, reversible-balanced, fp32", compare(eager, eager._replace(backend="graph")))


def main() -> None:
    """Parse arguments, check, print, write; exit status 1 if a required check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--model", help="config.json or directory of a T5 (default: T5-small; on the CPU, a tiny one)")
    parser.add_argument("--length", type=int, help="tokens in = tokens out (default: 256; on the CPU, 16)")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=int, help="end then, with what has been checked")
    parser.add_argument("--resume", action="store_true", help="keep the checks that the file already has")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench/gpu: no CUDA device; BWSK_DEVICE=cpu runs what the CPU can check")
    if args.seconds and not any(signal.getitimer(signal.ITIMER_REAL)):  # else an earlier process of this call set it
        signal.alarm(args.seconds)  # without a handler: it ends the process even inside a call that hangs
    small = args.device == "cpu" and args.model is None
    args.length = args.length or (16 if args.device == "cpu" else 256)
    args.out.mkdir(parents=True, exist_ok=True)
    belongs_to = {
        "machine": machine(args.device),
        "sources": sources(),
        "model": "a tiny T5" if small else args.model or "T5-small's shape",
        "length": args.length,
        "steps": args.steps,
    }
    if small:
        args.model = str(tiny_config(args.out / "tiny"))
    path = args.out / f"correctness-{args.device}.json"
    before = kept(path, belongs_to) if args.resume else {}
    found: list[dict[str, Any]] = before.get("checks", [])
    peaks: dict[str, float] = before.get("peaks_mib", {})
    result = {
        "command": " ".join(["python", "bench/gpu.py", *sys.argv[1:]]),
        **belongs_to,
        "complete": False,
        "peaks_mib": peaks,
        "checks": found,
    }

    @functools.cache
    def run(setting: Setting) -> Outcome:
        outcome = trained(args, setting)
        if outcome.peak_mib is not None:
            peaks[f"{setting.mode}, {setting.backend}, {setting.precision}"] = outcome.peak_mib
        return outcome

    known = {entry["check"]: entry for entry in found}
    for check in checks(args, run):
        entry = known.get(check.name)
        if entry is None:
            # Says what became of it if the process does not come back from it.
            entry = {"check": check.name, "required": check.required, "passed": False, "equal": None, "tensors": None}
            entry["error"] = "the process ended in it; delete this file to check again"
            found.append(entry)
            write_json(path, result)
            if not _run(check, entry) and args.device == "cuda":
                write_json(path, result)
                sys.stdout.flush()
                resume = [] if args.resume else ["--resume"]
                os.execv(sys.executable, [sys.executable, *sys.argv, *resume])
            write_json(path, result)
        _print(entry)
    result["complete"] = True
    write_json(path, result)
    print(f"wrote {path}")
    if not all(entry["passed"] for entry in found if entry["required"]):
        raise SystemExit(1)


def _run(check: Check, entry: dict[str, Any]) -> bool:
    """Run it and note the outcome; whether it came to an end by itself."""
    try:
        equal, count = check.run()
    except Exception as error:  # whatever it is, the other checks are to be made
        traceback.print_exc()
        entry["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        return False
    del entry["error"]
    entry |= {"passed": equal < count if check.differ else equal == count, "equal": equal, "tensors": count}
    return True


def _print(entry: dict[str, Any]) -> None:
    word = "ok" if entry["passed"] else "FAILED" if entry["required"] else "no"
    counts = entry.get("error") or f"{entry['equal']:5}/{entry['tensors']:<5}"
    print(f"{entry['check']:52} {counts} {word}", flush=True)


def tiny_config(folder: Path) -> Path:
    """A T5 small enough to check on a CPU in seconds."""
    from transformers import T5Config

    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 120}
    T5Config(**shape, decoder_start_token_id=0, architectures=["T5ForConditionalGeneration"]).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
