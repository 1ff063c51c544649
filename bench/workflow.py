"""What surrounds the training, start-up of commands and jobs, tokenisation: `python bench/workflow.py OUT [--data D]`.

Each command is run whole, as a user runs it, --rounds times; wall time, median and range. With --data, a folder with
wikitext-2-v1/{train,validation,test}.txt and t5-tokenizer/spiece.model, the corpus is tokenised too. Writes
OUT/workflow.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.run import ROOT, load_average, machine


def commands(folder: Path, data: Path | None) -> list[tuple[str, list[str], float]]:
    """(what, command, the most seconds that it should take); `folder` is an empty place for studies."""
    corpus = "build/corpus/corpus.json"
    model = str(ROOT / "bench" / "demo-t5.json")
    embedded = folder / "embedded"
    embedded.mkdir()
    shutil.copy(ROOT / "demo" / "params.yaml", embedded)
    snakemake = ["snakemake", "--snakefile", str(ROOT / "Snakefile"), "--quiet", "--directory"]
    found = [
        ("bwsk --help", ["bwsk", "--help"], 0.4),
        ("bwsk classify of a small T5", ["bwsk", "classify", model], 8.0),
        ("snakemake -n, the published study", [*snakemake, str(ROOT), "-n"], 4.0),
        ("Snakemake with one job (corpus)", [*snakemake, str(embedded), "--cores", "1", "--force", corpus], 8.0),
    ]
    if data is not None:
        study = folder / "wikitext"
        study.mkdir()
        params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        params["corpus"] = {"source": "directory", "path": str((data / "wikitext-2-v1").resolve())}
        params["tokenizer"] = {"source": "directory", "path": str((data / "t5-tokenizer").resolve())}
        (study / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
        for step in ("corpus", "tokenizer"):
            run(["bwsk", step], study)
        found.append(("bwsk tokens, WikiText-2", ["bwsk", "tokens"], 20.0))
    return found


def run(command: list[str], where: Path) -> float:
    """Seconds of a command run to its end; SystemExit with its output if it fails."""
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=where, env={**os.environ, "PATH": programs}, capture_output=True, text=True, check=False
    )
    elapsed = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"bench/workflow: {' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return elapsed


def measure(rounds: int, data: Path | None) -> list[dict[str, Any]]:
    """A row per command; one untimed run first, rounds in turns."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        listed = commands(Path(place), data)
        times: dict[str, list[float]] = {what: [] for what, _, _ in listed}
        for index in range(rounds + 1):
            for what, command, _ in listed:
                where = Path(place) / ("wikitext" if command[1] == "tokens" else "embedded")
                elapsed = run(command, where)
                if index:
                    times[what].append(elapsed)
        for what, _, limit in listed:
            found = sorted(times[what])
            median = statistics.median(found)
            rows.append({"command": what, "median_s": median, "min_s": found[0], "max_s": found[-1], "goal_s": limit})
            print(f"{what:36} {median:8.2f} s ({found[0]:.2f} to {found[-1]:.2f}), goal {limit:g} s")
    return rows


def main() -> None:
    """Parse arguments, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory for the JSON")
    parser.add_argument("--data", type=Path, help="folder with WikiText-2 and T5's vocabulary")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    load = load_average()
    result = {
        "command": " ".join(["python", "bench/workflow.py", *sys.argv[1:]]),
        "machine": machine("cpu"),
        "rows": measure(args.rounds, args.data),
        "load_average": {"before": load, "after": load_average()},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "workflow.json"
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
