"""Correctness on the device, before anything is timed: `python bench/gpu.py OUT [--device cuda]`.

Each check trains a T5 for a few steps twice, dropout on, the last batch smaller, and compares losses, gradient norms,
weights and optimizer states bit by bit:

    deterministic   the same run again, with and without torch's deterministic mode (without: reported, not required)
    graph           graph against eager, for each mode and precision (CUDA only)
    reversible      reversible against conventional, for each precision; with T5-small's shape on CUDA
    scaler          float16 with a scale that overflows at first: steps skipped, scale halved, no weight spoilt (CUDA)

and a negative control that must differ: other dropout. Exit status 1 if a required check fails. Writes
OUT/correctness-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.rivals import config
from bench.run import machine
from bwsk import make_reversible
from bwsk.device import configure
from bwsk.step import make_optimizer, make_step

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
RECIPE = SimpleNamespace(betas=[0.9, 0.999], eps=1e-8, weight_decay=0.01)


class Outcome(dict):
    """Named tensors of a run on the CPU; equal if all their bits are."""

    def same(self, other: Outcome) -> tuple[int, int]:
        """(equal tensors, tensors)."""
        return sum(_bits(value).equal(_bits(other[name])) for name, value in self.items()), len(self)


def _bits(value: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: a NaN equals itself here."""
    return value.contiguous().reshape(-1).view(torch.uint8)


def trained(
    args: argparse.Namespace,
    mode: str,
    backend: str,
    precision: str,
    *,
    seed: int = 1,
    scale: float = 65536.0,
    deterministic: bool = True,
    steps: int | None = None,
) -> tuple[Outcome, torch.amp.GradScaler]:
    """Everything that a short run decides, and its gradient scaler."""
    device = torch.device(args.device)
    configure(device, threads=args.threads, deterministic=deterministic, tf32=False)
    from transformers import T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config(args.model, "eager")).to(device).train()
    half = args.length
    if mode == "reversible":
        sizes = {"batch": 4, "input_length": half, "target_length": half}
        make_reversible(model, "fast", precision=PRECISIONS[precision], **sizes)
    scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=precision == "float16")
    optimizer = make_optimizer(model, RECIPE, 1e-4)
    step = make_step(backend, model, optimizer, scaler, precision, 1.0)
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(seed)
    found = Outcome()
    for index in range(steps or args.steps):
        size = 2 if index % 3 == 2 else 4
        tokens = torch.randint(1, model.config.vocab_size, (size, 2 * half), generator=generator).to(device)
        batch = {"input_ids": tokens[:, :half], "labels": tokens[:, half:].contiguous()}
        loss, norm = step(batch, 1e-4 * (index + 1) / args.steps)
        found[f"loss.{index}"], found[f"norm.{index}"] = loss.cpu(), norm.cpu()
    found |= {f"weight.{name}": value.detach().cpu().clone() for name, value in model.named_parameters()}
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"state.{index}.{key}": value.cpu().clone() for key, value in state.items()}
    return found, scaler


def checks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run them all; each is {"check", "required", "passed", "equal", "tensors"}."""
    cuda = args.device == "cuda"
    precisions = list(PRECISIONS) if cuda else ["float32", "bfloat16"]
    found: list[dict[str, Any]] = []

    def note(name: str, equal: int, count: int, *, required: bool = True, differ: bool = False) -> None:
        passed = equal < count if differ else equal == count
        found.append({"check": name, "required": required, "passed": passed, "equal": equal, "tensors": count})
        word = "ok" if passed else "FAILED" if required else "no"
        print(f"{name:52} {equal:5}/{count:<5} {word}", flush=True)

    for precision in precisions:
        reference, _ = trained(args, "conventional", "eager", precision)
        note(
            f"deterministic, again, {precision}", *reference.same(trained(args, "conventional", "eager", precision)[0])
        )
        reversible, _ = trained(args, "reversible", "eager", precision)
        note(f"reversible = conventional, eager, {precision}", *reference.same(reversible))
        if cuda:
            for mode in ("conventional", "reversible"):
                graph, _ = trained(args, mode, "graph", precision)
                note(f"graph = eager, {mode}, {precision}", *reference.same(graph))
    reference, _ = trained(args, "conventional", "eager", "float32")
    other, _ = trained(args, "conventional", "eager", "float32", seed=2)
    note("negative control: other dropout must differ", *reference.same(other), differ=True)
    if cuda:
        free = [trained(args, "conventional", "eager", "float32", deterministic=False)[0] for _ in range(2)]
        note("repeatable without deterministic mode, float32", *free[0].same(free[1]), required=False)
        note("deterministic mode changes no bit, float32", *reference.same(free[0]), required=False)
        outcomes = {}
        for backend in ("eager", "graph"):
            outcome, scaler = trained(args, "conventional", backend, "float16", scale=2.0**27, steps=16)
            skipped = sum(not bool(value.isfinite()) for name, value in outcome.items() if name.startswith("norm."))
            finite = all(bool(value.isfinite().all()) for name, value in outcome.items() if name.startswith("weight."))
            sound = 0 < skipped < 16 and finite and scaler.get_scale() == 2.0 ** (27 - skipped)
            note(f"scaler skips and recovers, {backend}, float16", int(sound), 1)
            outcomes[backend] = outcome
        note("scaler: graph = eager through skipped steps", *outcomes["eager"].same(outcomes["graph"]))
    return found


def main() -> None:
    """Parse arguments, check, print, write; exit status 1 if a required check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--model", help="config.json or directory of a T5 (default: T5-small; on the CPU, a tiny one)")
    parser.add_argument("--length", type=int, help="tokens in = tokens out (default: 256; on the CPU, 16)")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench/gpu: no CUDA device; BWSK_DEVICE=cpu runs what the CPU can check")
    small = args.device == "cpu" and args.model is None
    args.length = args.length or (16 if args.device == "cpu" else 256)
    args.out.mkdir(parents=True, exist_ok=True)
    if small:
        args.model = str(tiny_config(args.out / "tiny"))
    found = checks(args)
    result = {
        "command": " ".join(["python", "bench/gpu.py", *sys.argv[1:]]),
        "machine": machine(args.device),
        "model": "a tiny T5" if small else args.model or "T5-small's shape",
        "length": args.length,
        "steps": args.steps,
        "checks": found,
    }
    path = args.out / f"correctness-{args.device}.json"
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    if not all(check["passed"] for check in found if check["required"]):
        raise SystemExit(1)


def tiny_config(folder: Path) -> Path:
    """A T5 small enough to check on a CPU in seconds."""
    from transformers import T5Config

    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 120}
    T5Config(**shape, decoder_start_token_id=0, architectures=["T5ForConditionalGeneration"]).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
