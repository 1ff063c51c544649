"""results.json: complete, a pure function of the study's files, and refused for anything missing, stale or altered."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bwsk.cli import summary
from bwsk.errors import BwskError
from bwsk.files import read_json, write_json
from bwsk.study.params import Params, load_params
from bwsk.study.results import COLUMNS, collect, gather, read_results, write_table
from bwsk.study.staleness import current_training, difference

VARIANT = "scratch-bwsk-analyzed"
Edit = Callable[[dict[str, Any]], None]


def edit(path: Path, change: Edit) -> None:
    value = read_json(path)
    change(value)
    write_json(path, value)


def with_params(root: Path, **sections: dict[str, Any]) -> Params:
    values = load_params(root / "params.yaml").model_dump()
    for section, changed in sections.items():
        values[section] = {**values[section], **changed} if isinstance(changed, dict) else changed
    return Params.model_validate(values)


def test_everything_is_there(study: Path, params: Params) -> None:
    results = read_results(study)
    assert list(results["variants"]) == params.variant_names
    assert len(results["variants"]) == 6
    for name, figures in results["variants"].items():
        training = read_json(study / "results" / name / "training_results.json")
        evaluation = read_json(study / "build/evaluation" / f"{name}.json")
        assert {key: figures[key] for key in COLUMNS} == {key: training[key] for key in COLUMNS}
        assert figures["evaluation"] == evaluation["splits"]
        assert figures["provenance"]["weights_sha256"] == training["provenance"]["weights_sha256"]
        assert figures["peak_memory_mb"] is None  # a CPU: absent, not 0
    assert results["memory_saving"]["finetune"]["measured"] is None
    assert results["census"]["total"] == results["census"]["s"] + results["census"]["k"] + results["census"]["gray"]
    # The strict rules find more that erases: the two projections wo, to fewer dimensions than they read.
    strict = results["census"]["strict"]
    assert (strict["s"], strict["k"]) == (results["census"]["s"] - 2, results["census"]["k"] + 2)
    assert strict["total"] == results["census"]["total"]
    assert results["parameters"]["train"]["max_steps"] == 12
    assert not results["comparable"]
    assert {claim["verdict"] for claim in results["claims"]} == {"not comparable"}
    assert "NaN" not in (study / "results/results.json").read_text()


def test_collecting_again_gives_the_same_bytes(editable: Path, params: Params) -> None:
    path = editable / "results/results.json"
    before = path.read_bytes()
    collect(params, editable)
    assert path.read_bytes() == before


def test_memory_saving_is_the_share_of_the_conventional_peak(editable: Path, params: Params) -> None:
    for mode, peak in (("conventional", 200.0), ("bwsk-reversible", 125.0)):
        record = editable / "results" / f"scratch-{mode}" / "training_results.json"
        edit(record, lambda value, peak=peak: value.update(peak_memory_mb=peak, predicted_peak_memory_mb=2 * peak))
    saving = gather(params, editable)["memory_saving"]
    assert saving["scratch"] == {"measured": 0.375, "predicted": 0.375}
    assert saving["finetune"]["measured"] is None


def test_the_table_has_a_row_per_variant_and_empty_cells_for_absent_numbers(study: Path, tmp_path: Path) -> None:
    write_table(read_results(study), tmp_path / "table.csv")
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert len(rows) == 6
    assert rows[0]["peak_memory_mb"] == ""
    assert math.isclose(float(rows[3]["test_metric"]), float(rows[3]["test_published_perplexity"]), rel_tol=1e-4)


@pytest.mark.parametrize(
    ("changed", "stale", "named"),
    [
        ({"seed": 4}, "finetune-conventional", "seed was 3, is 4"),
        ({"train": {"lr_scratch": 1.0e-3}}, "scratch-conventional", "train.lr_scratch was 0.003, is 0.001"),
        ({"train": {"lr_finetune": 2.0e-3}}, "finetune-conventional", "train.lr_finetune was 0.001, is 0.002"),
        ({"train": {"budget": 0.5}}, "finetune-bwsk-reversible", "train.budget was 'fast', is 0.5"),
        ({"evaluate": {"max_windows": 7}}, "finetune-conventional", "evaluate.max_windows was 40, is 7"),
        ({"tokens": {"stride": 8}}, "tokens.json", "tokens.stride was 16, is 8"),
        ({"corpus": {"column": "words"}}, "corpus.json", "corpus.column was 'text', is 'words'"),
        ({"base": {"id": "org/name"}}, "base.json", "base.id was None, is 'org/name'"),
    ],
)
def test_changed_parameters_are_named_with_what_they_made_stale(
    editable: Path, changed: dict[str, Any], stale: str, named: str
) -> None:
    before = (editable / "results/results.json").read_bytes()
    with pytest.raises(BwskError) as error:
        collect(with_params(editable, **changed), editable)
    message = str(error.value)
    assert named in message
    assert f"{stale}: stale" in message
    assert "snakemake" in message
    assert "\n" not in message
    assert (editable / "results/results.json").read_bytes() == before


def test_the_other_learning_rate_makes_no_variant_stale(study: Path) -> None:
    changed = with_params(study, train={"lr_scratch": 1.0e-3})
    for mode in ("conventional", "bwsk-analyzed", "bwsk-reversible"):
        assert current_training(changed, study, f"finetune-{mode}", None)["mode"] == mode
        with pytest.raises(BwskError, match=f"scratch-{mode}: stale, train.lr_scratch"):
            current_training(changed, study, f"scratch-{mode}", None)


RECORD = f"results/{VARIANT}/training_results.json"
EVALUATION = f"build/evaluation/{VARIANT}.json"
OTHER = "0" * 64


@pytest.mark.parametrize(
    ("path", "change", "says"),
    [
        (RECORD, lambda v: v["provenance"]["identity"].update(source=OTHER), "the source of its step"),
        (RECORD, lambda v: v["provenance"].update(config_sha256=OTHER), "base's config.json"),
        (RECORD, lambda v: v["provenance"]["tokens_sha256"].update(validation=OTHER), "the tokens of validation"),
        (RECORD, lambda v: v["provenance"].update(weights_sha256=OTHER), "model.safetensors is not the trained file"),
        (RECORD, lambda v: v.update(variant="scratch-conventional"), "holds the results of scratch-conventional"),
        (RECORD, lambda v: v.update(best_val_metric=v["best_val_metric"] * 1.001), "but training recorded"),
        (RECORD, lambda v: v.update(test_metric=v["test_metric"] * 0.99), "test perplexity"),
        (RECORD, lambda v: v.update(best_val_metric="good"), "best_val_metric: 'good' is not of type 'number'"),
        (RECORD, lambda v: v.pop("nan_count"), "'nan_count' is a required property"),
        (RECORD, lambda v: v.update(extra=1), "'extra' was unexpected"),
        (RECORD, lambda v: v["provenance"].update(weights_sha256="../../x"), "does not match"),
        (EVALUATION, lambda v: v.update(weights_sha256=OTHER), "made with other weights"),
        (EVALUATION, lambda v: v.update(variant="scratch-conventional"), "evaluation of scratch-conventional"),
        (EVALUATION, lambda v: v["provenance"]["tokens_sha256"].update(test=OTHER), "other tokens of test"),
        (EVALUATION, lambda v: v["provenance"]["identity"].update(source=OTHER), "the source of its step"),
        (EVALUATION, lambda v: v["splits"]["test"].pop("n_windows"), "'n_windows' is a required property"),
        ("build/tokens/tokens.json", lambda v: v["splits"]["train"].update(sha256=OTHER), "is not the file that"),
        (EVALUATION, lambda v: v["splits"]["test"].update(n_windows=39), "39 windows of test where the parameters"),
        ("build/tokens/tokens.json", lambda v: v.pop("splits"), "'splits' is a required property"),
        ("build/base/base.json", lambda v: v.update(sha256=OTHER), "is not the file that"),
        ("build/corpus/corpus.json", lambda v: v["identity"].update(source=OTHER), "the source of its step"),
        ("build/analysis/census.json", lambda v: v.update(s="many"), "'many' is not of type 'integer'"),
        ("build/analysis/census.json", lambda v: v.pop("strict"), "'strict' is a required property"),
    ],
)
def test_an_altered_record_is_refused_in_one_line(
    editable: Path, params: Params, path: str, change: Edit, says: str
) -> None:
    edit(editable / path, change)
    before = (editable / "results/results.json").read_bytes()
    with pytest.raises(BwskError) as error:
        collect(params, editable)
    message = str(error.value)
    assert says in message
    assert "\n" not in message
    assert VARIANT in message or path.partition("/")[2].partition("/")[0] in message
    assert (editable / "results/results.json").read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"s": NaN}', "\udcff"])
def test_a_file_that_is_not_json_is_refused(editable: Path, params: Params, text: str) -> None:
    (editable / RECORD).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BwskError, match=r"training_results\.json"):
        collect(params, editable)


@pytest.mark.parametrize("damage", ["truncated", "appended", "exchanged"])
def test_altered_weights_are_refused(editable: Path, params: Params, damage: str) -> None:
    path = editable / "results" / VARIANT / "model.safetensors"
    data = path.read_bytes()
    other = (editable / "results/finetune-conventional/model.safetensors").read_bytes()
    path.write_bytes({"truncated": data[:-5], "appended": data + b"\0", "exchanged": other}[damage])
    with pytest.raises(BwskError, match=rf"{VARIANT}: stale, model.safetensors is not the trained file"):
        collect(params, editable)


@pytest.mark.parametrize("path", ["build/tokens/test.npy", "build/base/model.safetensors", "build/base/config.json"])
def test_altered_inputs_are_refused(editable: Path, params: Params, path: str) -> None:
    (editable / path).write_bytes((editable / path).read_bytes() + b" ")
    with pytest.raises(BwskError, match=f"{path}: is not the file that its step wrote"):
        collect(params, editable)


def test_all_missing_variants_are_named_at_once(editable: Path, params: Params) -> None:
    for name in ("scratch-conventional", VARIANT):
        (editable / "results" / name / "training_results.json").unlink()
    with pytest.raises(BwskError, match=f"no scratch-conventional, {VARIANT}; pull what is missing") as error:
        collect(params, editable)
    assert f"results/{VARIANT}/model.safetensors" in str(error.value)
    for name in params.variant_names:
        (editable / "results" / name / "training_results.json").unlink(missing_ok=True)
    with pytest.raises(BwskError, match=r"no variant is trained; run the study \(snakemake --cores 1\)"):
        collect(params, editable)


@pytest.mark.parametrize(
    "path", [f"results/{VARIANT}/model.safetensors", EVALUATION, "build/tokens/tokens.json", "build/base/config.json"]
)
def test_a_missing_file_is_named_with_the_command_that_makes_it(editable: Path, params: Params, path: str) -> None:
    (editable / path).unlink()
    with pytest.raises(BwskError, match=f"{path}: missing; .*{path}"):
        collect(params, editable)


def test_a_difference_counts_the_changes_it_does_not_name() -> None:
    stored = {"params": {"train": {"a": 1, "b": 2}, "seed": 0}, "source": OTHER}
    assert difference(stored, stored) is None
    now = {"params": {"train": {"a": 1, "c": 2}, "seed": 1}, "source": OTHER}
    assert difference(stored, now) == "train.b was 2, is absent (and 2 more changes)"


def test_the_command_writes_prints_and_fails_with_one_line(editable: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bwsk", *arguments]
        return subprocess.run(command, cwd=editable, capture_output=True, text=True)

    (editable / "results/results.json").unlink()
    done = run("results", "--table", "build/report/results.csv")
    assert done.returncode == 0, done.stderr
    assert "scratch-bwsk-reversible" in done.stdout
    assert "28 not comparable" in done.stdout
    assert json.loads((editable / "results/results.json").read_text())["study"]["title"] == "Tiny study"
    assert (editable / "build/report/results.csv").is_file()
    shown = run("show")
    assert "model card: results/README.md" in shown.stdout
    (editable / "results" / VARIANT / "model.safetensors").write_bytes(b"")
    failed = run("results")
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"bwsk: error: results/{VARIANT}: stale")
    assert len(failed.stderr.splitlines()) == 1


def test_the_table_fits_80_columns_with_every_number_whole(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = read_results(study)
    for figures in results["variants"].values():  # as wide as those of a real study get
        figures |= {"peak_memory_mb": None, "predicted_peak_memory_mb": 12_345.6}
        figures |= {"step_time_ms": 1234.5, "step_time_q1_ms": 1198.7, "step_time_q3_ms": 1300.2}
    shown = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr(summary, "console", lambda: shown)
    summary.print_results(results)
    text = shown.file.getvalue()
    assert "…" not in text
    assert text.count("~12,346  1,234 (1,199–1,300)") == 6
    assert max(map(len, text.splitlines())) <= 80
