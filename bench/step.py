"""Time of a training step, rivals side by side in one process: `python bench/step.py [--json FILE]`.

One model, one round after the other over all rivals, each round in the opposite order of the last; medians over rounds.
A step is forward, backward, clipping at 1.0 and AdamW. Wall time and the process's processor time are both given: on a
CPU that others use too, only the second says something. Before anything is timed, every rival's loss and gradients are
compared bit by bit with the stock model's, same seed, dropout on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.rivals import RIVALS, Rival, autocast, batch_of, config, gradients, running, same_bits


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _steps(
    model: Any, rival: Rival, shape: tuple[int, int, int], precision: str, optimizer: Any, count: int, warm: int
):
    """(wall, processor) milliseconds of each of `count` steps after `warm` more."""
    device = next(model.parameters()).device
    times = []
    with running(model, rival, shape, precision) as run:
        for i in range(warm + count):
            inputs = batch_of(model, shape, i)
            _sync(device)
            began, spent = time.perf_counter(), time.process_time()
            with autocast(model, precision):
                loss = run(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            _sync(device)
            if i >= warm:
                times.append((1e3 * (time.perf_counter() - began), 1e3 * (time.process_time() - spent)))
    return times


def _trainer_steps(
    model: Any, shape: tuple[int, int, int], precision: str, count: int, warm: int
) -> list[tuple[float, float]]:
    """The same under Hugging Face's Trainer, the way a user would switch checkpointing on."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    device = next(model.parameters()).device
    data = [{k: v[0] for k, v in batch_of(model, (1, *shape[1:]), i).items() if k != "use_cache"} for i in range(64)]
    data = [data[i % 64] for i in range(shape[0] * (count + warm))]
    stamps: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            _sync(device)
            stamps.append((-time.perf_counter(), -time.process_time()))

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            _sync(device)
            stamps[-1] = (stamps[-1][0] + time.perf_counter(), stamps[-1][1] + time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=shape[0],
            max_steps=count + warm,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            optim="adamw_torch_fused",
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            logging_strategy="no",
        )
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Clock()]).train()
    model.gradient_checkpointing_disable()
    return [(1e3 * wall, 1e3 * processor) for wall, processor in stamps[warm:]]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All rivals: bit identity, then times."""
    from transformers import AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config(args.model, args.attention), attn_implementation=args.attention)
    model.to(args.device).train()
    shape = (args.batch, args.input, args.target)
    rivals = [r for r in RIVALS if (r.compiled is None or args.compile) and (args.trainer or not r.trainer)]
    inputs = batch_of(model, shape, 0)
    reference = gradients(model, inputs, args.precision, 1, model)
    bits: dict[str, str] = {}
    for rival in rivals:
        if not rival.trainer:
            with running(model, rival, shape, args.precision) as run:
                equal, count = same_bits(reference, gradients(run, inputs, args.precision, 1, model))
            bits[rival.name] = f"{equal}/{count}"
    optimizers = {
        kind: torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=kind == "foreach", fused=kind == "fused")
        for kind in ("foreach", "fused")
    }
    times: dict[str, list[tuple[float, float]]] = {rival.name: [] for rival in rivals}
    for index in range(args.rounds):
        for rival in rivals if index % 2 == 0 else reversed(rivals):
            if rival.trainer:
                found = _trainer_steps(model, shape, args.precision, args.steps, args.warm)
            else:
                optimizer = optimizers[rival.optimizer]
                found = _steps(model, rival, shape, args.precision, optimizer, args.steps, args.warm)
            times[rival.name] += found
        print(f"round {index + 1}/{args.rounds}", file=sys.stderr, flush=True)
    rows = []
    for rival in rivals:
        wall, processor = (statistics.median(column) for column in zip(*times[rival.name], strict=True))
        first = rows[0] if rows else {"step_ms": wall, "processor_ms": processor}
        rows.append(
            {
                "name": rival.name,
                "step_ms": round(wall, 3),
                "ratio_to_stock": round(wall / first["step_ms"], 4),
                "processor_ms": round(processor, 3),
                "processor_ratio_to_stock": round(processor / first["processor_ms"], 4),
                "same_bits": bits.get(rival.name),
                "samples": len(times[rival.name]),
            }
        )
    return {
        "measured": True,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch": args.batch,
        "input_length": args.input,
        "target_length": args.target,
        "precision": args.precision,
        "attention": args.attention,
        "rows": rows,
        "not_measured": [r.name for r in RIVALS if r not in rivals],
    }


def main() -> None:
    """Parse arguments, measure, print and write."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="config.json, directory or Hub id of a T5 (default: T5-small's shape)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--input", type=int, default=256)
    parser.add_argument("--target", type=int, default=256)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="eager")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--rounds", type=int, default=10 if cuda else 5)
    parser.add_argument("--steps", type=int, default=10 if cuda else 1, help="timed steps per rival and round")
    parser.add_argument("--warm", type=int, default=5 if cuda else 1, help="untimed steps before them")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    parser.add_argument("--trainer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = measure(args)
    print(f"{'':38} {'ms/step':>9} {'x stock':>8} {'CPU ms':>9} {'x stock':>8} {'same bits':>9}")
    for row in result["rows"]:
        wall, processor = f"{row['step_ms']:9.1f} {row['ratio_to_stock']:8.3f}", f"{row['processor_ms']:9.1f}"
        bits = row["same_bits"] or "-"
        print(f"{row['name']:38} {wall} {processor} {row['processor_ratio_to_stock']:8.3f} {bits:>9}")
    print(f"measured on {result['device']}, {result['threads']} threads; medians")
    for name in result["not_measured"]:
        print(f"{name:38} not measured")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
