"""Training: the recipe is the published one, the modes agree to the bit, and an interruption leaves no trace."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from bwsk.errors import BwskError
from bwsk.files import sha256_file
from bwsk.study.model import load_model, save_variant, weights
from bwsk.study.params import Params
from bwsk.study.schedule import Schedule
from bwsk.study.tokens import blocks, load_tokens
from bwsk.study.train import Run
from bwsk.study.train_inputs import TrainInputs
from bwsk.study.train_state import TrainState
from tests.tiny import make_inputs, write_params

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study")
    make_inputs(path)
    return path


def inputs(study: Path) -> TrainInputs:
    build = study / "build"
    return TrainInputs(build / "tokens", build / "tokenizer", build / "base", build / "analysis" / "census.json")


def trained(study: Path, params: Params, variant: str, out: Path, say=lambda text: None) -> dict:
    run = Run(params, variant, inputs(study), out / "checkpoints", CPU, say)
    run.run()
    return run.finish(out / variant, out / "curves" / variant)


def without_times(results: dict) -> dict:
    kept = {key: value for key, value in results.items() if "time" not in key and key != "tokens_per_s"}
    if kept["erasure_curve"]:
        kept["erasure_curve"] = [
            {key: value for key, value in entry.items() if key != "seconds"} for entry in kept["erasure_curve"]
        ]
    return kept


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("init", ["finetune", "scratch"])
def test_modes_of_an_init_give_the_same_weights_and_curves(
    study: Path, tmp_path: Path, init: str, precision: str
) -> None:
    params = write_params(study, precision=precision)
    results = {mode: trained(study, params, f"{init}-{mode}", tmp_path) for mode in params.variants.modes}
    hashes = {sha256_file(tmp_path / f"{init}-{mode}" / "model.safetensors") for mode in results}
    assert len(hashes) == 1
    for key in ("train_loss_curve", "val_perplexity_curve", "best_val_metric", "test_metric", "final_train_loss"):
        assert len({json.dumps(result[key]) for result in results.values()}) == 1, key
    assert results["conventional"]["erasure_budget"] is None
    assert results["bwsk-analyzed"]["erasure_budget"] == 0.3
    assert [entry["step"] for entry in results["bwsk-analyzed"]["erasure_curve"]] == [4, 8, 12]


@pytest.mark.parametrize("budget", [0.9, "200MiB", "max"])
def test_any_budget_gives_the_same_weights(study: Path, tmp_path: Path, budget: float | str) -> None:
    variants = ("scratch-conventional", "scratch-bwsk-reversible")
    results = [trained(study, write_params(study, budget=budget), name, tmp_path) for name in variants]
    assert len({result["provenance"]["weights_sha256"] for result in results}) == 1


def test_what_is_trained_is_what_was_predicted(study: Path, tmp_path: Path) -> None:
    """The plan is that of the study's own batch, lengths and precision, as in the prediction of its memory."""
    from bwsk.reversible.handle import plan_of

    for train in ({"budget": 0.9}, {"precision": "bfloat16", "budget": "balanced"}):
        params = write_params(study, **train)
        run = Run(params, "scratch-bwsk-reversible", inputs(study), tmp_path, CPU, lambda text: None)
        precision = params.train.precision
        assert (
            run.reversible.plan.to_dict()
            == plan_of(run.model.config, params.train.budget, (4, 16, 16), precision).to_dict()
        )


def test_inits_differ_and_training_lowers_the_loss(study: Path, tmp_path: Path) -> None:
    params = write_params(study, max_steps=60, lr_scratch=3.0e-3, lr_finetune=3.0e-3)
    scratch = trained(study, params, "scratch-conventional", tmp_path)
    finetune = trained(study, params, "finetune-conventional", tmp_path)
    assert scratch["provenance"]["weights_sha256"] != finetune["provenance"]["weights_sha256"]
    for result in (scratch, finetune):
        assert result["train_loss_curve"][-1] < result["train_loss_curve"][0] - 0.5


