"""No step runs code that its digest does not count: the commands of the workflow, really run, and what they import."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bwsk.study.provenance import PACKAGE, STEPS, UNCOUNTED, source_files
from tests.workflow.dvc_study import PROJECT, SMALLER, environment, set_params

# Runs the commands given as JSON one after the other, each in a process of its own: forked, for the libraries take
# seconds to import. Every import statement that runs asks `__import__`, also for what is loaded already.
RUN = """\
import builtins, json, os, sys
import torch, transformers

def run(command, seen):
    ask = builtins.__import__
    def asked(name, globals=None, locals=None, fromlist=(), level=0):
        if name.partition(".")[0] == "bwsk":
            names = [name, *(f"{name}.{one}" for one in fromlist or ())]
            seen.update(((globals or {}).get("__name__", ""), one) for one in names)
        return ask(name, globals, locals, fromlist, level)
    builtins.__import__ = asked
    from bwsk.cli import main
    sys.argv = ["bwsk", *command]
    main()

for command in json.load(sys.stdin):
    if (child := os.fork()) == 0:
        seen, status = set(), 1
        try:
            run(command, seen)
            status = 0
        except SystemExit as exit:
            status = exit.code or 0
        finally:
            print(json.dumps([command, sorted(seen)]), file=sys.__stderr__, flush=True)
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"failed: {command}")
"""


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[tuple[str, str]]]:
    """Step -> (importing module, imported module or name in it) of each import of bwsk that ran in it."""
    study = tmp_path_factory.mktemp("source") / "study"
    study.mkdir()
    shutil.copy(PROJECT / "demo" / "params.yaml", study)
    set_params(study / "params.yaml", {**SMALLER, "variants.inits": ["scratch"], "train.budget": "max"})
    snakemake = ["snakemake", "--snakefile", str(PROJECT / "Snakefile"), "--dry-run", "--printshellcmds"]
    env = environment(PROJECT)
    plan = subprocess.run(snakemake, cwd=study, env=env, capture_output=True, text=True, check=True).stdout
    commands = [
        shlex.split(command.partition(" &> ")[0].replace("--gpus 1", "--gpus 0"))
        for command in re.findall(r"^Shell command: bwsk (.+)$", plan, re.MULTILINE)
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=study, env=env, input=json.dumps(commands), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, set[tuple[str, str]]] = {}
    for line in done.stderr.splitlines():
        if line.startswith('[["'):
            command, seen = json.loads(line)
            found.setdefault(_step(command), set()).update(map(tuple, seen))
    return found


def _step(command: list[str]) -> str:
    if command[0] == "train":
        return f"train-{command[1].partition('-')[2]}"
    if command[0] == "memory":
        return re.search(r"build/analysis/(memory-\S+)\.json", " ".join(command))[1]
    return command[0]


def _name(path: Path) -> str:
    return ".".join(["bwsk", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {_name(path) for path in PACKAGE.rglob("*.py")} - {"bwsk"}


def test_the_workflow_has_exactly_these_steps(imports: dict[str, set[tuple[str, str]]]) -> None:
    assert set(imports) == set(STEPS)


@pytest.mark.parametrize("step", STEPS)
def test_what_a_step_runs_counts(imports: dict[str, set[tuple[str, str]]], step: str) -> None:
    """A module that counts imports, when it runs, none that does not."""
    counted = {_name(path) for path in source_files(step)}
    uncounted = MODULES - counted - {f"bwsk.{name}" for name in UNCOUNTED}
    edges = imports[step]
    assert any(importing in counted for importing, _ in edges)
    assert [edge for edge in sorted(edges) if edge[0] in counted and edge[1] in uncounted] == []


def test_each_mode_runs_its_own_room(imports: dict[str, set[tuple[str, str]]]) -> None:
    """So that the test above would see one that is cut wrongly."""
    loaded = {step: {imported for _, imported in edges} for step, edges in imports.items()}
    assert "bwsk.classification.erasure" in loaded["train-bwsk-analyzed"]
    assert "bwsk.reversible" in loaded["train-bwsk-reversible"]
    assert "bwsk.reversible" in loaded["memory-bwsk-reversible"]
