"""Commands that publish a study: collect its results, write its model card, verify both, compare two of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bwsk.cli.app import app

Study = Annotated[Path, typer.Argument(help="A study: a directory with a params.yaml.", show_default=True)]
_HERE = Path()


@app.command()
def results(
    study: Study = _HERE,
    table: Annotated[Path | None, typer.Option(help="Also write the variants' figures as CSV to this file.")] = None,
) -> None:
    """Collect results/results.json, judge the published claims, and print the result table."""
    from bwsk.params import load_params
    from bwsk.results import collect, write_table

    collected = collect(load_params(study / "params.yaml"), study)
    if table is not None:
        write_table(collected, table)
    _print_results(collected)


@app.command()
def card(
    study: Study = _HERE,
    template: Annotated[Path | None, typer.Option(help="Template of the card; the workflow's if absent.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the card as one HTML page to this file.")] = None,
) -> None:
    """Write the model card results/README.md and its figures from results/results.json."""
    from bwsk import card as cards
    from bwsk.files import write_text
    from bwsk.layout import TEMPLATE
    from bwsk.params import load_params
    from bwsk.results import read_results
    from bwsk.staleness import current_results, current_training

    params = load_params(study / "params.yaml")
    collected = current_results(params, study, read_results(study))
    trainings = {name: current_training(params, study, name, None) for name in params.variant_names}
    path = cards.write_card(params, collected, trainings, study, template or TEMPLATE)
    if html is not None:
        write_text(html, cards.html(path))
    print(f"model card: {path}")


@app.command()
def check(
    study: Study = _HERE,
    template: Annotated[Path | None, typer.Option(help="Template of the card; the workflow's if absent.")] = None,
) -> None:
    """Verify a finished model repository: layout, loading and generating, JSON, card, hashes; nothing is fetched."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from bwsk import check as checks
    from bwsk.layout import TEMPLATE
    from bwsk.params import load_params

    done = checks.verify(load_params(study / "params.yaml"), study, template or TEMPLATE)
    checks.write_checks(done, study)
    shown = Table("check", "where", "found", header_style="bold", box=SIMPLE_HEAD)
    for one in done:
        shown.add_row(one.what, one.where, one.found)
    _console().print(shown)
    print(f"{len(done)} checks passed")


@app.command()
def show(study: Study = _HERE) -> None:
    """Print a study's result table, the verdicts on the published claims, and where the model card is."""
    from bwsk.results import read_results

    _print_results(read_results(study))
    path = study / "results" / "README.md"
    print(f"model card: {path}" if path.is_file() else f"model card: not written yet; run: bwsk card {study}")


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="A study directory, a results.json or a git revision.")],
    b: Annotated[str, typer.Argument(help="What to compare it with.")],
    study: Annotated[Path, typer.Option(help="The study whose results a revision stands for.")] = _HERE,
) -> None:
    """Table of what differs between two studies or two revisions: parameters, figures, verdicts, weights."""
    from bwsk.compare import changes, load_side, table

    found = changes(load_side(a, study), load_side(b, study))
    if found:
        _console().print(table(found, a, b))
    else:
        print(f"{a} and {b}: no difference in parameters, figures, verdicts or weights")


def _print_results(collected: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from bwsk.card import number, percent

    console = _console()
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
    console.print(shown)
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


def _console() -> Any:
    """Standard output; in a log, where rich would assume 80 columns, wide enough for the tables."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=130)
