"""The published study's training on one machine, in calls of a few minutes: `python bench/gpu_study.py OUT --data DIR`.

Without Snakemake, DVC or the Hub: it calls the functions that the workflow's commands call. DIR holds
{train,validation,test}.txt and, in --tokenizer (default DIR/tokenizer), a saved tokenizer or a bare `spiece.model`.
Only the variants that start from scratch: the base is T5-small's configuration with random weights.

A call trains until --minutes are over, writes a checkpoint and exits with status 75: call it again, it goes on where it
stopped, with the same bits as if it had not stopped. Status 0: all variants are there. OUT/study.json, written as each
variant is done, names its measured training and validation time, step time, peak memory and perplexities.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    import pydantic  # noqa: F401
    import yaml
except ImportError as error:
    raise SystemExit(f"bench/gpu_study: {error.name} is missing; carry its wheel (see bench/gpu-study.sh)") from None

from bench.rivals import T5_SMALL, release
from bench.run import machine
from bwsk.errors import BwskError
from bwsk.files import read_json, write_json

AGAIN = 75  # EX_TEMPFAIL of sysexits.h
ROOT = Path(__file__).resolve().parent.parent


def write_study(out: Path, args: argparse.Namespace) -> Any:
    """OUT/params.yaml: the published study's parameters with local inputs; the same file again on later calls."""
    from bwsk.study.params import load_params

    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    tokenizer = args.tokenizer or args.data / "tokenizer"
    content |= {
        "corpus": {"source": "directory", "path": str(args.data.resolve())},
        "tokenizer": {"source": "directory", "path": str(tokenizer.resolve())},
        "base": {"source": "directory", "path": str((out / "random").resolve()), "id": "T5-small's configuration"},
        "variants": {"inits": ["scratch"], "modes": args.modes},
    }
    content["train"] |= {"backend": args.backend, "precision": args.precision, "threads": args.threads}
    # A call writes one at its end anyway, and each takes longer than 500 steps on a fast GPU.
    content["train"]["checkpoint_every"] = 5000
    for change in args.set:
        key, _, value = change.partition("=")
        section, _, name = key.partition(".")
        content[section] = {**content.get(section, {}), name: yaml.safe_load(value)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return load_params(out / "params.yaml")


def prepare(params: Any, out: Path, architecture: dict[str, Any]) -> Any:
    """Corpus, tokenizer, tokens, base and census; what is there already is kept. Returns what training reads."""
    from bwsk.classification.census import classify
    from bwsk.study.base_checkpoint import make_base_checkpoint
    from bwsk.study.corpus import make_corpus
    from bwsk.study.tokenizer import make_tokenizer
    from bwsk.study.tokens import make_tokens
    from bwsk.study.train_inputs import TrainInputs

    build = out / "build"
    if not (build / "tokens" / "tokens.json").is_file():
        make_corpus(params, build / "corpus")
        make_tokenizer(params, build / "corpus", build / "tokenizer")
        make_tokens(params, build / "corpus", build / "tokenizer", build / "tokens")
    census = build / "analysis" / "census.json"
    if not census.is_file():
        import torch
        from transformers import T5Config, T5ForConditionalGeneration

        torch.manual_seed(params.seed)
        model = T5ForConditionalGeneration(T5Config(**architecture))
        model.save_pretrained(out / "random")
        make_base_checkpoint(params, build / "tokenizer", build / "tokens", build / "base")
        write_json(census, classify(model.train(), "published").beside(classify(model, "strict")))
    return TrainInputs(build / "tokens", build / "tokenizer", build / "base", census)


def train(params: Any, out: Path, inputs: Any, device: Any, done: Callable[[], None]) -> None:
    """Train what is missing, variant by variant; raises `Interrupted` when the time is over. `done`: after each."""
    for variant in params.variant_names:
        if not _results(out, variant).is_file():
            _train(params, variant, out, inputs, device)
            release(device.type)
            done()
            _say(f"{variant}: done")


def _train(params: Any, variant: str, out: Path, inputs: Any, device: Any) -> None:
    from bwsk.study.train import Run

    run = Run(params, variant, inputs, out / "build" / "checkpoints" / variant, device, say=_say)
    run.run()
    run.finish(out / "results" / variant, out / "build" / "curves" / variant)


def _results(out: Path, variant: str) -> Path:
    return out / "results" / variant / "training_results.json"


def summary(params: Any, out: Path, device: Any) -> dict[str, Any]:
    """The measured figures of the variants that are done, from their results."""
    keys = ("total_steps", "early_stopped", "training_time_s", "validation_time_s", "step_time_ms", "tokens_per_s")
    keys += ("peak_memory_mb", "best_val_metric", "test_metric", "nan_count", "skipped_steps")
    files = {variant: _results(out, variant) for variant in params.variant_names}
    found = {variant: read_json(file) for variant, file in files.items() if file.is_file()}
    return {
        "command": " ".join(["python", "bench/gpu_study.py", *sys.argv[1:]]),
        "machine": machine(device.type),
        "params": params.model_dump(),
        "missing": [variant for variant in files if variant not in found],
        "variants": {v: {key: results[key] for key in keys} for v, results in found.items()},
        "weights_sha256": {v: results["provenance"]["weights_sha256"] for v, results in found.items()},
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """One call."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call, start-up included")
    parser.add_argument("--modes", nargs="+", default=["conventional", "bwsk-analyzed", "bwsk-reversible"])
    parser.add_argument("--backend", choices=("eager", "graph", "compile"), default="graph")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp16")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU (--backend eager --precision fp32)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--architecture", default="{}", help="JSON of T5 configuration keys that differ from T5-small's"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="other parameters, for trials"
    )
    args = parser.parse_args()
    try:
        from bwsk.study.device import pick_device
        from bwsk.study.signals import Interrupted

        params = write_study(args.out, args)
        device = pick_device(0 if args.cpu else 1)
        if device.type == "cpu" and not args.cpu:
            raise BwskError("bench/gpu_study: no CUDA device; --cpu trains on the CPU")
        inputs = prepare(params, args.out, T5_SMALL | json.loads(args.architecture))

        def write() -> None:
            write_json(args.out / "study.json", summary(params, args.out, device))

        # The loop stops at a signal as a cluster's would stop it: checkpoint written, nothing lost.
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(AGAIN))  # between the variants' loops
        signal.setitimer(signal.ITIMER_REAL, max(1.0, 60.0 * args.minutes - (time.monotonic() - started)))
        try:
            train(params, args.out, inputs, device, write)
        except Interrupted as stopped:
            _say(f"{stopped}; call again to go on")
            sys.exit(AGAIN)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except BwskError as error:
        raise SystemExit(f"bench/gpu_study: error: {error}") from None
    write()
    print(f"wrote {args.out / 'study.json'}")


if __name__ == "__main__":
    main()
