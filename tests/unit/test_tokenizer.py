"""The tokenizer step: trained, local, from the Hub; the layout of T5's vocabulary; what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from bwsk.errors import BwskError
from bwsk.files import read_json, sha256_file
from bwsk.study.corpus import make_corpus, read_rows
from bwsk.study.params import Params, load_params
from bwsk.study.tokenizer import encode, load_tokenizer, make_tokenizer, sentinel_ids, vocabulary_size
from tests.unit.hub_stand_in import REVISION, hub

DEMO = Path(__file__).parents[2] / "demo" / "params.yaml"


def study(tokenizer: dict[str, object]) -> Params:
    return Params.model_validate({**load_params(DEMO).model_dump(), "tokenizer": tokenizer})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    make_corpus(load_params(DEMO), out)
    return out


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(study({"source": "train", "vocab_size": 600}), corpus, out)
    return out


@pytest.fixture(scope="module")
def spiece(corpus: Path) -> bytes:
    from bwsk.study.tokenizer import _train

    return _train(read_rows(corpus, "train"), 600)


def test_a_trained_vocabulary_is_laid_out_as_t5s(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained, local_files_only=True)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token) == ("<pad>", "</s>", "<unk>")
    assert len(tokenizer) == vocabulary_size(tokenizer) == 600
    assert sentinel_ids(tokenizer) == list(range(599, 499, -1))
    ids = tokenizer("some words <extra_id_0> and").input_ids
    assert ids[-1] == 1
    assert ids.count(599) == 1
    assert tokenizer.decode(encode(tokenizer, "the function returns a value")) == "the function returns a value"


def test_info_describes_what_was_stored(trained: Path) -> None:
    assert sorted(path.name for path in trained.iterdir()) == ["info.json", "tokenizer.json", "tokenizer_config.json"]
    info = read_json(trained / "info.json")
    assert info["vocab_size"] == 600
    assert info["sha256"] == sha256_file(trained / "tokenizer.json")
    assert info["identity"]["params"] == {"tokenizer": {"source": "train", "vocab_size": 600}}
    # Nothing of the machine that made it.
    assert "/" not in (trained / "tokenizer_config.json").read_text().replace("</s>", "")


def test_training_gives_the_same_bytes_in_every_process(corpus: Path, trained: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from bwsk.study.params import Params; import json\n"
        "from bwsk.study.tokenizer import make_tokenizer\n"
        "params = Params.model_validate(json.load(sys.stdin))\n"
        "make_tokenizer(params, Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    params = study({"source": "train", "vocab_size": 600}).model_dump()
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", script, str(corpus), str(tmp_path)]
    subprocess.run(command, input=json.dumps(params), text=True, env=environment, check=True)
    for path in trained.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_saved_directory_gives_the_same_tokens(trained: Path, corpus: Path, tmp_path: Path) -> None:
    make_tokenizer(study({"source": "directory", "path": str(trained)}), None, tmp_path)
    text = "".join(read_rows(corpus, "validation"))
    expected = encode(load_tokenizer(trained), text)
    assert len(expected) > 1000
    assert encode(load_tokenizer(tmp_path), text) == expected
    assert encode(AutoTokenizer.from_pretrained(tmp_path), text) == expected


def test_a_bare_sentencepiece_model(spiece: bytes, trained: Path, tmp_path: Path) -> None:
    source = tmp_path / "bare"
    source.mkdir()
    (source / "spiece.model").write_bytes(spiece)
    make_tokenizer(study({"source": "directory", "path": str(source)}), None, tmp_path / "out")
    assert sha256_file(tmp_path / "out" / "tokenizer.json") == sha256_file(trained / "tokenizer.json")
    assert sentinel_ids(load_tokenizer(source / "spiece.model"))[0] == 599
    assert [path.name for path in source.iterdir()] == ["spiece.model"]


def test_a_saved_limit_does_not_cut_a_text(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "limited")
    path = tmp_path / "limited" / "tokenizer.json"
    values = json.loads(path.read_text())
    values["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {
        "strategy": {"Fixed": 128},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    path.write_text(json.dumps(values))
    text = "a word " * 20
    assert encode(load_tokenizer(tmp_path / "limited"), text) == encode(load_tokenizer(trained), text)


def damage(folder: Path, name: str, **changes: object) -> None:
    values = json.loads((folder / name).read_text())
    values.update(changes)
    (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_what_is_refused(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "source"

    def refused(message: str) -> None:
        out = tmp_path / "out"
        with pytest.raises(BwskError) as caught:
            make_tokenizer(study({"source": "directory", "path": str(folder)}), None, out)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not list(out.iterdir())

    refused("source: is not a directory; name a folder with tokenizer.json or spiece.model")
    shutil.copytree(trained, folder)
    (folder / "tokenizer.json").write_text("{")
    refused("cannot be loaded as a tokenizer (")
    (folder / "tokenizer.json").unlink()
    refused("has neither tokenizer.json nor spiece.model")
    (folder / "tokenizer_config.json").unlink()
    (folder / "spiece.model").write_bytes(b"\x80\x04not a model")
    refused("cannot be loaded as a tokenizer (")
    (folder / "spiece.model").unlink()
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    generic = {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": None, "extra_ids": None}
    damage(folder, "tokenizer_config.json", **generic, eos_token=None)
    refused("has no eos token; set eos_token in its tokenizer_config.json")
    damage(folder, "tokenizer_config.json", eos_token="</s>", pad_token=None)
    refused("has no pad token; set pad_token in its tokenizer_config.json")


def test_code_of_a_tokenizer_is_never_run(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    shutil.copytree(trained, folder)
    marker = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass Mine: ...\n")
    damage(
        folder,
        "tokenizer_config.json",
        tokenizer_class="Mine",
        auto_map={"AutoTokenizer": ["code.Mine", "code.Mine"]},
    )
    with pytest.raises(BwskError, match="asks to run code of the repository"):
        load_tokenizer(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [(50_000, "the train split yields"), (256, "cannot be trained on the train split")],
)
def test_impossible_vocabularies(vocab_size: int, message: str, corpus: Path, tmp_path: Path) -> None:
    if vocab_size == 256:
        rows = ["".join(map(chr, range(0x4E00 + start, 0x4E00 + start + 100))) for start in range(0, 2000, 100)]
        from bwsk.study.tokenizer import _train

        with pytest.raises(BwskError, match=message):
            _train(rows, vocab_size)
        return
    with pytest.raises(BwskError, match=f"found {vocab_size}, {message} [0-9]+ at most"):
        make_tokenizer(study({"source": "train", "vocab_size": vocab_size}), corpus, tmp_path / "out")


def test_lines_longer_than_sentencepieces_limit_are_trained_on() -> None:
    """SentencePiece leaves out lines over 4192 bytes unless told otherwise."""
    from bwsk.study.tokenizer import _train

    words = [f"{a}{b}{c}" for a in "qxz" for b in "aeiou" for c in "bdgk"]
    long_line = " ".join(words * 100)
    assert len(long_line) > 4192 * 2
    tokenizer_bytes = _train(["hello world this is the short line"] * 3 + [long_line], 135)
    assert b"q" in tokenizer_bytes


def test_from_the_hub(trained: Path, tmp_path: Path) -> None:
    root = tmp_path / "hub"
    shutil.copytree(trained, root / "models" / "owner" / "model")
    (root / "models" / "owner" / "model" / "evil.py").write_text("raise SystemExit('ran')")
    file = tmp_path / "params.yaml"
    text = DEMO.read_text().replace("  vocab_size: 1024\n", f"  id: owner/model\n  revision: '{REVISION}'\n")
    head, _, tail = text.partition("tokenizer:")
    file.write_text(f"{head}tokenizer:{tail.replace('source: train', 'source: hub', 1)}")

    def run(endpoint: str | None, params: Path = file) -> subprocess.CompletedProcess[str]:
        variables = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        variables |= {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_secretsecretsecret"}
        variables |= {"HF_ENDPOINT": endpoint} if endpoint else {"HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "bwsk", "tokenizer", "--params", str(params), "--out", str(tmp_path / "out")]
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)

    with hub(root) as (endpoint, seen):
        result = run(endpoint)
        assert result.returncode == 0, result.stderr
        assert not any("evil.py" in request for request in seen)
        wrong = tmp_path / "wrong.yaml"
        wrong.write_text(file.read_text().replace(REVISION, "f" * 40))
        missing = run(endpoint, wrong)
    assert encode(load_tokenizer(tmp_path / "out"), "a few words") == encode(load_tokenizer(trained), "a few words")
    assert missing.returncode == 1
    assert f"bwsk: error: tokenizer owner/model: the Hub has no revision '{'f' * 40}' of it; set" in missing.stderr
    assert len(missing.stderr.splitlines()) == 1
    assert "hf_secret" not in result.stderr + missing.stderr + result.stdout
    shutil.rmtree(tmp_path / "out")
    assert run(None).returncode == 0  # from the cache
    shutil.rmtree(tmp_path / "home")
    absent = run(None)
    assert absent.returncode == 1
    assert "tokenizer owner/model: the Hub cannot be reached (HF_HUB_OFFLINE is set)" in absent.stderr
    assert "set tokenizer.source: directory and tokenizer.path to a folder" in absent.stderr
