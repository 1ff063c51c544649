"""What starting costs: commands import what they need and no more."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bwsk
from bwsk.study.provenance import PACKAGE

HEAVY = {"torch", "transformers", "numpy", "datasets", "snakemake", "dvc", "pandas", "matplotlib"}


def imported(code: str) -> set[str]:
    """Top-level modules that a fresh Python has imported after `code`."""
    probe = f"{code}\nimport sys\nprint(' '.join(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["classify", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['bwsk', *{arguments!r}]\n"
        "from bwsk.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code"
    )
    assert not imported(code) & HEAVY


def test_what_the_snakefile_imports_is_light() -> None:
    assert not imported("import bwsk.study.params, bwsk.study.provenance, bwsk.errors") & (HEAVY - {"snakemake"})


def test_a_step_on_a_bare_gpu_machine_needs_no_validation_of_parameters() -> None:
    code = "import bwsk.study.train_step, bwsk.study.device, bwsk.study.perplexity, bwsk.reversible"
    found = imported(code)
    assert "torch" in found
    assert "pydantic" not in found


def test_the_library_knows_nothing_of_the_command_line() -> None:
    """Arrows go one way, and tables are printed by `bwsk.cli`; a progress bar is the one thing drawn below."""
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "cli" and path.name not in ("__main__.py", "progress.py"):
            assert not re.search(r"^\s*(from|import) (bwsk\.cli|typer|rich)\b", path.read_text(), re.MULTILINE), path


def test_a_locale_without_a_dash_is_no_reason_to_fail(study: Path) -> None:
    """What it cannot write, in a table of absent figures as in a name, is escaped."""
    for encoding in ("ascii", "latin-1"):
        command = [sys.executable, "-m", "bwsk", "show", str(study)]
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run(command, capture_output=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr.decode()
        assert b"\\u2014" in done.stdout


@pytest.mark.parametrize("moment", ["bwsk.cli.import_module", "typer.Typer.__call__"])
def test_ctrl_c_outside_of_a_command_is_a_status_and_no_traceback(moment: str) -> None:
    """Inside of a command typer answers it, or the training."""
    code = (
        "import sys\nsys.argv = ['bwsk', '--version']\nimport bwsk.cli, typer\n"
        "def pressed(*args, **kwargs):\n    raise KeyboardInterrupt\n"
        f"{moment} = pressed\nbwsk.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")


def test_every_public_name_is_there_and_editors_see_it() -> None:
    """The names are imported on first use, and once more for type checkers, which do not run `__getattr__`."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    typed = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {"__version__"} | (typed & set(bwsk.__all__)) == set(bwsk.__all__)
    assert all(getattr(bwsk, name) is not None for name in bwsk.__all__)
    assert (PACKAGE / "py.typed").is_file()
