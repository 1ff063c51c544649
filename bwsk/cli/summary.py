"""The summary of a study that `bwsk results` and `bwsk show` print."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from bwsk.cli.output import console, numbers, say, table
from bwsk.study import publication
from bwsk.study.evidence import devices, evidence, verdicts
from bwsk.study.formats import ABSENT, compact, number, spread


def print_results(collected: dict[str, Any]) -> None:
    """Print which published claims hold and on what evidence, then the result table with notes for its context."""
    out = console()
    _print_claims(out, collected)
    shown = table()
    shown.add_column("variant", no_wrap=True, vertical="bottom")
    numbers(shown, "val\nppl", "test\nppl", "bits/\nbyte", "peak\nMiB", "step ms\n(quartiles)")
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
            number(evaluation["validation"]["published_perplexity"]),
            number(evaluation["test"]["published_perplexity"]),
            number(evaluation["test"]["bits_per_byte"], 3),
            memory,
            spread(*(figures[f"step_time_{point}ms"] for point in ("q1_", "", "q3_"))),
        )
    out.print("", shown, "")
    if any(figures["peak_memory_mb"] is None for figures in collected["variants"].values()):
        say(out, "~ predicted, not measured: the peak of a training step on a CUDA device")
    unigram = collected["tokens"]["splits"]["test"]["unigram_perplexity"]
    say(out, f"A unigram model of the training text has a test perplexity of {number(unigram, 1)} per token.")
    say(
        out,
        f"All figures are of one run per variant on {devices(collected)}; other processors give others.",
    )


def _print_claims(out: Console, collected: dict[str, Any]) -> None:
    """A line per topic with its values (fine-tuned / from scratch), followed by the verdicts and their evidence."""
    title = f"{collected['study']['title']}: {collected['base']['name']} on {collected['corpus']['name']}"
    out.print(f"[bold]{escape(title)}[/bold]")
    say(out, f"Claims of {publication.REPOSITORY}: {verdicts(collected)}.")
    # Why the study as a whole is not comparable; reasons for a single topic are in its line.
    if not collected["comparable"]:
        reason = next(claim["reason"] for claim in collected["claims"] if claim["verdict"] == "not comparable")
        say(out, f"{reason[0].upper()}{reason[1:]}.")
    out.print()
    for row in evidence(collected):
        out.print(f"[bold]{escape(row.claim)}[/bold]: published {row.published}, here {escape(row.ours)}")
        out.print(Padding(f"{row.verdict}: {escape(row.basis)}", (0, 0, 0, 4), expand=False))
