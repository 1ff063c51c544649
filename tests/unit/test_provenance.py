"""Identities: a step reruns when what it reads changes, and only then."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from bwsk.cli import GROUPS
from bwsk.cli.app import app
from bwsk.study.params import Params, load_params
from bwsk.study.provenance import PACKAGE, STEPS, identity, source_digest, source_files, versions
from bwsk.study.source_digest import Source

DEMO = Path(__file__).parents[2] / "demo" / "params.yaml"
VARIANTS = [
    f"{init}-{mode}"
    for init in ("finetune", "scratch")
    for mode in ("conventional", "bwsk-analyzed", "bwsk-reversible")
]


def changed(**sections: dict[str, Any] | int) -> Params:
    values = load_params(DEMO).model_dump()
    for name, value in sections.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    return Params.model_validate(values)


def touched(params: Params) -> set[str]:
    """The steps and variants whose parameters differ from the demo's."""
    before = load_params(DEMO)
    steps = {step for step in STEPS if identity(before, step)["params"] != identity(params, step)["params"]}
    return steps | {
        variant
        for variant in VARIANTS
        if identity(before, "train", variant)["params"] != identity(params, "train", variant)["params"]
    }


def test_a_base_that_is_not_pretrained_here_does_not_read_the_seed() -> None:
    base = {"source": "directory", "path": "model", "id": None}
    values = {**load_params(DEMO).model_dump(), "base": base}
    one, other = (identity(Params.model_validate({**values, "seed": seed}), "base") for seed in (1, 2))
    assert one == other


def test_nothing_is_touched_by_nothing() -> None:
    assert touched(changed()) == set()
    assert identity(changed(), "tokens") == identity(load_params(DEMO), "tokens")


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"corpus": {"source": "embedded"}}, set()),
        ({"tokenizer": {"vocab_size": 900}}, {"tokenizer"}),
        ({"tokens": {"stride": 16}}, {"tokens", "evaluate", *VARIANTS}),
        ({"base": {"steps": 7}}, {"base"}),
        ({"study": {"title": "Other"}}, {"results", "card", "check"}),
        ({"variants": {"inits": ["scratch"], "modes": ["conventional"]}}, None),
        ({"train": {"lr_finetune": 0.5}}, {variant for variant in VARIANTS if variant.startswith("finetune")}),
        ({"train": {"lr_scratch": 0.5}}, {variant for variant in VARIANTS if variant.startswith("scratch")}),
        ({"train": {"budget": "max"}}, {variant for variant in VARIANTS if variant.endswith("reversible")}),
        ({"train": {"weight_decay": 0.5}}, set(VARIANTS)),
        ({"train": {"threads": 2}}, {"base", *VARIANTS}),
        ({"seed": 1}, {"base", *VARIANTS}),
    ],
)
def test_a_change_touches_what_reads_it(params: dict[str, Any], expected: set[str] | None) -> None:
    if expected is None:
        before = load_params(DEMO)
        after = changed(**params)
        assert identity(before, "train", "scratch-conventional") == identity(after, "train", "scratch-conventional")
        assert identity(before, "results") != identity(after, "results")
        return
    assert touched(changed(**params)) == expected


def test_every_parameter_belongs_to_some_step() -> None:
    """A parameter that no identity holds could be changed without anything being computed again."""
    params = load_params(DEMO)
    seen: set[str] = set()
    for step in STEPS:
        seen |= set(identity(params, step)["params"])
    for variant in VARIANTS:
        seen |= set(identity(params, "train", variant)["params"])
    assert set(Params.model_fields) <= seen
    train = {key for variant in VARIANTS for key in identity(params, "train", variant)["params"]["train"]}
    assert set(params.train.model_dump()) - {"lr_finetune", "lr_scratch"} <= train


def names(step: str) -> set[str]:
    return {path.relative_to(PACKAGE).as_posix() for path in source_files(step)}


def test_source_files_follow_imports_wherever_they_stand() -> None:
    assert {"study/tokens.py", "study/corpus.py", "study/tokenizer.py", "study/hub.py", "study/params.py"} <= names(
        "tokens"
    )
    assert {"files.py", "errors.py"} <= names("tokens")
    assert not {"study/base_checkpoint.py", "study/train.py", "cli/data.py"} & names("tokens")
    assert "architecture.py" in names("classify")  # imported inside a function
    assert "memory/__init__.py" in names("train-conventional")  # of the package that memory.available is in


def test_a_variant_has_the_source_of_its_mode_alone() -> None:
    # What a budget may be is read by all, and float16 is kept out of one layer of T5 in every mode.
    shared = {"reversible/budget.py", "reversible/t5/float16.py"}
    found = {
        mode: {name for name in names(f"train-{mode}") if not name.endswith("__init__.py")} - shared
        for mode in ("conventional", "bwsk-analyzed", "bwsk-reversible")
    }
    rooms = {mode: {name.split("/")[0] for name in files} for mode, files in found.items()}
    assert not {"classification", "reversible"} & rooms["conventional"]
    assert "reversible" not in rooms["bwsk-analyzed"]
    assert "reversible" in rooms["bwsk-reversible"]
    assert not {name for name in names("train-bwsk-reversible") if name.startswith("classification/rules/")}
    assert {step for step in STEPS if "classification/erasure.py" in names(step)} == {"train-bwsk-analyzed"}
    others = {name for name in names("memory-conventional") if name.startswith(("reversible", "classification"))}
    assert not {name for name in others if not name.endswith("__init__.py")}


def test_all_that_a_command_imports_is_source_of_its_step() -> None:
    """A module that was forgotten could be changed, and what the step made with it would be kept."""
    for group in GROUPS:
        import_module(f"bwsk.cli.{group}")
    commands = {command.callback.__name__: command.callback for command in app.registered_commands}
    for step in STEPS:
        command = step.split("-")[0]
        called = Source(PACKAGE).imported(inspect.getsource(commands[command]))
        called = {path for path in called if path.parent.name != "cli" and path.name != "__init__.py"}
        missed = {path.stem for path in called - set(source_files(step))}
        # The workflow has no figure of classify and asks of no size whether it fits; what memory knows is the advice
        # when training runs out of it.
        unused = {"classify": {"plots"}, "memory": {"budget"}, "train": {"out_of_memory"}}
        assert missed <= unused.get(command, set()), step


def test_digests_are_the_same_in_every_process_and_written_for_dvc(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bwsk", "source", "--out", str(tmp_path / "source")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == [f"{source_digest(step)}  {step}" for step in STEPS]
    assert {path.name: path.read_text() for path in (tmp_path / "source").iterdir()} == {
        step: f"{source_digest(step)}\n" for step in STEPS
    }


def test_versions_name_what_decides_numbers() -> None:
    import torch

    found = versions()
    # The package says only sometimes which build it is (2.13.0 or 2.13.0+cpu), the library always (2.13.0+cu130).
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
