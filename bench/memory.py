"""Peak memory of a training step, rivals side by side: `python bench/memory.py [--json FILE] [--figure FILE]`.

Predicted for every rival that the predictor covers; measured too where there is a CUDA device (peak of the caching
allocator over one step after two warm-up steps, workspaces included), each in a process of its own. The figure shows
our trade-off curve with the rivals as points, and how the peak grows with the batch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.axes import log_log
from bench.rivals import RIVALS, Rival, autocast, batch_of, config, running
from bwsk.memory.prediction import predict_memory
from bwsk.reversible.handle import curve_of
from bwsk.units import MIB


def predicted(config: Any, rival: Rival, shape: tuple[int, int, int], precision: str, attention: str):
    """The prediction for a rival, or None where a compiler decides what is saved."""
    if rival.compiled is not None:
        return None
    batch, ins, outs = shape
    return predict_memory(
        config,
        batch=batch,
        input_length=ins,
        target_length=outs,
        mode=rival.mode,
        precision=precision,
        budget=rival.budget,
        optimizer=rival.optimizer,
        attention=attention,
    )


def measured(*step: Any) -> float | None:
    """`_measured` in a process of its own: what libraries and compilers keep on the device would count for the next.

    None without a device, for the Trainer's row (its step is the row above) and for a rival that fails here.
    """
    rival: Rival = step[1]
    if not torch.cuda.is_available() or rival.trainer:
        return None
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_measured, *step).result()
        except (RuntimeError, ValueError, BrokenProcessPool) as error:
            print(f"{rival.name}: not measured: {error}", file=sys.stderr, flush=True)
            return None


def _measured(config: Any, rival: Rival, shape: tuple[int, int, int], precision: str, attention: str) -> float:
    """Peak MiB allocated on CUDA."""
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation=attention).cuda().train()
    optimizer = torch.optim.AdamW(
        model.parameters(), foreach=rival.optimizer == "foreach", fused=rival.optimizer == "fused"
    )
    with running(model, rival, shape, precision) as run:
        for step in range(3):
            if step == 2:
                torch.cuda.reset_peak_memory_stats()
            with autocast(model, precision):
                loss = run(**batch_of(model, shape, step)).loss
            loss.backward()
            del loss
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_allocated() / MIB


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The table, and with `--growth` the peaks over batch and length."""
    found = config(args.model, args.attention)
    shape = (args.batch, args.input, args.target)
    rows, flops = [], None
    for rival in RIVALS:
        one = predicted(found, rival, shape, args.precision, args.attention)
        flops = flops or one.flops
        peak = measured(found, rival, shape, args.precision, args.attention)
        rows.append(
            {
                "name": rival.name,
                "predicted_mib": None if one is None else one.peak_mib,
                "measured_mib": None if peak is None else round(peak, 2),
                "extra_flops": None if one is None else round(one.flops / flops - 1, 5),
                "phases": None if one is None else one.phases,
            }
        )
    result = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "batch": args.batch,
        "input_length": args.input,
        "target_length": args.target,
        "precision": args.precision,
        "attention": args.attention,
        "rows": rows,
        "curve": [plan.point() for plan in curve_of(found, shape, args.precision)],
    }
    if args.growth:
        saved = [r for r in RIVALS if r.compiled is None and not r.trainer and "fused AdamW" not in r.name]
        result["growth"] = {
            "batch": _growth(found, saved, [(b, args.input, args.target) for b in (1, 2, 4, 8, 16, 32, 64)], args),
            "length": _growth(found, saved, [(args.batch, n, n) for n in (128, 256, 512, 1024, 2048)], args),
        }
    return result


def _growth(found: Any, rivals: list[Rival], shapes: list[tuple[int, int, int]], args: argparse.Namespace):
    return [
        {"shape": list(shape)}
        | {r.name: predicted(found, r, shape, args.precision, args.attention).peak_mib for r in rivals}
        for shape in shapes
    ]


