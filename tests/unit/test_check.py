"""The check of a finished repository: a good one passes, and each thing tampered with is named in one line."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bwsk.errors import BwskError
from bwsk.files import read_json, sha256_file, write_json
from bwsk.study.check import verify, write_checks
from bwsk.study.params import Params
from bwsk.study.repository import SETTINGS
from tests.unit.study_fixture import publish

NAME = "finetune-bwsk-analyzed"
V = f"results/{NAME}"
Tamper = Callable[[Path], object]


def rewrite(path: str, change: Callable[[bytes], bytes]) -> Tamper:
    return lambda root: (root / path).write_bytes(change((root / path).read_bytes()))


def set_json(path: str, *keys: str, to: object) -> Tamper:
    def tamper(root: Path) -> None:
        value = inner = read_json(root / path)
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to
        write_json(root / path, value)

    return tamper


def test_a_finished_study_passes(study: Path, params: Params, tmp_path: Path) -> None:
    checks = verify(params, study)
    assert {check.what for check in checks} >= {
        "layout",
        "JSON schema",
        "agreement",
        "card header",
        "weights",
        "figures",
    }
    assert [check.where for check in checks if check.what == "loads and writes"] == [
        str(study / "results" / name) for name in params.variant_names
    ]
    write_checks(checks, tmp_path)
    assert read_json(tmp_path / "build/check.json")["passed"] == len(checks)


def test_a_pulled_repository_passes_without_the_intermediate_artifacts(editable: Path, params: Params) -> None:
    shutil.rmtree(editable / "build")
    checks = verify(params, editable)
    assert any(check.found == "agrees with training_results.json of every variant" for check in checks)
    set_json("results/results.json", "variants", NAME, "provenance", "device", to="a GPU")(editable)
    with pytest.raises(BwskError, match=f"variants.{NAME}.provenance.device is a GPU, training recorded cpu"):
        verify(params, editable)
    set_json("results/results.json", "variants", NAME, "final_train_loss", to=0.1)(editable)
    with pytest.raises(BwskError, match=f"variants.{NAME}.final_train_loss is 0.1, training recorded"):
        verify(params, editable)


@pytest.mark.parametrize(
    ("tamper", "named", "says"),
    [
        (lambda root: (root / V / "optimizer.pt").write_bytes(b"x"), "optimizer.pt", "no part of a model repository"),
        (lambda root: (root / "results/notes").mkdir(), "results/notes", "no part of the study"),
        (lambda root: (root / V / ".partial-x").mkdir(), ".partial-x", "no part of the study"),
        (lambda root: (root / V / "tokenizer.json").unlink(), f"{NAME}/tokenizer.json", "missing"),
        (lambda root: (root / "results/figures/loss.png").unlink(), "loss.png", "missing"),
        (lambda root: shutil.rmtree(root / V), NAME, "missing"),
        (rewrite(f"{V}/config.json", lambda data: b""), f"{NAME}/config.json", "is empty"),
        (lambda root: (root / V / "config.json").chmod(0o666), "config.json", "writable by everybody"),
        (lambda root: (root / "results/results.json").chmod(0o755), "results.json", "must be readable and not"),
        (lambda root: (root / "results/results.json").chmod(0o4644), "results.json", "must be readable and not"),
        (lambda root: (root / V).chmod(0o777), NAME, "writable by everybody"),
        (rewrite("results/README.md", lambda data: data.replace(b"403", b"3")[:-3]), "README.md", "is not the card"),
        (rewrite("results/README.md", lambda data: b"# x\n"), "README.md", "no YAML header"),
        (rewrite("results/README.md", lambda data: data.replace(b"|\n", b"|\r\n")), "README.md", "is not the card"),
        (rewrite("results/README.md", lambda data: b"\xff" + data), "README.md", "not UTF-8"),
        (rewrite("results/figures/loss.png", lambda data: b"GIF8" + data), "loss.png", "not a PNG"),
        (set_json("results/results.json", "census", "s", to=99), "results.json", "census.s is not what"),
        (set_json("results/results.json", "comparable", to=True), "results.json", "comparable is not what"),
        (set_json("results/results.json", "parameters", "seed", to=9), "results.json", "seed was 9, is 3"),
        (set_json("results/results.json", "secret", to=1), "results.json", "'secret' was unexpected"),
        (set_json("results/results.json", "claims", to=[]), "results.json", "claims is not what"),
        (rewrite("results/results.json", lambda data: data[:-9]), "results.json", "not strict JSON"),
        (rewrite("results/results.json", lambda data: b'{"census": 1,' + data[1:]), "results.json", "there twice"),
        (set_json(f"{V}/training_results.json", "test_metric", to=1.5), NAME, "training recorded 1.5"),
        (rewrite(f"{V}/model.safetensors", lambda data: data[:-4]), NAME, "not the trained file"),
        (set_json(f"{V}/config.json", "layer_norm_epsilon", to=0.1), NAME, "config.json is not the file that training"),
        (set_json(f"{V}/tokenizer_config.json", "x", to=1), NAME, "tokenizer_config.json is not the file"),
    ],
)
def test_what_was_tampered_with_is_named(editable: Path, params: Params, tamper: Tamper, named: str, says: str) -> None:
    tamper(editable)
    with pytest.raises(BwskError) as error:
        verify(params, editable)
    message = str(error.value)
    assert named in message
    assert says in message
    assert "\n" not in message


def test_a_link_is_no_file_of_its_own(editable: Path, params: Params) -> None:
    path = editable / V / "config.json"
    path.rename(editable / "elsewhere.json")
    path.symlink_to(editable / "elsewhere.json")
    with pytest.raises(BwskError, match=r"config\.json: is a link"):
        verify(params, editable)


def reseal(root: Path, params: Params) -> None:
    """Make all recorded hashes and the card those of the files as they now are, as a careful forger would."""
    sha256 = sha256_file(root / V / "model.safetensors")
    set_json(f"{V}/training_results.json", "provenance", "weights_sha256", to=sha256)(root)
    for name in SETTINGS:
        record = ("provenance", "files_sha256", name)
        set_json(f"{V}/training_results.json", *record, to=sha256_file(root / V / name))(root)
    set_json(f"build/evaluation/{NAME}.json", "weights_sha256", to=sha256)(root)
    publish(params, root)


def retensor(change: Callable[[dict], object], metadata: dict[str, str] | None = None) -> Tamper:
    def tamper(root: Path) -> None:
        tensors = load_file(root / V / "model.safetensors")
        tensors = change(tensors) or tensors
        save_file(tensors, root / V / "model.safetensors", metadata={"format": "pt"} if metadata is None else metadata)

    return tamper


def first(tensors: dict) -> str:
    return sorted(tensors)[0]


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (retensor(lambda t: t[first(t)].view(-1)[:1].fill_(float("nan")) and None), "not finite"),
        (retensor(lambda t: {name: tensor.half() for name, tensor in t.items()}), "published weights are float32"),
        (retensor(lambda t: t.update(more=t[first(t)].clone())), "unexpected keys: more"),
        (retensor(lambda t: t.pop(first(t)) is None or t), "missing keys"),
        (retensor(lambda t: t, metadata={}), "header lacks format"),
        (rewrite(f"{V}/model.safetensors", lambda data: data[:-4]), "not a valid safetensors file"),
        (
            rewrite(f"{V}/model.safetensors", lambda data: struct.pack("<Q", 2**40) + data[8:]),
            "not a valid safetensors",
        ),
        (rewrite(f"{V}/model.safetensors", lambda data: b"\x80\x04pickle"), "not a valid safetensors file"),
        (set_json(f"{V}/config.json", "auto_map", to={"AutoModel": "evil.Model"}), "asks for code"),
        (set_json(f"{V}/config.json", "d_ff", to=64), "does not load"),
        (set_json(f"{V}/config.json", "model_type", to="no-such-model"), "does not load"),
        (rewrite(f"{V}/tokenizer.json", lambda data: data[:100]), "does not load"),
        (rewrite(f"{V}/config.json", lambda data: b"[1]"), "must be an object"),
    ],
)
def test_a_variant_that_users_could_not_load_is_refused_even_with_matching_hashes(
    editable: Path, params: Params, tamper: Tamper, says: str
) -> None:
    tamper(editable)
    reseal(editable, params)
    with pytest.raises(BwskError) as error:
        verify(params, editable)
    message = str(error.value)
    assert NAME in message
    assert says in message
    assert "\n" not in message


def test_what_is_made_without_a_umask_passes(editable: Path, params: Params) -> None:
    shutil.rmtree(editable / "results" / "figures")
    command = [sys.executable, "-m", "bwsk", "card", str(editable)]
    subprocess.run(command, umask=0, capture_output=True, check=True, cwd=editable.parent)
    assert verify(params, editable)


def test_the_command_prints_a_table_or_one_line(editable: Path) -> None:
    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bwsk", "check", str(editable)]
        return subprocess.run(command, capture_output=True, text=True, cwd=editable.parent)

    good = run()
    assert good.returncode == 0, good.stderr
    assert "25 checks passed" in good.stdout
    recorded = (editable / "build/check.json").read_text()
    assert json.loads(recorded)["passed"] == 25
    (editable / V / "model.safetensors").write_bytes(b"x")
    bad = run()
    assert bad.returncode == 1
    assert bad.stderr.startswith("bwsk: error: ")
    assert len(bad.stderr.splitlines()) == 1
    assert (editable / "build/check.json").read_text() == recorded
