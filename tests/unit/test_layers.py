"""The rooms of the package, and which way the arrows between them go: cli, study, the library, the root."""

from __future__ import annotations

import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from bwsk.study.provenance import PACKAGE
from bwsk.study.source_digest import Source

# A file may import what stands in its own layer or below. The library is three rooms.
LAYERS = {"cli": 3, "study": 2, "classification": 1, "reversible": 1, "memory": 1, "": 0}
LIBRARY = {room for room, layer in LAYERS.items() if layer == 1}
# Where one room of the library imports another. A plan is made of a step measured on fake tensors, and the prediction
# of a reversible step installs the plan, so that these two rooms know each other in this one file.
BETWEEN = {
    "memory/prediction.py": {"reversible"},
    "reversible": {"memory"},
    "reversible/plan_row.py": {"classification"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(code: str) -> set[Path]:
    """The files that running all of `code` imports, but for the packages that only name a room."""
    return {path for path in Source(PACKAGE).imported(code) if path.name != "__init__.py"}


def room(path: Path) -> str:
    """The folder of the package that a file stands in, "" for its root."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def test_nothing_imports_what_stands_above_it() -> None:
    """But the package's two doors, which stand where Python looks for them."""
    doors = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}
    upwards = [
        f"{path.relative_to(PACKAGE)} -> {other.relative_to(PACKAGE)}"
        for path in FILES
        if path not in doors
        for other in imported(path.read_text(encoding="utf-8"))
        if LAYERS[room(other)] > LAYERS[room(path)]
    ]
    assert not upwards


def test_the_rooms_of_the_library_know_each_other_where_they_must() -> None:
    found = {
        (path.relative_to(PACKAGE).as_posix(), room(other))
        for path in FILES
        if room(path) in LIBRARY
        for other in imported(path.read_text(encoding="utf-8"))
        if room(other) in LIBRARY - {room(path)}
    }
    strays = {
        (path, other)
        for path, other in found
        if other not in BETWEEN.get(path, set()) | BETWEEN.get(path.partition("/")[0], set())
    }
    assert not strays


def test_there_are_no_circles() -> None:
    graph = {path: imported(path.read_text(encoding="utf-8")) - {path} for path in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(path.relative_to(PACKAGE).as_posix() for path in error.args[1]))


def test_the_root_is_short() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 10


def test_the_library_needs_torch_and_transformers_alone() -> None:
    """With the packages of the study and of the command line out of reach, the public functions are there."""
    absent = ("snakemake", "dvc", "datasets", "pandas", "pyarrow", "jinja2", "matplotlib", "pydantic", "typer", "rich")
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\nimport bwsk\n"
        "from transformers import T5Config, T5ForConditionalGeneration\n"
        "config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=16,"
        " decoder_start_token_id=0)\n"
        "model = T5ForConditionalGeneration(config).train()\n"
        "bwsk.classify(model), bwsk.trace(config, batch=1, input_length=4, target_length=4)\n"
        "bwsk.predict_memory(model, batch=1, input_length=4), bwsk.make_reversible(model)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
