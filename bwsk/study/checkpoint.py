"""Checkpoints of a training run: all state that an exact resume needs, stored so that no kill can damage it.

A checkpoint is a folder `step-00000500/` with

    model.safetensors      weights
    best.safetensors       weights of the best validation so far (absent before the first)
    optimizer.safetensors  optimizer state, tensor by tensor, named `<parameter index>.<key>`
    random.safetensors     states of the random generators of the CPU and of the run's GPU
    state.json             position, curves, gradient scaler; the sha256 of the files above and of itself

It is written under a temporary name, flushed and renamed, so it is either complete or absent. The last two are kept.
Nothing in it is pickled. A damaged checkpoint is reported and the one before it is used. Checkpoints are in a folder
named by the run's identity (parameters, data, code, versions), so those of another run are never used. That run
continues when its parameters are restored.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bwsk.errors import BwskError
from bwsk.files import flat, partial_folder, read_json, sha256_file, sha256_json, write_json

KEEP = 2
_CPU = torch.device("cpu")


class Checkpoints:
    """The checkpoints of one run, below `root`; `identity` is whatever must be equal for a resume to be exact."""

    def __init__(self, root: Path, identity: dict[str, Any], warn: Callable[[str], None] = print) -> None:
        self.identity = identity
        self.folder = root / sha256_json(identity)[:16]
        self.warn = warn

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
        """Write the checkpoint of `step`: `tensors` is file stem -> name -> tensor, `state` is strict JSON."""
        target = self.folder / f"step-{step:08d}"
        try:
            with partial_folder(self.folder) as partial:
                new = partial / target.name
                new.mkdir()
                for stem, named in tensors.items():
                    save_file(
                        {name: tensor.contiguous() for name, tensor in named.items()}, new / f"{stem}.safetensors"
                    )
                hashes = {file.name: sha256_file(file) for file in sorted(new.iterdir())}
                content = {"identity": self.identity, "step": step, "files": hashes, "state": state}
                write_json(new / "state.json", {**content, "sha256": sha256_json(content)})
                for file in new.iterdir():
                    _flush(file)
                # Rename before deleting: a half-deleted folder must not look like a checkpoint.
                if target.exists():  # a damaged one of the same step
                    os.rename(target, partial / "replaced")
                os.rename(new, target)
                _flush(self.folder)
                for old in self._steps()[KEEP:]:
                    os.rename(old, partial / f"old-{old.name}")
        except (OSError, SafetensorError, BwskError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise BwskError(f"{target}: cannot be written ({reason}); earlier checkpoints are intact") from error
        return target

    def load(self, device: torch.device) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """Tensors (on `device`, random states on the CPU) and state of the newest intact checkpoint, or None."""
        for path in self._steps():
            try:
                return self._read(path, device)
            except (BwskError, OSError, SafetensorError, KeyError, TypeError) as error:
                reason = " ".join(str(error).split())
                self.warn(f"checkpoint {path.name} is damaged and not used: {reason}")
        for path in sorted(self.folder.parent.glob("*/step-*")):
            if path.parent != self.folder:
                self.warn(f"{path}: belongs to other parameters, data or code ({self._change(path)}); not resumed")
                break
        return None

    def discard(self) -> None:
        """Remove this run's checkpoints: its results are complete."""
        if self.folder.is_dir():
            with partial_folder(self.folder.parent) as partial:
                # Rename before deleting: a half-deleted folder must not look like a checkpoint.
                os.rename(self.folder, partial / "done")

    def _change(self, path: Path) -> str:
        """The first thing in which another run's checkpoint differs from this run."""
        try:
            before, now = flat(read_json(path / "state.json")["identity"]), flat(self.identity)
        except (BwskError, KeyError):
            return "its state.json cannot be read"
        key = next((key for key in {**before, **now} if before.get(key) != now.get(key)), "nothing")
        return f"{key} was {before.get(key)!r}, is {now.get(key)!r}"

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True)

    def _read(self, path: Path, device: torch.device) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        stored = read_json(path / "state.json")
        content = {key: value for key, value in stored.items() if key != "sha256"}
        if sha256_json(content) != stored["sha256"]:
            raise BwskError("state.json does not have the sha256 that it names")
        if content["identity"] != self.identity:
            raise BwskError("it belongs to other parameters, data or code")
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, sha256 in content["files"].items():
            file = path / name
            if Path(name).name != name:
                raise BwskError(f"it names a file outside of itself ({name})")
            if not file.is_file() or sha256_file(file) != sha256:
                raise BwskError(f"{name} is missing or does not have its sha256")
            stem = file.stem
            tensors[stem] = load_file(file, device="cpu" if stem in ("random", "best") else str(device))
        return tensors, content["state"]


def random_states(device: torch.device = _CPU) -> dict[str, Tensor]:
    """States of torch's generators: the CPU's and that of the run's GPU. Nothing else draws during training.

    The name lacks the GPU's number, because a run may continue on another GPU of the same machine.
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, Tensor], device: torch.device = _CPU) -> None:
    """Undo `random_states`."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's per-parameter tensors as `<parameter index>.<key>`."""
    states = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value for index, state in states.items() for key, value in state.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    """Undo `optimizer_state`; learning rates and the like are the caller's."""
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in saved.items():
        index, _, key = name.partition(".")
        states.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _flush(path: Path) -> None:
    """Have the operating system write a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
