"""The base step: span corruption, local and Hub checkpoints, and what is refused before any training."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from bwsk.errors import BwskError
from bwsk.files import read_json, sha256_file
from bwsk.study.base_checkpoint import load_checkpoint, make_base_checkpoint
from bwsk.study.params import Params, load_params
from bwsk.study.pretrain import corrupt, corruption
from bwsk.study.tokenizer import load_tokenizer, make_tokenizer
from tests.unit.hub_stand_in import EXPIRED, REVISION, hub
from tests.unit.study_fixture import DEMO

TINY = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
PRETRAIN = {"source": "pretrain", "architecture": TINY, "steps": 30, "batch_size": 4, "input_length": 32, "lr": 5e-3}


def study(base: dict[str, object], **sections: object) -> Params:
    return Params.model_validate({**load_params(DEMO).model_dump(), "base": base, **sections})


@pytest.fixture(scope="module")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base")
    make_base_checkpoint(study(PRETRAIN), data / "tokenizer", data / "tokens", out)
    return out


# --- span corruption ---


@given(st.integers(8, 600), st.floats(0.05, 0.9), st.floats(1.0, 40.0))
def test_the_shape_fills_the_input_and_is_possible(length: int, density: float, span: float) -> None:
    shape = corruption(length, density, span)
    assert shape.input_length <= length
    assert 1 <= shape.spans <= min(shape.noise, shape.raw - shape.noise)
    assert shape.input_length + shape.target_length == shape.raw + 2 * shape.spans + 2


def test_the_paper_s_figures() -> None:
    """Raffel et al.: 512 input tokens at 15 % in spans of 3 come from 568 raw ones, with 114 target tokens."""
    shape = corruption(512, 0.15, 3.0)
    assert (shape.raw, shape.noise, shape.spans) == (568, 85, 28)
    assert (shape.input_length, shape.target_length) == (512, 114)


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.integers(12, 200), st.sampled_from([(0.15, 3.0), (0.5, 16.0), (0.3, 1.0)]))
def test_input_and_target_hold_the_text_between_them(seed: int, length: int, kind: tuple[float, float]) -> None:
    shape = corruption(length, *kind)
    text = np.arange(1000, 1000 + shape.raw)
    sentinels = np.arange(999, 799, -1)
    inputs, targets = corrupt(text, shape, sentinels, 1, np.random.default_rng(seed))
    assert (len(inputs), len(targets)) == (shape.input_length, shape.target_length)
    assert inputs[-1] == targets[-1] == 1
    marks = sentinels[: shape.spans].tolist()
    assert [token for token in inputs if 800 <= token < 1000] == marks
    assert [token for token in targets if 800 <= token < 1000] == marks
    # Putting each span back in the place of its sentinel gives the text.
    spans: dict[int, list[int]] = {}
    for token in targets[:-1].tolist():
        if token in marks:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    assert all(spans.values())
    restored = [part for token in inputs[:-1].tolist() for part in spans.get(token, [token])]
    assert restored == text.tolist()


def test_places_of_spans_are_uniform() -> None:
    """Every token but the first (always kept, as in T5) is noise with the same probability; 5 sigma."""
    shape = corruption(20, 0.5, 2.0)
    generator = np.random.default_rng(0)
    counts = np.zeros(shape.raw)
    runs = 4000
    for _ in range(runs):
        inputs, _ = corrupt(np.arange(shape.raw) + 100, shape, np.arange(99, 50, -1), 1, generator)
        kept = inputs[inputs >= 100] - 100
        counts += 1 - np.bincount(kept, minlength=shape.raw)
    assert counts[0] == 0
    assert counts[-1] == runs
    assert counts[1:-1].min() > 0.2 * runs


# --- pretraining ---


def test_pretraining_learns_and_stores_a_checkpoint(pretrained: Path, data: Path) -> None:
    info = read_json(pretrained / "base.json")
    losses = info["pretraining"]["loss"]
    assert info["pretraining"]["steps"] == list(range(1, 31))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3
    assert info["sha256"] == sha256_file(pretrained / "model.safetensors")
    assert info["config_sha256"] == sha256_file(pretrained / "config.json")
    assert sorted(path.name for path in pretrained.iterdir()) == [
        "base.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    model = AutoModelForSeq2SeqLM.from_pretrained(pretrained, local_files_only=True)
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == info["parameters"]
    assert model.config.vocab_size == 1024
    assert model.config.decoder_start_token_id == 0
    assert model.config.dropout_rate == 0.1
    assert "attn" not in (pretrained / "config.json").read_text()
    assert "/" not in (pretrained / "config.json").read_text()


def test_pretraining_gives_the_same_bytes_in_another_process(pretrained: Path, data: Path, tmp_path: Path) -> None:
    script = (
        "import json, sys; from pathlib import Path\n"
        "from bwsk.study.base_checkpoint import make_base_checkpoint; from bwsk.study.params import Params\n"
        "data, out = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "make_base_checkpoint(Params.model_validate(json.load(sys.stdin)), data / 'tokenizer', data / 'tokens', out)\n"
    )
    command = [sys.executable, "-c", script, str(data), str(tmp_path)]
    subprocess.run(command, input=json.dumps(study(PRETRAIN).model_dump()), text=True, check=True)
    for path in pretrained.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_the_seed_decides_the_weights(pretrained: Path, data: Path, tmp_path: Path) -> None:
    make_base_checkpoint(study(PRETRAIN, seed=1), data / "tokenizer", data / "tokens", tmp_path)
    assert sha256_file(tmp_path / "model.safetensors") != sha256_file(pretrained / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": {**TINY, "d_modell": 16}}, "base.architecture.d_modell: unknown key, must be one of d_model"),
        ({"architecture": {**TINY, "vocab_size": 16}}, "base.architecture.vocab_size: unknown key"),
        ({"architecture": {**TINY, "num_heads": 0}}, "base.architecture.num_heads: found 0, must be positive"),
        ({"architecture": {**TINY, "d_model": "wide"}}, "base.architecture: not a T5 ("),
        ({"architecture": {**TINY, "feed_forward_proj": "made-up"}}, "base.architecture: not a T5 ("),
        ({"input_length": 100_000}, "base.input_length: 100000 makes "),
        ({"input_length": 100_000, "mean_span_length": 1e4}, "tokens, pretraining reads "),
        ({"lr": 1e30}, "base.lr: the loss is not finite at step "),
    ],
)
def test_impossible_pretraining(changes: dict[str, object], message: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(BwskError) as caught:
        make_base_checkpoint(study({**PRETRAIN, **changes}), data / "tokenizer", data / "tokens", tmp_path / "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_tokens_of_another_tokenizer(data: Path, tmp_path: Path) -> None:
    smaller = Params.model_validate(
        {**load_params(DEMO).model_dump(), "tokenizer": {"source": "train", "vocab_size": 400}}
    )
    make_tokenizer(smaller, data / "corpus", tmp_path / "tokenizer")
    with pytest.raises(BwskError, match="made with another tokenizer than"):
        make_base_checkpoint(study(PRETRAIN), tmp_path / "tokenizer", data / "tokens", tmp_path / "out")


# --- local checkpoints ---


def directory(path: Path) -> Params:
    return study({"source": "directory", "path": str(path)})


def test_a_local_checkpoint_keeps_its_weights(pretrained: Path, data: Path, tmp_path: Path) -> None:
    info = make_base_checkpoint(directory(pretrained), data / "tokenizer", data / "tokens", tmp_path / "out")
    assert info["pretraining"] is None
    assert info["sha256"] == sha256_file(pretrained / "model.safetensors")
    assert info["config_sha256"] == sha256_file(pretrained / "config.json")


def test_half_precision_is_stored_as_float32(pretrained: Path, data: Path, tmp_path: Path) -> None:
    model = T5ForConditionalGeneration.from_pretrained(pretrained, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    make_base_checkpoint(directory(tmp_path / "half"), data / "tokenizer", data / "tokens", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "float32"
    assert torch.equal(stored["shared.weight"], model.shared.weight.float())


def test_the_attention_of_the_source_is_not_passed_on(pretrained: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(pretrained, tmp_path / "eager")
    change_config(_attn_implementation="eager", attn_implementation="eager")(tmp_path / "eager")
    make_base_checkpoint(directory(tmp_path / "eager"), data / "tokenizer", data / "tokens", tmp_path / "out")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    expected = T5ForConditionalGeneration(T5Config(**TINY))
    assert loaded.encoder.config._attn_implementation == expected.encoder.config._attn_implementation


def test_the_hubs_oldest_t5_has_a_weight_that_nothing_reads(pretrained: Path, data: Path, tmp_path: Path) -> None:
    """The checkpoint of google-t5/t5-small has a relative bias in the cross attention, which T5 ignores."""
    shutil.copytree(pretrained, tmp_path / "old")
    extra = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    change_weights(lambda weights: weights.update({extra: torch.zeros(32, 2)}))(tmp_path / "old")
    make_base_checkpoint(directory(tmp_path / "old"), data / "tokenizer", data / "tokens", tmp_path / "out")
    assert extra not in load_file(tmp_path / "out" / "model.safetensors")


def change_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_text())
        values.update(changes)
        path.write_text(json.dumps({key: value for key, value in values.items() if value != "DROP"}))

    return change


def change_weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def write(name: str, data: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return change


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def overlapping(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


def fewer_embeddings(folder: Path) -> None:
    change_weights(lambda w: w.update({"shared.weight": w["shared.weight"][:1000].clone()}))(folder)
    change_config(vocab_size=1000)(folder)


KEY = "encoder.block.0.layer.0.SelfAttention.q.weight"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json; name a folder"),
    "broken config": (write("config.json", b"{"), "config.json: not strict JSON ("),
    "list for config": (write("config.json", b"[]"), "config.json: found a JSON list, must be an object"),
    "BERT": (change_config(model_type="bert"), "config.json: model_type is 'bert', must be 't5'"),
    "no type": (change_config(model_type="DROP"), "config.json: model_type is None, must be 't5'"),
    "remote code": (change_config(auto_map={"AutoModel": "evil.Model"}), "asks to run code of the repository"),
    "wrong type": (change_config(d_model="sixteen"), "cannot be loaded as a T5 ("),
    "negative size": (change_config(d_ff=-1), "cannot be loaded as a T5 ("),
    "no start token": (change_config(decoder_start_token_id=None), "decoder_start_token_id is not set"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors; save it with"),
    "pickle": (only_pickle, "has no model.safetensors (pytorch_model.bin is a pickle, which can run code when read)"),
    "pickle renamed": (write("model.safetensors", pickle.dumps({"a": 1})), "not a complete safetensors file ("),
    "empty weights": (write("model.safetensors", b""), "not a complete safetensors file ("),
    "huge header": (write("model.safetensors", struct.pack("<Q", 2**60) + b"{}"), "not a complete safetensors file ("),
    "truncated": (truncate, "model.safetensors: not a complete safetensors file ("),
    "overlapping": (overlapping, "model.safetensors: not a complete safetensors file ("),
    "shape": (change_weights(lambda w: w.update({KEY: torch.zeros(16, 8)})), f"{KEY} has shape [16, 8], config.json"),
    "wider config": (change_config(d_model=32), "config.json makes it ["),
    "missing": (change_weights(lambda w: w.pop(KEY)), f"model.safetensors: lacks {KEY}; set base.source: directory"),
    "more layers": (change_config(num_layers=2), "and "),
    "unexpected": (change_weights(lambda w: w.update(extra=torch.zeros(2))), "does not know, extra; set"),
    "NaN": (change_weights(lambda w: w[KEY].fill_(float("nan"))), f"{KEY} holds values that are not finite"),
    "vocabulary": (fewer_embeddings, "its 1024 ids do not fit the 1000 embeddings of source"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_checkpoint_is_one_line_and_changes_nothing(
    name: str, pretrained: Path, data: Path, tmp_path: Path
) -> None:
    out, source = tmp_path / "out", tmp_path / "source"
    shutil.copytree(pretrained, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    shutil.copytree(pretrained, source)
    change, message = BAD[name]
    change(source)
    with pytest.raises(BwskError) as caught:
        make_base_checkpoint(directory(source), data / "tokenizer", data / "tokens", out)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_path_that_is_no_directory(data: Path, tmp_path: Path) -> None:
    with pytest.raises(BwskError, match=r"base.path: .*absent: is not a directory; name a folder with"):
        make_base_checkpoint(directory(tmp_path / "absent"), data / "tokenizer", data / "tokens", tmp_path / "out")


def test_loading_is_in_eval_mode_and_float32(pretrained: Path) -> None:
    model = load_checkpoint(pretrained, "base")
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# --- the Hub, spoken to by the real client ---


def test_from_the_hub_without_code_and_pickles(pretrained: Path, data: Path, tmp_path: Path) -> None:
    root = tmp_path / "hub"
    repository = root / "models" / "owner" / "t5"
    shutil.copytree(pretrained, repository)
    (repository / "modeling.py").write_text("raise SystemExit('ran')")
    (repository / "pytorch_model.bin").write_bytes(b"\x80")
    bare = root / "models" / "owner" / "bare"
    shutil.copytree(repository, bare)
    (bare / "model.safetensors").unlink()
    script = """
