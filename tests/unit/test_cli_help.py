"""What `bwsk --help` says: every command in its panel on one line of 80 columns, every option explained."""

from __future__ import annotations

from importlib import import_module

import pytest
import typer

from bwsk.cli import GROUPS
from bwsk.cli.app import LOOK, MODELS, STEPS, VERSIONS, app

_LINE = 66  # what 80 columns leave beside the longest name and the frame


@pytest.fixture(scope="module")
def commands() -> dict:
    for group in GROUPS:
        import_module(f"bwsk.cli.{group}")
    return typer.main.get_command(app).commands


def test_the_panels_follow_the_flow(commands: dict) -> None:
    panels: dict[str, list[str]] = {}
    for name, command in commands.items():
        panels.setdefault(command.rich_help_panel, []).append(name)
    assert list(panels) == [MODELS, STEPS, VERSIONS, LOOK]
    assert panels[STEPS] == ["corpus", "tokenizer", "tokens", "base", "train", "evaluate", "results", "card", "check"]


def test_a_command_is_one_line_and_its_options_are_explained(commands: dict) -> None:
    for name, command in commands.items():
        assert 0 < len(command.help.split("\n\n")[0]) <= _LINE, name
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"
            assert "[" not in parameter.help, f"{name} {parameter.name}: rich takes brackets for markup"


def test_a_command_that_needs_arguments_has_an_example_that_parses(commands: dict) -> None:
    for name, command in commands.items():
        if any(parameter.required for parameter in command.params):
            words = (command.epilog or "").split()
            assert words[:3] == ["Example:", "bwsk", name], name
            command.make_context(name, words[3:])