def draw(result: dict[str, Any], path: Path) -> None:
    """The trade-off curve with the rivals as points and, if measured, growth with batch and length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    growth = result.get("growth")
    figure, axes = plt.subplots(1, 3 if growth else 1, figsize=(13 if growth else 5.5, 4.2), squeeze=False)
    axis = axes[0][0]
    curve = result["curve"]
    axis.plot([100 * p["overhead"] for p in curve], [p["peak_mib"] for p in curve], color="#1b6ca8", lw=1.8)
    for row in result["rows"]:
        peak = row["predicted_mib"]
        if peak is None or "Trainer" in row["name"]:
            continue
        ours = row["name"].startswith("bwsk")
        axis.scatter([100 * row["extra_flops"]], [peak], color="#1b6ca8" if ours else "#b5502b", zorder=3, s=28)
        if row["name"] == "stock, fused AdamW":
            continue  # the same point as stock: its peak is in the backward
        right = row["extra_flops"] > 0.1
        lift = -12 if "fused" in row["name"] else 5
        place = {"xytext": (2, lift), "ha": "right"} if right else {"xytext": (7, 2)}
        if row["name"] in ("bwsk max", "bwsk balanced"):
            place = {"xytext": (5, 4) if row["name"] == "bwsk max" else (-4, -13)}
        label = row["name"].replace("stock checkpointing, fused AdamW", "the same, fused AdamW")
        axis.annotate(label, (100 * row["extra_flops"], peak), textcoords="offset points", fontsize=8, **place)
    floor = min(row["phases"]["optimizer"] for row in result["rows"] if row["phases"])
    axis.axhline(floor, color="0.6", lw=0.8, ls="--")
    axis.text(3, floor - 8, "weights + gradients + AdamW states", fontsize=7.5, color="0.4", va="top")
    axis.set(xlabel="extra FLOPs per step, %", ylabel="predicted peak, MiB", title="memory against recomputation")
    axis.set_ylim(floor - 90, None)
    axis.set_xlim(-1, 28)
    for axis, (kind, label) in zip(
        axes[0][1:], (("batch", "batch"), ("length", "tokens in = tokens out")), strict=False
    ):
        points = growth[kind]
        at = [p["shape"][0 if kind == "batch" else 1] for p in points]
        for name in points[0]:
            if name != "shape":
                style = {"color": "#b5502b"} if name.startswith("stock") else {"color": "#1b6ca8"}
                style["ls"] = {"stock": "-", "stock checkpointing": "--", "bwsk fast": ":", "bwsk balanced": "--"}.get(
                    name, "-"
                )
                axis.plot(at, [p[name] / 1024 for p in points], marker="o", ms=3, lw=1.4, label=name, **style)
        axis.set(xlabel=label, ylabel="predicted peak, GiB", title=f"growth with {kind}")
        log_log(axis, at)
        axis.legend(fontsize=8, frameon=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Parse arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="config.json, directory or Hub id of a T5 (default: T5-small's shape)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--input", type=int, default=256)
    parser.add_argument("--target", type=int, default=256)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="eager")
    parser.add_argument("--growth", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    result = measure(args)

    def cell(value: float | None, form: str) -> str:
        return "not measured" if value is None else format(value, form)

    print(f"{'peak, MiB':38} {'predicted':>12} {'measured':>12} {'extra FLOPs':>12}")
    for row in result["rows"]:
        peaks = f"{cell(row['predicted_mib'], ',.0f'):>12} {cell(row['measured_mib'], ',.0f'):>12}"
        print(f"{row['name']:38} {peaks} {cell(row['extra_flops'], '+.1%'):>12}")
    for kind, points in result.get("growth", {}).items():
        print(f"\npredicted peak, MiB, by {kind}")
        names = [name for name in points[0] if name != "shape"]
        print(f"{'':>16} " + " ".join(f"{name.replace('checkpointing', 'ckpt'):>14}" for name in names))
        for point in points:
            shape = "x".join(str(size) for size in point["shape"])
            print(f"{shape:>16} " + " ".join(f"{point[name]:14,.0f}" for name in names))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if args.figure:
        draw(result, args.figure)


if __name__ == "__main__":
    main()