import json, sys
from pathlib import Path
from bwsk.study.base_checkpoint import make_base_checkpoint
from bwsk.errors import BwskError
from bwsk.study.params import Params
data, out = Path(sys.argv[1]), Path(sys.argv[2])
for values in json.load(sys.stdin):
    try:
        print(make_base_checkpoint(Params.model_validate(values), data / "tokenizer", data / "tokens", out)["sha256"])
    except BwskError as error:
        print(error)
"""
    source = {"source": "hub", "id": "owner/t5", "revision": REVISION}
    changes: list[dict[str, str]] = [
        {},
        {"revision": "main2"},
        {"id": "owner/absent"},
        {"id": "a/b/c"},
        {"id": "owner/bare"},
    ]
    cases = [study({**source, **change}).model_dump() for change in changes]

    def run(endpoint: str, **more: str) -> list[str]:
        variables = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        variables["HF_HOME"] = str(tmp_path / "home")
        variables |= {"HF_ENDPOINT": endpoint, **more}
        command = [sys.executable, "-c", script, str(data), str(tmp_path / "out")]
        result = subprocess.run(
            command, env=variables, input=json.dumps(cases), capture_output=True, text=True, timeout=120, check=True
        )
        # The client asks an absent host again and again, half a minute per file; bwsk asks once.
        assert "Retry" not in result.stderr
        return result.stdout.splitlines()

    with hub(root) as (endpoint, seen):
        refused = run(endpoint, HF_TOKEN=EXPIRED)
        lines = run(endpoint)
    assert refused[0].startswith(
        "base owner/t5: the Hub does not accept the login that is set (hf auth login, or unset"
    )
    weights = sha256_file(pretrained / "model.safetensors")
    assert lines[0] == weights
    assert lines[1].startswith("base owner/t5: the Hub has no revision 'main2' of it; set base.source: directory")
    assert lines[2].startswith("base owner/absent: the Hub has no such repository, or it is private; set")
    assert lines[3].startswith("base a/b/c: not a repository id of the form owner/name; set")
    assert lines[4].startswith("base owner/bare: has no model.safetensors")
    assert len(lines) == len(changes)
    assert not any("modeling.py" in request or ".bin" in request for request in seen)
    cached = run("http://127.0.0.1:9")
    assert cached[0] == weights
    assert cached[2].startswith("base owner/absent: the Hub cannot be reached (127.0.0.1:9: ")


def test_the_tokenizer_reaches_the_configuration(pretrained: Path, data: Path) -> None:
    config = T5Config.from_pretrained(pretrained)
    tokenizer = load_tokenizer(data / "tokenizer")
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert copy.deepcopy(TINY).items() <= config.to_dict().items()
