"""How commands print: one console, one kind of table."""

from __future__ import annotations

import sys
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

_LOG_WIDTH = 160  # columns in a log, where rich would assume 80


def console() -> Console:
    """Standard output, as wide as the terminal (also through a pager), or wide enough for every table in a log."""
    found = Console(highlight=False)
    return found if found.is_terminal or sys.stderr.isatty() else Console(highlight=False, width=_LOG_WIDTH)


def table(*headings: str, title: str | None = None, show_header: bool = True) -> Table:
    """An empty table with a rule below its headings, two spaces between columns and no other lines."""
    return Table(
        *headings, title=title, title_justify="left", title_style="bold", header_style="bold", show_header=show_header,
        box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip


def numbers(shown: Table, *headings: str) -> None:
    """Add right-aligned columns that never wrap; aligned at the bottom if a heading has two lines."""
    vertical: Literal["bottom", "top"] = "bottom" if any("\n" in heading for heading in headings) else "top"
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True, vertical=vertical)


def say(out: Console, text: str) -> None:
    """Print a line of prose, wrapped between words on a terminal and not wrapped in a log."""
    out.print(text, markup=False, soft_wrap=not out.is_terminal)
