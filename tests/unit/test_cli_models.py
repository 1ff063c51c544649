"""`bwsk classify` and `bwsk trace` as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import T5Config
from typer.testing import CliRunner

import bwsk.cli.memory
import bwsk.cli.models  # noqa: F401 - registers the commands
from bwsk.cli.app import app
from bwsk.errors import BwskError

RUN = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    T5Config(
        d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2, vocab_size=50, decoder_start_token_id=0
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def gray(tmp_path, monkeypatch):
    """A model that no rule fully covers, as far as the commands can see."""
    from bwsk.classification.rules.sets import rule_set

    for rules in (rule_set("strict"), rule_set("published")):
        monkeypatch.setattr(rules, "rules", {k: v for k, v in rules.rules.items() if k != "relu"})


def test_classify_prints_both_rule_sets_and_writes_json(model, tmp_path):
    out = tmp_path / "sub" / "census.json"
    result = RUN.invoke(app, ["classify", str(model / "config.json"), "--json", str(out)])
    assert result.exit_code == 0, result.output
    value = json.loads(out.read_text())
    assert value["rules"] == "published"
    assert value["strict"]["k"] - value["k"] == 2  # one contracting projection in each stack
    assert value["differences"][0]["count"] == 2
    for word in ("published", "strict", "linear", "rms_norm", "dropout"):
        assert word in result.output


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_figures(model, tmp_path, suffix):
    first, second, traced = (tmp_path / f"{n}.{suffix}" for n in "abc")
    for path in (first, second):
        assert RUN.invoke(app, ["classify", str(model), "--figure", str(path)]).exit_code == 0
    assert first.read_bytes() == second.read_bytes()
    small = ["--batch", "1", "--input", "4", "--target", "4"]
    assert RUN.invoke(app, ["trace", str(model), *small, "--figure", str(traced)]).exit_code == 0
    assert traced.stat().st_size > 1000


def test_an_unknown_figure_format_is_one_line(model, tmp_path):
    result = RUN.invoke(app, ["classify", str(model), "--figure", str(tmp_path / "map.gif")])
    assert isinstance(result.exception, BwskError)
    assert "map.gif" in str(result.exception)


def test_trace_prints_and_writes_phases_and_partition(model, tmp_path):
    out = tmp_path / "operations.json"
    arguments = ["--batch", "2", "--input", "8", "--target", "6", "--devices", "3", "--json", str(out), "--strict"]
    result = RUN.invoke(app, ["trace", str(model), *arguments])
    assert result.exit_code == 0, result.output
    value = json.loads(out.read_text())
    assert len(value["partition"]["flops"]) == 3
    assert value["calm"]["chain_length"] == len(value["calm"]["chain"])
    assert value["setting"]["inputs"]["labels"] == [2, 6]
    assert "longest chain" in result.output


def test_gray_is_an_error_under_strict_only(model, gray):
    for command in ("classify", "trace"):
        small = ["--batch", "1", "--input", "4", "--target", "4"] if command == "trace" else []
        shown = RUN.invoke(app, [command, str(model), *small])
        assert shown.exit_code == 0
        assert "GRAY" in shown.output
        refused = RUN.invoke(app, [command, str(model), *small, "--strict"])
        assert refused.exit_code != 0
        assert "GRAY" in str(refused.exception)
        assert "\n" not in str(refused.exception)


@pytest.mark.parametrize(
    "arguments",
    [["classify", "MODEL", "--rules", "lenient"], ["trace", "MODEL", "--devices", "0"], ["classify", "./nowhere"]],
)
def test_bad_input_is_one_line_and_non_zero(model, arguments):
    arguments = [str(model) if a == "MODEL" else a for a in arguments]
    done = subprocess.run([sys.executable, "-m", "bwsk", *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("bwsk: error: ")


def test_plan_explains_what_every_module_runs(tmp_path: Path) -> None:
    """A T5 by its engine; a block in which recomputation would save nothing by its stock forward, and why."""
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "num_layers": 2, "d_model": 32}
    (tmp_path / "config.json").write_text(json.dumps({**config, "d_kv": 8, "d_ff": 64, "vocab_size": 96}))
    shown = CliRunner().invoke(app, ["plan", str(tmp_path), "--explain", "--json", str(tmp_path / "plan.json")])
    assert shown.exit_code == 0, shown.output
    assert "what each module runs" in shown.output
    runs = json.loads((tmp_path / "plan.json").read_text())["runs"]
    assert runs["decoder.block.1.layer.2"].startswith("the engine")
    assert runs["loss head"] == "one copy of the logits, bit-identical"
    config = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shown = CliRunner().invoke(app, ["plan", str(tmp_path), "--explain", "--json", str(tmp_path / "plan.json")])
    assert shown.exit_code == 0, shown.output
    runs = json.loads((tmp_path / "plan.json").read_text())["runs"]
    assert set(runs.values()) == {"the stock forward; more is not in this budget"}
