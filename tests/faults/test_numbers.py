"""Numbers that are not finite, and memory that runs out: told apart, counted, stopped with the place and the remedy.

float16 training needs a GPU, so `check_precision` refuses it here; what these tests train with it on the CPU is the
real loop with the real autocast and gradient scaler, that refusal apart.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from bwsk.errors import BwskError
from bwsk.files import sha256_file
from bwsk.reversible.handle import make_reversible
from bwsk.reversible.t5.float16 import keep_projection_out_of_float16
from bwsk.study.model import ATTENTION, load_model
from bwsk.study.params import Params
from bwsk.study.train import Run
from bwsk.study.train_inputs import TrainInputs
from tests.faults.conftest import Cases
from tests.faults.harness import Server
from tests.tiny import write_params

CPU = torch.device("cpu")


@pytest.fixture
def float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bwsk.study.train.check_precision", lambda key, precision, device: None)


def new_run(cases: Cases, tmp_path: Path, variant: str = "finetune-conventional", **train: object) -> Run:
    (tmp_path / "params").mkdir(exist_ok=True)
    params: Params = write_params(
        tmp_path / "params", **{"precision": "fp16", "max_steps": 40, "patience": 100, **train}
    )
    build = cases.study / "build"
    inputs = TrainInputs(build / "tokens", build / "tokenizer", build / "base", build / "analysis" / "census.json")
    return Run(params, variant, inputs, tmp_path / "checkpoints", CPU, say=lambda text: None)


def set_scale(run: Run, scale: float) -> None:
    run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": scale})


def test_a_gradient_overflow_heals_and_is_counted(cases: Cases, tmp_path: Path, float16: None) -> None:
    run = new_run(cases, tmp_path)
    set_scale(run, 2.0**40)  # far too large: the first steps must overflow
    run.run()
    assert 0 < run.state.skipped_steps < 30
    assert run.state.nan_count == 0
    assert run.state.step == 40
    assert torch.isfinite(run.model.shared.weight).all()
    assert run.scaler.get_scale() < 2.0**40


@pytest.mark.parametrize("variant", ["finetune-conventional", "finetune-bwsk-reversible"])
def test_a_forward_overflow_stops_with_step_and_module(
    cases: Cases, tmp_path: Path, float16: None, variant: str
) -> None:
    run = new_run(cases, tmp_path, variant)
    with torch.no_grad():
        run.model.decoder.block[0].layer[1].EncDecAttention.v.weight.mul_(1.0e7)
    with pytest.raises(BwskError) as error:
        run.run()
    message = str(error.value)
    assert re.search(r"the loss is not finite at step 10 \(fp16, 1\d steps skipped so far\)", message), message
    assert "first in the output of decoder.block.0.layer.1.EncDecAttention.v" in message
    assert "set train.precision to bf16 or fp32" in message
    assert "\n" not in message
    assert run.state.nan_count == 10


def test_gradients_that_never_heal_stop_too(cases: Cases, tmp_path: Path, float16: None) -> None:
    run = new_run(cases, tmp_path)
    set_scale(run, 2.0**120)
    with pytest.raises(BwskError, match=r"the gradient is not finite at step 30 .*first in the gradient of"):
        run.run()


@pytest.mark.parametrize("variant", ["finetune-conventional", "finetune-bwsk-reversible"])
def test_the_output_projection_cannot_overflow(cases: Cases, tmp_path: Path, float16: None, variant: str) -> None:
    """Weights for which the product exceeds float16's 65504: infinite in float16, harmless as it is computed here."""
    run = new_run(cases, tmp_path, variant, max_steps=4)
    with torch.no_grad():
        run.model.encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(1.0e7)
    run.run()
    assert run.state.nan_count == 0

    stock = load_model(cases.study / "build" / "base", attention=ATTENTION)
    with torch.no_grad():
        stock.encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(1.0e7)
    ids = torch.arange(3, 19)[None]
    with torch.autocast("cpu", dtype=torch.float16):
        assert not stock(input_ids=ids, labels=ids).loss.isfinite()
        keep_projection_out_of_float16(stock)
        assert stock(input_ids=ids, labels=ids).loss.isfinite()


