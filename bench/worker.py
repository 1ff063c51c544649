"""One way to train, alone in its process, driven over pipes: what `bench/run.py` puts side by side.

A process of its own, so that allocator, compiler, threads and peak memory of one rival do not reach another. It reads a
command per line from standard input and answers with a line of JSON on standard output:

    {"do": "steps", "count": n}      n optimizer steps, timed together: {"ms", "cpu_ms"} per step
    {"do": "busy", "count": n}       the same under the profiler: {"busy"}, share of the time that a kernel ran (CUDA)
    {"do": "profile", "count": n}    where it goes: {"operators": {name: own ms per step}, "page_faults": per step}
    {"do": "evaluate", "windows": n} perplexity on n windows: {"windows_per_s"}
    {"do": "memory"}                 {"peak_mib"}, most that was allocated on the device so far; null on the CPU

The rivals, at the same weights, precision and attention:

    plain          the publication's loop: foreach AdamW, the cache left on, `loss.item()` and a NaN check each step
    plain-ckpt     the same with the framework's checkpointing of whole blocks (the publication's "reversible")
    trainer…       Seq2SeqTrainer with the fused AdamW; -ckpt with checkpointing, -compile with torch_compile
    ours-MODE-BACKEND   `bwsk.study.train_step` as `bwsk train` runs it
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.rivals import autocast, config

PRECISIONS = ("fp32", "bf16", "fp16")
WINDOW, STRIDE = 512, 128
PROFILED = 12  # operators that a profile names


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Gate:
    """Hands out steps by command: a rival's loop asks `begin()` before a step and calls `end()` after it."""

    def __init__(self, device: torch.device, evaluate: Callable[[int], float]) -> None:
        self.device, self.evaluate = device, evaluate
        self.left = 0
        self.count = 0
        self.profiler: Any = None
        self._cuda = device.type == "cuda"
        # Libraries print: answers go to a copy of standard output, everything else to standard error.
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def sync(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def begin(self) -> None:
        while self.left == 0:
            line = sys.stdin.readline()
            if not line:
                raise SystemExit(0)
            self._command(json.loads(line))

    def _command(self, command: dict[str, Any]) -> None:
        if command["do"] in ("steps", "busy", "profile"):
            self.left = self.count = command["count"]
            self.task = command["do"]
            if self.task != "steps":
                cpu, cuda = torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA
                activities = [*([cpu] if self.task == "profile" else []), *([cuda] if self._cuda else [])]
                self.profiler = torch.profiler.profile(activities=activities) if activities else None
                if self.profiler:
                    self.profiler.start()
            self.faults = _page_faults()
            self.sync()
            self.started = time.perf_counter(), time.process_time()
        elif command["do"] == "evaluate":
            self.sync()
            self._answer(windows_per_s=self.evaluate(command["windows"]))
        elif command["do"] == "memory":
            self._answer(peak_mib=torch.cuda.max_memory_allocated(self.device) / 2**20 if self._cuda else None)
        else:
            raise SystemExit(f"bench/worker: unknown command {command}")

    def end(self) -> None:
        self.left -= 1
        if self.left:
            return
        self.sync()
        wall, cpu = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        if self.task == "steps":
            self._answer(ms=1e3 * wall / self.count, cpu_ms=1e3 * cpu / self.count)
            return
        faults = (_page_faults() - self.faults) / self.count
        events = []
        if self.profiler is not None:
            self.profiler.stop()
            events = self.profiler.key_averages()
            self.profiler = None
        if self._cuda:  # kernels and copies alone: operators and annotations count the same time again
            kinds = torch.autograd.DeviceType
            events = [e for e in events if e.device_type == kinds.CUDA and not e.is_user_annotation]
        if self.task == "busy":
            busy = sum(event.self_device_time_total for event in events) / 1e6 / wall
            self._answer(busy=busy if self._cuda else None)
            return
        own = {e.key: e.self_device_time_total if self._cuda else e.self_cpu_time_total for e in events}
        most = sorted(own, key=own.__getitem__, reverse=True)[:PROFILED]
        self._answer(operators={key: round(own[key] / 1e3 / self.count, 2) for key in most}, page_faults=round(faults))

    def _answer(self, **values: Any) -> None:
        print(json.dumps(values, allow_nan=False), file=self.answers, flush=True)


def batches(model: Any, shape: tuple[int, int, int], device: torch.device):
    """Endless random batches, moved as `bwsk train` moves them."""
    generator = np.random.default_rng(0)
    batch, ins, outs = shape
    while True:
        tokens = torch.from_numpy(generator.integers(1, model.config.vocab_size, (batch, ins + outs)))
        if device.type == "cuda":
            tokens = tokens.pin_memory().to(device, non_blocking=True)
        yield {"input_ids": tokens[:, :ins], "labels": tokens[:, ins:].contiguous()}


def _windows(model: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and the starts of `count` windows of them."""
    starts = np.arange(count) * STRIDE
    return np.random.default_rng(1).integers(1, model.config.vocab_size, int(starts[-1]) + WINDOW + 1), starts


def evaluation(model: Any, precision: str) -> Callable[[int], float]:
    """Windows per second of the published perplexity as `bwsk train` validates, in batches of 32."""
    from bwsk.study.perplexity import window_nll

    # The fields of EvaluateParams that are read; its module needs pydantic, which a bare GPU machine may not have.
    params = SimpleNamespace(batch_size=32, precision=precision, max_windows=None)

    def run(windows: int) -> float:
        tokens, starts = _windows(model, windows)
        began = time.perf_counter()
        window_nll(model, tokens, starts, WINDOW, params)
        return windows / (time.perf_counter() - began)

    return run


def plain_evaluation(model: Any, precision: str) -> Callable[[int], float]:
    """The same by the publication's loop: a window at a time, the model's own loss, fetched each time."""
    device = next(model.parameters()).device

    def run(windows: int) -> float:
        tokens, starts = _windows(model, windows)
        model.eval()
        began = time.perf_counter()
        with torch.no_grad(), autocast(model, precision):
            for start in starts:
                window = torch.from_numpy(tokens[start : start + WINDOW])[None].to(device)
                model(input_ids=window[:, : WINDOW // 2], labels=window[:, WINDOW // 2 :].contiguous()).loss.item()
        elapsed = time.perf_counter() - began
        model.train()
        return windows / elapsed

    return run


def plain(gate: Gate, model: Any, source: Any, precision: str, checkpointing: bool) -> None:
    """The publication's loop."""
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    device = gate.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    losses = []
    while True:
        gate.begin()
        optimizer.zero_grad()
        with autocast(model, precision):
            loss = model(**next(source)).loss
        if torch.isnan(loss) or torch.isinf(loss):
            raise SystemExit("bench/worker: the plain loop's loss is not finite")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        gate.end()


def ours(gate: Gate, model: Any, source: Any, precision: str, shape: tuple[int, int, int], name: str) -> None:
    """The product's own step: `ours-conventional-eager`, `ours-reversible-graph`, …"""
    from bwsk import make_reversible
    from bwsk.reversible.t5.float16 import keep_projection_out_of_float16
    from bwsk.study.cpu_tuning import keep_freed_memory
    from bwsk.study.train_step import make_optimizer, make_step

    _, mode, backend = name.split("-")
    if precision == "fp16":
        keep_projection_out_of_float16(model)
    if mode == "reversible":
        batch, ins, outs = shape
        make_reversible(model, "fast", batch=batch, input_length=ins, target_length=outs, precision=precision)
    recipe = SimpleNamespace(betas=[0.9, 0.999], eps=1e-8, weight_decay=0.01)
    optimizer = make_optimizer(model, recipe, 1e-5)
    scaler = torch.amp.GradScaler(gate.device.type, enabled=precision == "fp16")
    step = make_step(backend, model, optimizer, scaler, precision, 1.0)
    settled = False
    while True:
        gate.begin()
        step(next(source), 1e-5)
        if gate.device.type == "cpu" and not settled:  # training does it at each point of the loss curve
            settled = keep_freed_memory()
        gate.end()


def trainer(gate: Gate, model: Any, source: Any, precision: str, shape: tuple[int, int, int], name: str) -> None:
    """Seq2SeqTrainer as a user would set it up."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

    one = batches(model, (1, *shape[1:]), torch.device("cpu"))
    data = [{key: value[0] for key, value in next(one).items()} for _ in range(64)]

    class Driven(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            gate.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            gate.end()

    with tempfile.TemporaryDirectory() as folder:
        arguments = Seq2SeqTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=shape[0],
            max_steps=10**6,
            gradient_checkpointing="ckpt" in name,
            gradient_checkpointing_kwargs={"use_reentrant": False} if "ckpt" in name else None,
            torch_compile="compile" in name,
            optim="adamw_torch_fused",
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=gate.device.type == "cpu",
            logging_strategy="no",
        )
        Seq2SeqTrainer(model=model, args=arguments, train_dataset=data * shape[0], callbacks=[Driven()]).train()


def main() -> None:
    """Build the model, then run the rival until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rival")
    parser.add_argument("--model")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--input", type=int, default=256)
    parser.add_argument("--target", type=int, default=256)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--attention", default="eager")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    # As torch's profiler does it for its own CUDA graphs: CUPTI must not be torn down and started again beside one.
    os.environ |= {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}
    from transformers import T5ForConditionalGeneration

    device = torch.device(args.device)
    ours_too = args.rival.startswith("ours")
    if ours_too:
        from bwsk.study.device import configure

        configure(device, threads=args.threads, deterministic=True, tf32=False)  # what params.yaml has by default
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config(args.model, args.attention)).to(device).train()
    shape = (args.batch, args.input, args.target)
    gate = Gate(device, (evaluation if ours_too else plain_evaluation)(model, args.precision))
    source = batches(model, shape, device)
    if args.rival in ("plain", "plain-ckpt"):
        plain(gate, model, source, args.precision, args.rival.endswith("ckpt"))
    elif ours_too:
        ours(gate, model, source, args.precision, shape, args.rival)
    elif args.rival.startswith("trainer"):
        trainer(gate, model, source, args.precision, shape, args.rival)
    else:
        parser.error(f"unknown rival {args.rival}")


if __name__ == "__main__":
    main()
