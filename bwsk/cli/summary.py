"""What `bwsk results` and `bwsk show` print of a study."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bwsk.card import number, percent


def print_results(collected: dict[str, Any]) -> None:
    """Print the result table, and below it what puts it into proportion."""
    title = f"{collected['study']['title']}: {collected['base']['name']} on {collected['corpus']['name']}"
    shown = Table(title=escape(title), title_justify="left", title_style="bold", header_style="bold", box=SIMPLE_HEAD)
    shown.add_column("variant", no_wrap=True)
    for name in ("loss", "val ppl", "test ppl", "bits/byte", "peak memory", "step", "epochs"):
        shown.add_column(name, justify="right")
    previous = None
    for name, figures in collected["variants"].items():
        if previous not in (None, figures["init"]):
            shown.add_section()
        previous = figures["init"]
        evaluation = figures["evaluation"]
        peak, predicted = figures["peak_memory_mb"], figures["predicted_peak_memory_mb"]
        memory = f"{number(peak, 0)} MiB" if peak else f"~{number(predicted, 0)} MiB" if predicted else "—"
        shown.add_row(
            name,
            number(figures["final_train_loss"], 3),
            number(evaluation["validation"]["published_perplexity"]),
            number(evaluation["test"]["published_perplexity"]),
            number(evaluation["test"]["bits_per_byte"], 3),
            memory,
            f"{number(figures['step_time_ms'], 1)} ms",
            str(figures["epochs_completed"]),
        )
    console().print(shown)
    for init, saving in collected["memory_saving"].items():
        for kind, share in saving.items():
            if share is not None:
                print(f"memory saved by bwsk-reversible, {init}: {percent(share)} ({kind})")
    census, unigram = collected["census"], collected["tokens"]["splits"]["test"]["unigram_perplexity"]
    print(f"S/K census: {census['s']} S, {census['k']} K of {census['total']} leaf modules")
    print(f"for scale: a unigram model of the training text has a test perplexity of {number(unigram, 1)} per token")
    verdicts = [claim["verdict"] for claim in collected["claims"]]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    reason = next((claim["reason"] for claim in collected["claims"] if claim["verdict"] == "not comparable"), None)
    print(f"published claims: {counts}{f' ({reason})' if reason else ''}")


def console() -> Console:
    """Standard output; in a log, where rich would assume 80 columns, wide enough for the tables."""
    found = Console()
    return found if found.is_terminal else Console(width=130)