def test_the_reversible_engine_has_the_same_bits_under_float16(cases: Cases) -> None:
    ids = torch.arange(3, 35).view(2, 16)
    found = []
    for reversible in (False, True):
        model = load_model(cases.study / "build" / "base", attention=ATTENTION).train()
        keep_projection_out_of_float16(model)
        if reversible:
            make_reversible(model, "max", precision="fp16")
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        (loss * 1024).backward()
        found.append({"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_outside_of_float16_the_projection_is_untouched(cases: Cases) -> None:
    ids = torch.arange(3, 35).view(2, 16)
    model = load_model(cases.study / "build" / "base", attention=ATTENTION).eval()
    for dtype in (None, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            before = model(input_ids=ids, labels=ids).logits
            keep_projection_out_of_float16(model)
            assert torch.equal(before, model(input_ids=ids, labels=ids).logits)


def test_the_scaler_is_part_of_a_checkpoint(cases: Cases, tmp_path: Path, float16: None) -> None:
    """Stopped in the middle of skipped steps, a float16 run ends with the same bytes and the same scale."""

    def start(folder: str) -> Run:
        run = new_run(cases, tmp_path / folder, max_steps=20, checkpoint_every=4)
        if run.state.step == 0:
            set_scale(run, 2.0**34)
        return run

    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = start("whole")
    whole.run()
    whole.finish(tmp_path / "whole" / "out", None)
    parts, step = start("parts"), Run._step
    with pytest.MonkeyPatch.context() as patch:

        def killed(run: Run) -> None:
            if run.state.step == 6:
                raise KeyboardInterrupt
            step(run)

        patch.setattr(Run, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            parts.run()
    again = start("parts")
    assert again.state.step == 4
    assert again.scaler.get_scale() < 2.0**34
    again.run()
    again.finish(tmp_path / "parts" / "out", None)
    assert again.state.skipped_steps == whole.state.skipped_steps > 4
    assert again.scaler.get_scale() == whole.scaler.get_scale()
    files = [tmp_path / name / "out" / "model.safetensors" for name in ("whole", "parts")]
    assert sha256_file(files[0]) == sha256_file(files[1])


@pytest.mark.faults
@pytest.mark.parametrize("variant", ["scratch-conventional", "scratch-bwsk-reversible"])
def test_out_of_memory_says_what_is_needed_what_there_is_and_what_fits(
    cases: Cases, tmp_path: Path, server: Server, variant: str
) -> None:
    """A real refusal by the operating system: the process may map so much, and the batch is too large for that."""
    write_params(tmp_path, batch_size=200)
    build = shutil.copytree(cases.study / "build", tmp_path / "build")
    config = build / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "d_ff": 65536}))
    record = build / "base" / "base.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "config_sha256": sha256_file(config)}))
    command = ["train", variant, "--out", "out", "--gpus", "0"]
    told = server.run(command, tmp_path, tmp_path / "log", memory=700 * 2**20)
    said = (tmp_path / "log").read_text()
    assert told["status"] == 1, said
    assert "Traceback" not in said, said
    found = re.search(
        rf"^bwsk: error: {variant}: out of memory on cpu: a step of batch 200 is predicted to need ([\d,]+) MiB, "
        r"([\d,]+) MiB were free; set train.batch_size to (\d+) at most",
        said.splitlines()[-1],
    )
    assert found, said
    predicted, free, batch = (int(number.replace(",", "")) for number in found.groups())
    assert predicted > free
    assert 1 <= batch < 200
    # The prediction is of a GPU's allocator; a CPU's needs more for the same step, but not twice as much.
    write_params(tmp_path, batch_size=batch // 2, max_steps=2)
    told = server.run(command, tmp_path, tmp_path / "log", memory=700 * 2**20)
    assert told["status"] == 0, (tmp_path / "log").read_text()
