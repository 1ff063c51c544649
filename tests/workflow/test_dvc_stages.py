"""dvc.yaml is generated: it is up to date, follows source and parameters, and covers all that Snakemake makes."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc_render.vega_templates import get_template

from bwsk.errors import BwskError
from bwsk.study import dvc_stages as stages
from bwsk.study.params import load_params
from bwsk.study.provenance import STEPS, source_files
from tests.workflow.dvc_study import PROJECT, set_params

STUDIES = [PROJECT, PROJECT / "demo"]
NO_CHECKOUT = "run the bwsk of a checkout, or install one: pip install -e DIR"


def graph(study: Path) -> dict[str, Any]:
    return yaml.safe_load(stages.render(study))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    shutil.copy(PROJECT / "demo" / "params.yaml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("study", STUDIES, ids=["published", "embedded"])
def test_dvc_yaml_is_up_to_date(study: Path) -> None:
    """If this fails, a file or a parameter changed: `bwsk stages .` and `bwsk stages demo` write the files anew."""
    stages.check(study)


def test_check_names_the_file_and_the_command(study: Path) -> None:
    with pytest.raises(BwskError, match=r"dvc\.yaml: missing; write it: bwsk stages"):
        stages.check(study)
    stages.write(study)
    stages.check(study)
    set_params(study / "params.yaml", {"variants.modes": ["conventional"]})
    with pytest.raises(BwskError, match=r"dvc\.yaml: not that of params\.yaml"):
        stages.check(study)


def test_the_checkout_may_be_called_anything(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snakefile = study.parent / "it's $HOME" / "Snakefile"
    snakefile.parent.mkdir()
    shutil.copy(stages.SNAKEFILE, snakefile)
    monkeypatch.setattr(stages, "SNAKEFILE", snakefile)
    for stage in graph(study)["stages"].values():
        assert shlex.split(stage["cmd"])[2] == "../it's $HOME/Snakefile"


def test_a_new_file_is_drift(tmp_path: Path) -> None:
    """In a copy of the package: digests are made of what the modules import, and so made anew when that changes."""
    shutil.copytree(PROJECT / "bwsk", tmp_path / "bwsk", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "demo").mkdir()
    shutil.copy(PROJECT / "demo" / "params.yaml", tmp_path / "demo")
    bwsk = [sys.executable, "-m", "bwsk", "stages", "demo"]
    done = subprocess.run(bwsk, cwd=tmp_path, capture_output=True, text=True, check=False)  # as a wheel installs it
    assert (done.returncode, list((tmp_path / "demo").iterdir())) == (1, [tmp_path / "demo" / "params.yaml"])
    assert done.stderr == f"bwsk: error: {tmp_path}/Snakefile: missing; {NO_CHECKOUT}\n"
    shutil.copy(PROJECT / "Snakefile", tmp_path)
    subprocess.run(bwsk, cwd=tmp_path, check=True)
    subprocess.run([*bwsk, "--check"], cwd=tmp_path, check=True)
    (tmp_path / "bwsk" / "extra.py").write_text("")
    with open(tmp_path / "bwsk" / "study" / "train.py", "a") as file:
        file.write("\nimport bwsk.extra  # noqa\n")
    done = subprocess.run([*bwsk, "--check"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("bwsk: error: demo/dvc.yaml: not that of params.yaml and of bwsk's files any more")


@pytest.mark.parametrize("study", STUDIES, ids=["published", "embedded"])
def test_a_stage_depends_on_the_digest_of_its_step(study: Path) -> None:
    """One file for each step, and only the stage that writes them depends on the package."""
    found = graph(study)["stages"]
    digests: dict[str, list[str]] = {
        name: [dep.removeprefix("build/source/") for dep in stage["deps"] if dep.startswith("build/source/")]
        for name, stage in found.items()
    }
    assert digests.pop("source") == []
    assert digests.pop("train") == ["train-${item.mode}"]
    assert digests == {name: [name] for name in digests}
    assert {*digests, "train-conventional", "train-bwsk-analyzed", "train-bwsk-reversible"} == set(STEPS)
    package = {name for name, stage in found.items() if any(dep.endswith(".py") for dep in stage["deps"])}
    assert package == {"source"}
    files = {(study / dep).resolve() for dep in found["source"]["deps"]}
    assert set().union(*(source_files(step) for step in STEPS)) <= files
    assert {"provenance.py", "source_digest.py"} <= {path.name for path in files}
    templates = {name for name, stage in found.items() if any("model_card" in dep for dep in stage["deps"])}
    assert templates == {"card", "check"}


@pytest.mark.parametrize("study", STUDIES, ids=["published", "embedded"])
def test_matrix_plots_and_artifacts_are_the_variants(study: Path) -> None:
    found, names = graph(study), load_params(study / "params.yaml").variant_names
    for stage in ("train", "evaluate"):
        assert found["stages"][stage]["matrix"] == {"init": "${variants.inits}", "mode": "${variants.modes}"}
    assert list(found["artifacts"]) == names
    assert [artifact["path"] for artifact in found["artifacts"].values()] == [f"results/{name}" for name in names]
    # What DVC admits as the name of an artifact; it does not check by itself.
    assert all(re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", name) for name in names)
    for plot in found["plots"]:
        (entry,) = plot.values()
        assert [path.split("/")[2] for path in entry["y"]] == names
        assert entry["x"] == "step"


@pytest.mark.parametrize("study", STUDIES, ids=["published", "embedded"])
def test_plots_are_drawn_by_the_template_of_the_study(study: Path) -> None:
    """DVC takes a file of that name in `.dvc/plots` instead of its own; names of variants are not cut by it."""
    for plot in graph(study)["plots"]:
        for entry in plot.values():
            template = get_template(entry["template"], study / ".dvc" / "plots").content
            assert template["encoding"]["color"] == {
                "field": "filename",
                "type": "nominal",
                "title": None,
                "legend": {"labelLimit": 0},
            }


def test_every_variant_reads_its_own_learning_rate(study: Path) -> None:
    params = graph(study)["stages"]["train"]["params"]
    assert "train.lr_${item.init}" in params
    assert not {"train", "train.lr_scratch", "train.lr_finetune"} & set(params)


def test_the_budget_reaches_the_reversible_variants_alone(study: Path) -> None:
    """By the memory prediction of their mode: a matrix has one list of parameters for all variants."""
    found = graph(study)["stages"]
    reads = {name for name, stage in found.items() if "train.budget" in stage.get("params", [])}
    assert reads == {"memory-bwsk-reversible"}
    assert "build/analysis/memory-${item.mode}.json" in found["train"]["deps"]
    assert not {"train", "train.budget"} & set(found["train"]["params"])
    set_params(study / "params.yaml", {"variants.modes": ["conventional"]})
    assert [name for name in graph(study)["stages"] if name.startswith("memory")] == ["memory-conventional"]


def test_keys_that_are_left_to_their_defaults_are_not_asked_of_params_yaml(study: Path) -> None:
    """DVC stops at a parameter that the file does not have."""
    written = yaml.safe_load((study / "params.yaml").read_text())
    for section in ("evaluate", "variants"):
        del written[section]
    for key in ("lr_finetune", "eps"):
        del written["train"][key]
    (study / "params.yaml").write_text(yaml.safe_dump(written))
    train = graph(study)["stages"]["train"]
    assert train["matrix"]["init"] == ["finetune", "scratch"]
    assert not {"evaluate", "train.eps", "train.lr_finetune", "train.lr_${item.init}"} & set(train["params"])
    assert "train.lr_scratch" in train["params"]


def test_local_inputs_are_dependencies(study: Path) -> None:
    set_params(study / "params.yaml", {"corpus": {"source": "directory", "path": "text"}})
    assert "text" in graph(study)["stages"]["corpus"]["deps"]


@pytest.mark.parametrize("study", STUDIES, ids=["published", "embedded"])
def test_all_that_snakemake_makes_is_an_output_of_one_stage(study: Path, tmp_path: Path) -> None:
    """An output that DVC does not know would be missing after a pull, and its rule would run again."""
    shutil.copy(study / "params.yaml", tmp_path)
    done = subprocess.run(
        [
            Path(sys.executable).parent / "snakemake",
            "--snakefile",
            PROJECT / "Snakefile",
            "--summary",
            "all",
            "build/source/corpus",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    made = {line.split("\t")[0] for line in done.stdout.splitlines()[1:] if "\t" in line}
    assert len(made) > 70
    found, names = graph(study)["stages"], load_params(study / "params.yaml").variant_names
    outs = []
    for stage in found.values():
        for out in [*stage.get("outs", []), *stage.get("metrics", [])]:
            variants = names if "${item.init}" in out else [""]
            outs += [out.replace("${item.init}-${item.mode}", variant) for variant in variants]
    assert len(outs) == len(set(outs))
    for file in made:
        owners = [out for out in outs if file == out or file.startswith(f"{out}/")]
        assert len(owners) == 1, f"{file}: {owners}"
    for out in outs:
        assert any(file == out or file.startswith(f"{out}/") for file in made), f"{out} is made by no rule"
