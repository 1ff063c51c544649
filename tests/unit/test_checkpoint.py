"""Checkpoints: exact, whole or absent, and never another run's."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import pytest
import torch

from bwsk.errors import BwskError
from bwsk.files import sha256_json
from bwsk.study.checkpoint import (
    Checkpoints,
    optimizer_state,
    random_states,
    restore_optimizer,
    restore_random_states,
)

CPU = torch.device("cpu")
IDENTITY = {"lr": 0.1}
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="the random generator of a GPU needs a CUDA device")


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((3, 2), value)}, "random": random_states()}


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    for step in (10, 20, 30):
        checkpoints.save(step, tensors(step), {"step": step})
    return checkpoints


def test_the_newest_is_loaded_and_two_are_kept(saved: Checkpoints) -> None:
    loaded, state = saved.load(CPU)
    assert state == {"step": 30}
    assert torch.equal(loaded["model"]["w"], torch.full((3, 2), 30.0))
    assert sorted(path.name for path in saved.folder.iterdir()) == ["step-00000020", "step-00000030"]


@pytest.mark.parametrize("name", ["model.safetensors", "random.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_reported_and_the_previous_used(tmp_path: Path, name: str, damage: str) -> None:
    warnings: list[str] = []
    checkpoints = Checkpoints(tmp_path, IDENTITY, warn=warnings.append)
    for step in (10, 20):
        checkpoints.save(step, tensors(step), {"step": step})
    file = checkpoints.folder / "step-00000020" / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1] if name != "state.json" else content[:-2])
    else:
        file.unlink()
    _, state = checkpoints.load(CPU)
    assert state == {"step": 10}
    assert len(warnings) == 1
    assert "step-00000020 is damaged" in warnings[0]


def test_another_runs_checkpoint_is_not_found_nor_accepted_when_moved(saved: Checkpoints, tmp_path: Path) -> None:
    warnings: list[str] = []
    other = Checkpoints(tmp_path, {"lr": 0.2}, warn=warnings.append)
    assert other.load(CPU) is None
    saved.folder.rename(other.folder)
    assert other.load(CPU) is None
    assert all("belong" in warning and "other parameters" in warning for warning in warnings)
    # The folder of the other run, named with what differs; then both checkpoints, moved to where they do not belong.
    assert len(warnings) == 3
    assert "lr was 0.1, is 0.2" in warnings[0]


def test_a_write_that_was_killed_leaves_nothing_that_is_loaded(saved: Checkpoints) -> None:
    partial = saved.folder / ".partial-killed"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    _, state = saved.load(CPU)
    assert state == {"step": 30}
    saved.save(40, tensors(40), {"step": 40})
    assert not partial.exists()


def test_a_failed_write_is_one_line_and_keeps_the_earlier_ones(saved: Checkpoints) -> None:
    """The file size limit stands in for a full disk: the operating system refuses the write half-way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            BwskError, match=r"step-00000040: cannot be written .*; earlier checkpoints are intact"
        ) as error:
            saved.save(40, tensors(40), {"step": 40})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(error.value)
    _, state = saved.load(CPU)
    assert state == {"step": 30}


def test_nothing_outside_the_checkpoint_is_read(saved: Checkpoints) -> None:
    file = saved.folder / "step-00000030" / "state.json"
    content = json.loads(file.read_text())
    content["files"]["../step-00000020/model.safetensors"] = content["files"].pop("model.safetensors")
    del content["sha256"]
    file.write_text(json.dumps({**content, "sha256": sha256_json(content)}))
    _, state = saved.load(CPU)
    assert state == {"step": 20}


def test_optimizer_and_random_states_continue_as_if_never_stopped() -> None:
    def setup() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
        model = torch.nn.Linear(4, 4)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step(model: torch.nn.Linear, optimizer: torch.optim.AdamW) -> None:
        torch.nn.functional.dropout(model(torch.randn(8, 4)), 0.5).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    model, optimizer = setup()
    step(model, optimizer)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = {name: tensor.clone() for name, tensor in optimizer_state(optimizer).items()}
    generators = random_states()
    step(model, optimizer)

    resumed, resumed_optimizer = setup()
    resumed.load_state_dict(weights)
    restore_optimizer(resumed_optimizer, kept)
    restore_random_states(generators)
    step(resumed, resumed_optimizer)
    assert torch.equal(resumed.weight, model.weight)
    assert torch.equal(resumed.bias, model.bias)


@CUDA
def test_a_gpus_random_generator_and_tensors_go_through_a_checkpoint(tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    weights = torch.rand(3, device=device)
    checkpoints.save(10, {"model": {"w": weights}, "random": random_states(device)}, {})
    drawn = torch.rand(5, device=device)
    loaded, _ = checkpoints.load(device)
    assert loaded["model"]["w"].device == device
    assert torch.equal(loaded["model"]["w"], weights)
    restore_random_states(loaded["random"], device)
    assert torch.equal(torch.rand(5, device=device), drawn)
