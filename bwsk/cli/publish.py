"""Commands that publish a study: collect its results, write its model card, verify both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bwsk.cli.app import STEPS, app
from bwsk.cli.options import Study

_HERE = Path()


@app.command(rich_help_panel=STEPS)
def results(
    study: Study = _HERE,
    table: Annotated[Path | None, typer.Option(help="Also write the table of results as CSV to this file.")] = None,
) -> None:
    """Collect results/results.json and judge the published claims.

    Also prints the table of results.
    """
    from bwsk.cli.summary import print_results
    from bwsk.study.params import load_params
    from bwsk.study.results import collect, write_table

    collected = collect(load_params(study / "params.yaml"), study)
    if table is not None:
        write_table(collected, table)
    print_results(collected)


@app.command(rich_help_panel=STEPS)
def card(
    study: Study = _HERE,
    template: Annotated[Path | None, typer.Option(help="Template of the card; by default the workflow's.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the card as one HTML page to this file.")] = None,
) -> None:
    """Write the model card results/README.md and its figures."""
    from bwsk.files import write_text
    from bwsk.study import card as cards
    from bwsk.study.params import load_params
    from bwsk.study.repository import TEMPLATE
    from bwsk.study.results import read_results
    from bwsk.study.staleness import current_results, current_training

    params = load_params(study / "params.yaml")
    collected = current_results(params, study, read_results(study))
    trainings = {name: current_training(params, study, name, None) for name in params.variant_names}
    path = cards.write_card(params, collected, trainings, study, template or TEMPLATE)
    if html is not None:
        write_text(html, cards.html(path))
    print(f"model card: {path}")


@app.command(rich_help_panel=STEPS)
def check(
    study: Study = _HERE,
    template: Annotated[Path | None, typer.Option(help="Template of the card; by default the workflow's.")] = None,
) -> None:
    """Verify a finished model repository.

    Checks the layout, loading and generation, JSON, the card and hashes. Fetches nothing.
    """
    from bwsk.cli.output import console, table
    from bwsk.study import check as checks
    from bwsk.study.params import load_params
    from bwsk.study.repository import TEMPLATE

    done = checks.verify(load_params(study / "params.yaml"), study, template or TEMPLATE)
    checks.write_checks(done, study)
    shown = table("check")
    for heading in ("where", "found"):
        shown.add_column(heading, overflow="fold")
    for one in done:
        shown.add_row(one.what, one.where, one.found)
    console().print(shown, "")
    print(f"{len(done)} checks passed")