def test_the_loop_is_a_plain_loop(study: Path, tmp_path: Path) -> None:
    """The same recipe written with nothing but torch and transformers gives the same bits."""
    params = write_params(study, max_steps=6)
    trained(study, params, "finetune-conventional", tmp_path)
    ours = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "finetune-conventional")

    train = params.train
    model = AutoModelForSeq2SeqLM.from_pretrained(study / "build" / "base", attn_implementation="eager").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=train.weight_decay, fused=True)
    token_blocks = blocks(load_tokens(study / "build" / "tokens", "train"), params.tokens.block)
    schedule = Schedule(train, len(token_blocks))
    torch.manual_seed(params.seed)
    for step in range(6):
        batch = torch.from_numpy(token_blocks[schedule.batch(step, params.seed)].astype(np.int64))
        optimizer.param_groups[0]["lr"] = train.lr_finetune * schedule.lr_factor(step)
        model(input_ids=batch[:, :16], labels=batch[:, 16:].contiguous(), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    for (name, expected), (_, found) in zip(model.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(expected, found), name


@pytest.mark.parametrize("variant", ["finetune-bwsk-analyzed", "scratch-bwsk-reversible"])
def test_a_run_stopped_anywhere_ends_with_the_same_bytes(study: Path, tmp_path: Path, variant: str) -> None:
    params = write_params(study)
    whole = trained(study, params, variant, tmp_path / "whole")
    for stop in (1, 3, 7, 11):
        out = tmp_path / f"stopped-{stop}"
        run = Run(params, variant, inputs(study), out / "checkpoints", CPU, lambda text: None)
        original = run._step

        def killed(run: Run = run, original=original, stop: int = stop) -> None:
            if run.state.step == stop:
                raise KeyboardInterrupt  # like SIGKILL: no chance to write anything
            original()

        run._step = killed
        with pytest.raises(KeyboardInterrupt):
            run.run()
        said: list[str] = []
        resumed = trained(study, params, variant, out, said.append)
        assert any("resuming" in line for line in said) == (stop >= 3)
        assert without_times(resumed) == without_times(whole)
        assert sha256_file(out / variant / "model.safetensors") == sha256_file(
            tmp_path / "whole" / variant / "model.safetensors"
        )


def command(study: Path, out: Path, variant: str) -> list[str]:
    build = study / "build"
    return [
        *(sys.executable, "-m", "bwsk", "train", variant, "--params", str(study / "params.yaml")),
        *("--tokens", str(build / "tokens"), "--tokenizer", str(build / "tokenizer"), "--base", str(build / "base")),
        *("--census", str(build / "analysis" / "census.json"), "--checkpoints", str(out / "checkpoints")),
        *("--out", str(out / variant), "--gpus", "0"),
    ]


def test_sigterm_writes_a_checkpoint_and_the_same_command_continues(study: Path, tmp_path: Path) -> None:
    variant = "scratch-conventional"
    params = write_params(study, max_steps=400, checkpoint_every=100_000, eval_every=100_000)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command(study, tmp_path, variant), stderr=subprocess.PIPE, text=True, env=environment)
    for line in process.stderr:
        if "step (" in line:  # the first line of progress: training is under way
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM: stopped after step" in errors
    assert not (tmp_path / variant).exists()
    assert len(list((tmp_path / "checkpoints" / variant).glob("*/step-*"))) == 1
    again = subprocess.run(command(study, tmp_path, variant), capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    assert "resuming after step" in again.stderr
    whole = trained(study, params, variant, tmp_path / "whole")
    assert whole["provenance"]["weights_sha256"] == sha256_file(tmp_path / variant / "model.safetensors")


def test_early_stopping_keeps_the_best_and_stops_after_patience(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation's perplexities are given: where a real curve turns may depend on how a processor rounds."""
    params = write_params(study, max_steps=40, eval_every=2, patience=3)
    curve = [50.0, 40.0, 45.0, 39.0, 41.0, 39.0, 60.0]
    validated: list[dict[str, torch.Tensor]] = []
    real = Run._perplexity

    def given(run: Run, split: str, on_batch) -> float:
        if split != "validation":
            return real(run, split, on_batch)
        validated.append({name: tensor.clone() for name, tensor in weights(run.model).items()})
        return curve[len(validated) - 1]

    monkeypatch.setattr(Run, "_perplexity", given)
    result = trained(study, params, "scratch-conventional", tmp_path)
    assert result["early_stopped"]
    assert (result["best_step"], result["best_val_metric"], result["total_steps"]) == (8, 39.0, 14)
    assert result["val_perplexity_curve"] == curve
    kept = load_file(tmp_path / "scratch-conventional" / "model.safetensors")
    assert all(torch.equal(tensor, validated[3][name]) for name, tensor in kept.items())
    assert not any(torch.equal(kept["shared.weight"], at["shared.weight"]) for at in validated[:3] + validated[4:])


def test_a_changed_parameter_starts_over_and_changing_it_back_resumes(study: Path, tmp_path: Path) -> None:
    variant, checkpoints = "scratch-conventional", tmp_path / "checkpoints"
    params = write_params(study)
    run = Run(params, variant, inputs(study), checkpoints, CPU, print)
    run._step()
    run._collect(0.0)
    run._checkpoint()
    said: list[str] = []
    Run(write_params(study, lr_scratch=1.0e-4), variant, inputs(study), checkpoints, CPU, said.append)
    assert len(said) == 1
    assert "identity.params.train.lr was 0.0003, is 0.0001); not resumed" in said[0]
    Run(write_params(study), variant, inputs(study), checkpoints, CPU, said.append)
    assert said[1:] == ["resuming after step 1 of 12"]


def test_bfloat16_trains_and_float16_on_the_cpu_is_refused(study: Path, tmp_path: Path) -> None:
    result = trained(study, write_params(study, precision="bfloat16", max_steps=4), "scratch-conventional", tmp_path)
    assert np.isfinite(result["final_train_loss"])
    with pytest.raises(BwskError, match=r"train\.precision: found fp16, which needs a CUDA device"):
        trained(study, write_params(study, precision="float16"), "scratch-conventional", tmp_path)


def test_a_loss_that_is_not_finite_stops_with_one_line_and_names_the_module(study: Path, tmp_path: Path) -> None:
    # The first update makes the weights so large that the second step overflows, and spoils them for good.
    params = write_params(study, lr_finetune=1.0e30, warmup=0.0)
    with pytest.raises(BwskError, match=r"not finite at step 2 \(fp32\); first in .*output of \S+; set") as error:
        trained(study, params, "finetune-conventional", tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "finetune-conventional").exists()


def test_tokens_beyond_the_models_vocabulary_are_refused(study: Path, tmp_path: Path) -> None:
    broken = tmp_path / "study"
    shutil.copytree(study, broken)
    config = broken / "build" / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 150}))
    record = broken / "build" / "base" / "base.json"  # as if its step had written it so
    record.write_text(json.dumps({**json.loads(record.read_text()), "config_sha256": sha256_file(config)}))
    with pytest.raises(BwskError, match="the model's vocabulary has 150"):
        Run(write_params(broken), "scratch-conventional", inputs(broken), tmp_path / "c", CPU, print)


def test_loading_and_saving_show_no_bars_and_leave_the_users_setting(
    study: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    for shown in (True, False):
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        save_variant(load_model(study / "build" / "base"), study / "build" / "tokenizer", tmp_path)
        assert logging.is_progress_bar_enabled() is shown
    logging.enable_progress_bar()
    assert capfd.readouterr().err == ""


def test_step_times_have_a_median_and_quartiles() -> None:
    state = TrainState(best_perplexity=2.0)
    for count, seconds in ((1, 0.5), (2, 0.2), (10, 2.0), (5, 1.5), (4, 1.6)):  # 500, 100, 200, 300, 400 ms a step
        state.note_steps([1.0] * count, seconds)
        figures = state.figures(tokens_per_step=64)
        if count == 1:
            assert {figures[f"step_time_{point}ms"] for point in ("q1_", "", "q3_")} == {500.0}
    found = [figures[f"step_time_{point}ms"] for point in ("q1_", "", "q3_")]
    assert found == pytest.approx([200.0, 300.0, 400.0])
    assert figures["tokens_per_s"] == pytest.approx(64 / 0.3)
