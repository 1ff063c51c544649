"""How time and memory of a step grow with batch, length and model: `python bench/growth.py OUT [--figure FILE]`.

At each point the plain loop, ours conventional and ours reversible (`fast`), as in `bench/run.py`: processes of their
own that take turns. Time is measured; memory is the predicted peak, and measured too on a CUDA device. Writes
OUT/growth-DEVICE.json, after each point.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.axes import log_log
from bench.rivals import T5_SMALL, config
from bench.run import compare, load_average, machine
from bwsk.files import write_json

# Shapes of published T5 models; "tiny" is the embedded study's.
MODELS: dict[str, dict[str, int]] = {
    "tiny": {"d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 2, "num_heads": 4, "vocab_size": 1024},
    "small": {},
    "base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
}
RIVALS = {"ours-conventional": "conventional", "ours-reversible": "reversible"}
COLOURS = {"plain": "#b5502b", "ours-conventional": "0.45", "ours-reversible": "#1b6ca8"}


def points(args: argparse.Namespace) -> list[tuple[str, str, int, int]]:
    """(axis, model, batch, tokens in = tokens out) of every point; the axes meet in T5-small's published shape."""
    return [
        *(("batch", "small", batch, 256) for batch in args.batches),
        *(("length", "small", 4, length) for length in args.lengths),
        *(("model", model, 4, 256) for model in args.models),
    ]


def predicted(model: str, mode: str, batch: int, length: int, precision: str) -> float:
    """The predicted peak in MiB; the plain loop is stock with foreach AdamW."""
    from bwsk.memory.prediction import predict_memory

    step = {"batch": batch, "input_length": length, "target_length": length, "precision": precision}
    if mode == "plain":
        return predict_memory(config(model, "eager"), mode="conventional", optimizer="foreach", **step).peak_mib
    budget = "fast" if mode == "reversible" else None
    return predict_memory(config(model, "eager"), mode=mode, optimizer="fused", budget=budget, **step).peak_mib


def measure(args: argparse.Namespace, models: dict[str, str]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each point, one per rival that ran."""
    known: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for axis, model, batch, length in points(args):
        shape = (model, batch, length)
        if shape not in known:
            args.batch, args.input, args.target = batch, length, length
            options = [f"--batch={batch}", f"--input={length}", f"--target={length}", f"--model={models[model]}"]
            options += [f"--device={args.device}", f"--threads={args.threads}"]
            known[shape] = []
            for rival, mode in RIVALS.items():
                try:
                    found = compare(f"{rival}-{args.backend}", args.precision, args, options)
                except RuntimeError as error:  # one that does not fit is not the end of the others
                    print(f"{axis:7} {model:6} {batch:4} x {length:<5} {rival}: not measured: {error}", flush=True)
                    continue
                # The plain loop runs beside both: one of its rows is enough.
                for row, name in zip(found, ("plain", rival), strict=True):
                    if name == "plain" and known[shape]:
                        continue
                    mib = predicted(models[model], "plain" if name == "plain" else mode, batch, length, args.precision)
                    saved = {key: row[key] for key in ("step_ms", "ratio_to_plain", "tokens_per_s", "peak_mib")}
                    known[shape].append({"rival": name, **saved, "predicted_mib": round(mib, 1)})
        yield [{"axis": axis, "model": model, "batch": batch, "length": length, **row} for row in known[shape]]
        for row in known[shape]:
            print(
                f"{axis:7} {model:6} {batch:4} x {length:<5} {row['rival']:18} {row['step_ms']:10.1f} ms/step"
                f" {row['ratio_to_plain']:7.3f} x plain {row['predicted_mib']:10,.0f} MiB predicted",
                flush=True,
            )


def draw(result: dict[str, Any], path: Path) -> None:
    """Time above, memory below; a column per axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes_of = {"batch": "batch", "length": "tokens in = tokens out"}
    figure, axes = plt.subplots(2, len(axes_of), figsize=(8.5, 6), squeeze=False)
    for column, (axis, label) in enumerate(axes_of.items()):
        for line, (key, what) in enumerate((("step_ms", "step, ms"), ("predicted_mib", "predicted peak, MiB"))):
            plot = axes[line][column]
            for rival, colour in COLOURS.items():
                found = sorted((r[axis], r[key]) for r in result["rows"] if r["axis"] == axis and r["rival"] == rival)
                if found:
                    plot.plot(*zip(*found, strict=True), marker="o", ms=3.5, lw=1.5, color=colour, label=rival)
            at = sorted({row[axis] for row in result["rows"] if row["axis"] == axis})
            plot.set(xlabel=label, ylabel=what)
            if at:
                log_log(plot, at)
            plot.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"T5-small, {result['precision']}, {result['machine']['device']}", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Parse arguments, measure, print, write."""
    import torch

    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory for the JSON")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16, 64] if cuda else [1, 2, 4, 8])
    parser.add_argument(
        "--lengths", type=int, nargs="*", default=[128, 256, 512, 1024] if cuda else [64, 128, 256, 512]
    )
    parser.add_argument("--models", nargs="*", choices=tuple(MODELS), default=["tiny", "small", *(["base"] * cuda)])
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16")
    parser.add_argument("--backend", choices=("eager", "graph", "compile"), default="graph" if cuda else "eager")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20 if cuda else 1, help="steps per burst")
    parser.add_argument("--warm", type=int, default=10 if cuda else 2)
    args = parser.parse_args()
    args.windows, args.profile = 0, False
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    result = {
        "command": " ".join(["python", "bench/growth.py", *sys.argv[1:]]),
        "precision": args.precision,
        "backend": args.backend,
        "threads": args.threads,
        "rounds": args.rounds,
        "steps_per_burst": args.steps,
        "machine": machine(args.device),
        "rows": rows,
        "load_average": {"before": load_average()},
    }
    path = args.out / f"growth-{args.device}.json"
    with tempfile.TemporaryDirectory() as place:
        models = {name: str(Path(place) / f"{name}.json") for name in MODELS}
        for name, model in models.items():
            Path(model).write_text(json.dumps({**T5_SMALL, **MODELS[name], "model_type": "t5"}), encoding="utf-8")
        for found in measure(args, models):
            rows += found
            result["load_average"]["after"] = load_average()
            write_json(path, result)
    print(f"wrote {path}")
    if args.figure:
        draw(result, args.figure)


if __name__ == "__main__":
    main()
