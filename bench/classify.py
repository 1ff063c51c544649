"""Censuses of model families under both rule sets, as a table; and what `bwsk classify` and `bwsk trace` cost.

python bench/classify.py                 the table of docs/classification.md (Markdown)
python bench/classify.py --times         processes side by side: import and build alone, classify, trace
python bench/classify.py --json FILE     the same as JSON
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_BUILD = """
import sys, torch
from transformers import AutoConfig, T5ForConditionalGeneration, LlamaForCausalLM
config = AutoConfig.from_pretrained(sys.argv[1])
with torch.device("meta"):
    (T5ForConditionalGeneration if config.model_type == "t5" else LlamaForCausalLM)(config)
"""


def families() -> dict[str, Any]:
    """Configs of well-known models, from their classes' defaults and published sizes."""
    import transformers as t

    return {
        "T5-small": t.T5Config(
            d_model=512, d_ff=2048, num_layers=6, num_heads=8, vocab_size=32128, decoder_start_token_id=0
        ),
        "BERT-base": t.BertConfig(),
        "GPT-2 small": t.GPT2Config(),
        "GPT-NeoX 20B": t.GPTNeoXConfig(),
        "Llama 7B": t.LlamaConfig(),
        "ViT-B/16": t.ViTConfig(),
        "ResNet-50": t.ResNetConfig(),
        "ConvNeXt-T": t.ConvNextConfig(),
        "Mamba 130M": t.MambaConfig(hidden_size=768, num_hidden_layers=24),
        "Mixtral 8x7B": t.MixtralConfig(),
    }


def table() -> list[dict[str, Any]]:
    """One row per family: counts under both rule sets in training, and under the strict set in eval."""
    from bwsk.classification.census import classify

    rows = []
    for name, config in families().items():
        published, strict = classify(config), classify(config, "strict")
        evaluation = classify(config, "strict", training=False)
        rows.append({
            "family": name, "class": published.model, "modules": published.total,
            "published": [published.s, published.k, published.gray], "strict": [strict.s, strict.k, strict.gray],
            "strict_eval": [evaluation.s, evaluation.k, evaluation.gray], "outside": len(published.outside),
        })  # fmt: skip
    return rows


def times(repeats: int) -> list[dict[str, Any]]:
    """Wall seconds (median) and peak memory of whole processes, taken in turns."""
    configs = families()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("T5-small", "Llama 7B"):
            configs[name].save_pretrained(Path(folder, name))
        small, large = str(Path(folder, "T5-small")), str(Path(folder, "Llama 7B"))
        commands = {
            "import and build T5-small": [sys.executable, "-c", _BUILD, small],
            "bwsk classify T5-small": [sys.executable, "-m", "bwsk", "classify", small],
            "bwsk trace T5-small": [sys.executable, "-m", "bwsk", "trace", small],
            "bwsk classify Llama 7B": [sys.executable, "-m", "bwsk", "classify", large],
        }
        taken: dict[str, list[tuple[float, float, int]]] = {name: [] for name in commands}
        for _ in range(repeats):
            for name, command in commands.items():
                start = time.perf_counter()
                child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
                _, status, usage = os.wait4(child.pid, 0)
                child.returncode = os.waitstatus_to_exitcode(status)
                if child.returncode:
                    raise SystemExit(f"{name}: exit status {child.returncode}")
                taken[name].append((time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss))
    return [
        {
            "process": name,
            "wall_s": statistics.median(wall for wall, _, _ in runs),
            "cpu_s": statistics.median(cpu for _, cpu, _ in runs),
            "peak_mib": max(peak for _, _, peak in runs) / 1024,
        }
        for name, runs in taken.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", action="store_true", help="time whole processes instead")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = times(arguments.repeats) if arguments.times else table()
    if arguments.times:
        base = rows[0]["wall_s"]
        print("| process | wall s | of the first | CPU s | peak MiB |\n|---|---:|---:|---:|---:|")
        for row in rows:
            ratio = row["wall_s"] / base
            print(
                f"| {row['process']} | {row['wall_s']:.2f} | {ratio:.2f} | {row['cpu_s']:.2f} | {row['peak_mib']:.0f} |"
            )
    else:
        print("| family | class | leaves | published S / K / GRAY | | strict S / K / GRAY | | strict, eval |")
        print("|---|---|---:|---:|---:|---:|---:|---:|")
        for row in rows:
            cells = [
                f"{s} / {k} / {g} | {100 * s / row['modules']:.1f} %" for s, k, g in (row["published"], row["strict"])
            ]
            share = f"{100 * row['strict_eval'][0] / row['modules']:.1f} %"
            print(f"| {row['family']} | {row['class']} | {row['modules']} | {' | '.join(cells)} | {share} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
