"""Tokens: the published recipe, its counts, what is stored, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bwsk.errors import BwskError
from bwsk.files import read_json, sha256_file
from bwsk.study.corpus import make_corpus, read_rows
from bwsk.study.params import SPLITS, Params, load_params
from bwsk.study.tokenizer import load_tokenizer
from bwsk.study.tokens import (
    blocks,
    count_text,
    join,
    load_tokens,
    make_tokens,
    require_vocabulary,
    token_dtype,
    tokenize,
    unigram_perplexity,
    windows,
)
from tests.unit.study_fixture import DEMO


def study(**sections: dict[str, object]) -> Params:
    return Params.model_validate({**load_params(DEMO).model_dump(), **sections})


def test_a_split_is_its_rows_joined_blank_ones_empty_and_tokenised_once(data: Path) -> None:
    assert join(["", " a\n", " \n", "\t", "b"], "\n\n") == "\n\n a\n\n\n\n\n\n\nb"
    tokenizer = load_tokenizer(data / "tokenizer")
    rows = ["a = b\n", " \n", "\n", "the function\n", "\t"]
    expected = tokenizer("a = b\n\n\n\n\n\n\nthe function\n\n\n", add_special_tokens=False)["input_ids"]
    assert tokenize(tokenizer, rows, "\n\n").tolist() == expected
    # The separator is part of the text.
    assert tokenize(tokenizer, ["a", "b"], "x").tolist() == tokenizer("axb", add_special_tokens=False)["input_ids"]
    stored = load_tokens(data / "tokens", "validation")
    again = tokenize(tokenizer, read_rows(data / "corpus", "validation"), "\n\n")
    assert stored.tolist() == again.tolist()
    assert 1 not in stored[-5:]  # no </s>


def test_tokens_json_describes_the_files(data: Path) -> None:
    info = read_json(data / "tokens" / "tokens.json")
    assert info["dtype"] == "uint16"
    assert info["vocab_size"] == 1024
    assert info["tokenizer_sha256"] == sha256_file(data / "tokenizer" / "tokenizer.json")
    corpus = read_json(data / "corpus" / "corpus.json")["splits"]
    for split in SPLITS:
        entry = info["splits"][split]
        tokens = load_tokens(data / "tokens", split)
        assert isinstance(tokens, np.memmap)
        assert tokens.dtype == np.uint16
        assert entry["n_tokens"] == len(tokens)
        assert entry["n_blocks"] == len(tokens) // 64
        assert entry["n_windows"] == sum(start < len(tokens) - 64 for start in range(0, len(tokens), 32))
        assert (entry["rows"], entry["bytes"]) == (corpus[split]["rows"], corpus[split]["bytes"])
        assert entry["sha256"] == sha256_file(data / "tokens" / f"{split}.npy")
    assert info["splits"]["train"]["unigram_perplexity"] is None
    assert 100 < info["splits"]["test"]["unigram_perplexity"] < 1024


@given(st.integers(0, 3000), st.integers(1, 600), st.integers(1, 600))
def test_windows_follow_the_published_loop(n_tokens: int, window: int, stride: int) -> None:
    expected = []
    start = 0
    while start < n_tokens - window:
        expected.append(start)
        start += stride
    assert windows(n_tokens, window, stride).tolist() == expected


@given(st.integers(0, 300), st.integers(1, 40))
def test_blocks_are_consecutive_and_a_view(n_tokens: int, block: int) -> None:
    tokens = np.arange(n_tokens, dtype=np.uint16)
    found = blocks(tokens, block)
    assert found.shape == (n_tokens // block, block)
    assert found.ravel().tolist() == list(range(n_tokens // block * block))
    assert not found.size or np.shares_memory(found, tokens)


def test_unigram_perplexity_by_hand() -> None:
    # p = (3+1)/7, (1+1)/7, (0+1)/7
    counts = np.array([3, 1, 0])
    expected = math.exp(-(math.log(4 / 7) + math.log(1 / 7)) / 2)
    assert unigram_perplexity(counts, np.array([0, 2])) == pytest.approx(expected, rel=1e-12)
    assert unigram_perplexity(np.zeros(50), np.arange(50)) == pytest.approx(50, rel=1e-12)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(600, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_the_smallest_type_that_holds_the_ids(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size).name == dtype
    assert np.array([vocab_size - 1]).astype(token_dtype(vocab_size))[0] == vocab_size - 1


def test_a_split_too_short_says_how_many_tokens_there_are(data: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for split in SPLITS:
        (text / f"{split}.txt").write_text("the value of the function\n" * (100 if split != "test" else 3))
    params = study(corpus={"source": "directory", "path": str(text)})
    make_corpus(params, tmp_path / "corpus")
    with pytest.raises(BwskError, match=r"corpus, test: \d\d tokens, one window needs more than 64; use a longer text"):
        make_tokens(params, tmp_path / "corpus", data / "tokenizer", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    (text / "train.txt").write_text("the value\n")
    make_corpus(params, tmp_path / "corpus")
    with pytest.raises(BwskError, match=r"corpus, train: \d tokens, one block needs at least 64"):
        make_tokens(params, tmp_path / "corpus", data / "tokenizer", tmp_path / "out")


def test_a_tokenizer_that_the_step_did_not_make(data: Path, tmp_path: Path) -> None:
    from bwsk.study.tokenizer import _train

    (tmp_path / "spiece.model").write_bytes(_train(read_rows(data / "corpus", "train"), 600))
    with pytest.raises(BwskError, match=r"has no tokenizer\.json; name what the tokenizer step made"):
        make_tokens(load_params(DEMO), data / "corpus", tmp_path, tmp_path / "out")


def test_tampered_tokens_are_refused(data: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "tokens"
    shutil.copytree(data / "tokens", folder)
    path = folder / "train.npy"

    def refused(message: str) -> None:
        with pytest.raises(BwskError) as caught:
            load_tokens(folder, "train")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    tokens = np.load(path)
    np.save(path, tokens[:-1])
    refused(f"found uint16 × {len(tokens) - 1}, tokens.json says uint16 × {len(tokens)}; run the tokens step again")
    np.save(path, tokens.astype(np.int64))
    refused("found int64")
    np.save(path, tokens.reshape(1, -1))
    refused(f"found uint16 × 1 × {len(tokens)}")
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refused("not a readable array (")
    path.write_bytes(b"")
    refused("not a readable array (")
    np.save(path, tokens)
    path.write_bytes(path.read_bytes()[:-2])
    refused("not a readable array (")
    path.unlink()
    refused("no such file; run the tokens step again")
    (folder / "tokens.json").write_text('{"dtype": NaN}')
    refused("not strict JSON")
    (folder / "tokens.json").write_text('{"dtype": "uint16"}')
    refused("does not describe the split 'train'")


def test_a_tokenizer_with_more_ids_than_the_model() -> None:
    require_vocabulary(32100, 32128, "t5")
    with pytest.raises(BwskError, match="its 32129 ids do not fit the 32128 embeddings of t5"):
        require_vocabulary(32129, 32128, "t5")


def test_counts_of_any_text_file(data: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the value")
    counts = count_text(short, data / "tokenizer", "\n\n", 512, 512, 128)
    assert (counts["rows"], counts["bytes"]) == (1, 9)
    assert counts["n_tokens"] > 0
    assert (counts["n_blocks"], counts["n_windows"]) == (0, 0)
    (tmp_path / "empty.txt").write_text("")
    assert count_text(tmp_path / "empty.txt", data / "tokenizer", "\n\n", 8, 8, 2)["n_tokens"] == 0


def test_the_command_counts_like_the_study(data: Path, tmp_path: Path) -> None:
    """The rows of a split, written as a text file, have the counts that the study stored."""
    rows = read_rows(data / "corpus", "test")
    text = tmp_path / "test.txt"
    text.write_text("".join(rows))
    out = tmp_path / "counts.json"
    command = [sys.executable, "-m", "bwsk", "tokens", "--text", str(text), "--tokenizer", str(data / "tokenizer")]
    sizes = ["--block", "64", "--window", "64", "--stride", "32"]
    result = subprocess.run([*command, *sizes, "--json", str(out)], capture_output=True, text=True, check=True)
    counts = json.loads(out.read_text())
    stored = read_json(data / "tokens" / "tokens.json")["splits"]["test"]
    for key in ("rows", "bytes", "n_tokens", "n_blocks", "n_windows"):
        assert counts[key] == stored[key]
    assert f"{stored['n_tokens']:,}" in result.stdout
    text.write_bytes(b"caf\xe9")
    result = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == f"bwsk: error: {text}: not UTF-8 at byte 3 (line 1); save it as UTF-8\n"
    assert json.loads(out.read_text()) == counts
