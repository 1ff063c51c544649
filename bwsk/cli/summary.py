"""What `bwsk results` and `bwsk show` print of a study."""

from __future__ import annotations

from typing import Any

from rich.markup import escape

from bwsk.cli.output import console, numbers, say, table
from bwsk.study.formats import ABSENT, compact, number, percent


def print_results(collected: dict[str, Any]) -> None:
    """Print the result table, and below it what puts it into proportion."""
    title = f"{collected['study']['title']}: {collected['base']['name']} on {collected['corpus']['name']}"
    shown = table(title=escape(title))
    shown.add_column("variant", no_wrap=True, vertical="bottom")
    numbers(shown, "loss", "val\nppl", "test\nppl", "bits/\nbyte", "peak\nMiB", "step\nms", "epochs")
    previous = None
    for name, figures in collected["variants"].items():
        if previous not in (None, figures["init"]):
            shown.add_section()
        previous = figures["init"]
        evaluation = figures["evaluation"]
        peak, predicted = figures["peak_memory_mb"], figures["predicted_peak_memory_mb"]
        memory = compact(peak) if peak else f"~{compact(predicted)}" if predicted else ABSENT
        shown.add_row(
            name,
            number(figures["final_train_loss"], 3),
            number(evaluation["validation"]["published_perplexity"]),
            number(evaluation["test"]["published_perplexity"]),
            number(evaluation["test"]["bits_per_byte"], 3),
            memory,
            compact(figures["step_time_ms"]),
            str(figures["epochs_completed"]),
        )
    out = console()
    out.print(shown, "")
    if any(figures["peak_memory_mb"] is None for figures in collected["variants"].values()):
        say(out, "~: predicted, not measured; the peak of a training step in CUDA's accounting")
    for init, saving in collected["memory_saving"].items():
        for kind, share in saving.items():
            if share is not None:
                say(out, f"memory saved by bwsk-reversible, {init}: {percent(share)} ({kind})")
    census, unigram = collected["census"], collected["tokens"]["splits"]["test"]["unigram_perplexity"]
    say(out, f"S/K census: {census['s']} S, {census['k']} K of {census['total']} leaf modules")
    say(out, f"for scale: a unigram model of the training text has a test perplexity of {number(unigram, 1)} per token")
    verdicts = [claim["verdict"] for claim in collected["claims"]]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    reason = next((claim["reason"] for claim in collected["claims"] if claim["verdict"] == "not comparable"), None)
    say(out, f"published claims: {counts}{f' ({reason})' if reason else ''}")
