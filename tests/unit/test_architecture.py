"""From names to structure: what builds, without storage; what is refused, in one line."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertConfig, GPT2Config, T5Config, WhisperConfig

from bwsk.architecture import build, load, load_config, model_class
from bwsk.errors import BwskError

TINY = {"d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 50}


def _refusal(call, *args):
    with pytest.raises(BwskError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_file_and_its_directory_give_the_same_config(tmp_path):
    T5Config(**TINY).save_pretrained(tmp_path)
    assert load_config(tmp_path).to_dict() == load_config(tmp_path / "config.json").to_dict()


def test_a_built_model_has_shapes_and_no_storage():
    config = T5Config(**TINY)
    model = build(config)
    assert type(model).__name__ == "T5ForConditionalGeneration"
    assert all(p.is_meta for p in model.parameters())
    assert model.training
    assert build(config, device="cpu").shared.weight.device.type == "cpu"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (T5Config(), "T5ForConditionalGeneration"),
        (BertConfig(), "BertForMaskedLM"),
        (WhisperConfig(), "WhisperForConditionalGeneration"),  # not its decoder alone
        (BertConfig(is_decoder=True), "BertLMHeadModel"),
        (GPT2Config(), "GPT2LMHeadModel"),
        (BertConfig(architectures=["BertForSequenceClassification"]), "BertForSequenceClassification"),
    ],
)
def test_the_class_is_the_named_one_or_the_published_head(config, name):
    assert model_class(config).__name__ == name


def test_attention_implementation_reaches_the_stacks_and_the_config_stays():
    config = T5Config(**TINY)
    before = config._attn_implementation
    assert build(config, attn_implementation="eager").encoder.config._attn_implementation == "eager"
    assert config._attn_implementation == before


def test_a_module_is_passed_through():
    module = torch.nn.Linear(2, 2)
    assert load(module)[0] is module


def test_directory_without_config(tmp_path):
    assert "config.json" in _refusal(load_config, tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": 3}'])
def test_not_a_config(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert str(path) in _refusal(load_config, path)


def test_missing_file(tmp_path):
    assert "no such file" in _refusal(load_config, tmp_path / "none.json")


def test_invalid_values_are_one_line(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "t5", "d_model": "wide"}))
    assert "t5" in _refusal(load_config, path)


def test_remote_code_is_refused_and_never_imported(tmp_path):
    """A config that points at code of its own: the code lies beside it and must not run."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\nclass C: pass\n")
    auto = {"AutoConfig": "evil.C", "AutoModel": "evil.C"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    assert "remote code" in _refusal(load_config, tmp_path)
    known = T5Config(**TINY).to_dict() | {"auto_map": auto, "architectures": ["EvilModel"]}
    (tmp_path / "config.json").write_text(json.dumps(known))
    assert "remote code" in _refusal(lambda: build(load_config(tmp_path)))
    assert not (tmp_path / "ran").exists()


def test_unknown_architecture_and_unbuildable_config():
    assert "NoSuchModel" in _refusal(build, T5Config(architectures=["NoSuchModel"]))
    assert "cannot be built" in _refusal(build, BertConfig(hidden_size=10, num_attention_heads=3))


def test_unreachable_hub_is_one_line_with_the_id(monkeypatch):
    import socket

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    message = _refusal(load_config, "no-such-owner/no-such-model")
    assert "no-such-owner/no-such-model" in message
    assert "config.json instead" in message


def test_two_revisions_contradict():
    assert "revision" in _refusal(load_config, "owner/model@one", "two")
