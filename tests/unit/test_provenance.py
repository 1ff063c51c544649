"""Identities: a step reruns when what it reads changes, and only then."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from bwsk.cli import GROUPS
from bwsk.cli.app import app
from bwsk.study import provenance
from bwsk.study.params import Params, load_params
from bwsk.study.provenance import STEPS, identity, imported, source_digest, source_files, versions

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


def test_source_files_follow_imports_wherever_they_stand() -> None:
    names = {path.relative_to(provenance.PACKAGE).as_posix() for path in source_files("study.tokens")}
    assert {"study/tokens.py", "study/corpus.py", "study/tokenizer.py", "study/hub.py", "study/params.py"} <= names
    assert {"files.py", "errors.py"} <= names
    assert "study/progress.py" in names  # imported inside a function
    assert not {"study/base_checkpoint.py", "study/train.py", "cli/data.py"} & names
    assert "base_checkpoint.py" in {path.name for path in source_files("study.base_checkpoint")}


def test_all_that_a_command_imports_is_source_of_its_step() -> None:
    """A module that was forgotten could be changed, and what the step made with it would be kept."""
    for group in GROUPS:
        import_module(f"bwsk.cli.{group}")
    commands = {command.callback.__name__: command.callback for command in app.registered_commands}
    for step, modules in {**{name: modules for name, (modules, _) in STEPS.items()}, "train": ["study.train"]}.items():
        called = {path for path in imported(inspect.getsource(commands[step])) if path.parent.name != "cli"}
        missed = {path.stem for path in called - set(source_files(*modules))}
        # The workflow has no figure of classify; what memory knows is the advice when training runs out of it.
        assert missed == {"classify": {"plots"}, "train": {"prediction"}}.get(step, set()), step


def test_the_digest_follows_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "bwsk"
    shutil.copytree(provenance.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))

    def digest(module: str) -> str:
        source_digest.cache_clear()
        return source_digest(module)

    monkeypatch.setattr(provenance, "PACKAGE", copy)
    tokens, corpus = digest("study.tokens"), digest("study.corpus")
    with open(copy / "study/tokens.py", "a", encoding="utf-8") as file:
        file.write("# a remark\n")
    assert digest("study.tokens") != tokens
    assert digest("study.corpus") == corpus
    with open(copy / "errors.py", "a", encoding="utf-8") as file:
        file.write("# a remark\n")
    assert digest("study.corpus") != corpus
    monkeypatch.undo()
    assert digest("study.tokens") == tokens


def test_the_digest_is_the_same_in_every_process() -> None:
    code = "from bwsk.study.provenance import source_digest; print(source_digest('study.base_checkpoint'))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    source_digest.cache_clear()
    assert result.stdout.strip() == source_digest("study.base_checkpoint")


def test_versions_name_what_decides_numbers() -> None:
    import torch

    found = versions()
    assert found["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
