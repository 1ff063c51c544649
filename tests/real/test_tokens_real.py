"""The published token counts, on the corpus and tokenizer of the publication.

The data are not part of the project: a folder `shared/data` beside it, or the one that BWSK_SHARED_DATA names.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from bwsk.files import read_json
from bwsk.study.corpus import make_corpus, read_text_rows
from bwsk.study.params import Params
from bwsk.study.tokenizer import load_tokenizer, make_tokenizer, sentinel_ids, vocabulary_size
from bwsk.study.tokens import count_text, load_tokens, make_tokens

DATA = Path(os.environ.get("BWSK_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason="needs WikiText-2 and T5's vocabulary in ../shared/data (or BWSK_SHARED_DATA)"
)
VOCABULARY = DATA / "t5-tokenizer"


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        # rows, tokens, blocks of 512, windows of 512 at stride 128
        ("wikitext-2-raw/test.txt", (4358, 338_496, 661, 2641)),
        ("wikitext-2-raw/validation.txt", (3760, 293_442, 573, 2289)),
    ],
)
def test_counts_of_the_raw_edition(name: str, counts: tuple[int, int, int, int]) -> None:
    found = count_text(DATA / name, VOCABULARY, "\n\n", 512, 512, 128)
    assert (found["rows"], found["n_tokens"], found["n_blocks"], found["n_windows"]) == counts


def test_the_tokenised_edition_as_a_study_in_time(tmp_path: Path) -> None:
    params = Params.model_validate(
        {
            "study": {"title": "t", "repository": "a/b"},
            "corpus": {"source": "directory", "path": str(DATA / "wikitext-2-v1")},
            "tokenizer": {"source": "directory", "path": str(VOCABULARY)},
            "base": {"source": "directory", "path": "absent"},
        }
    )
    corpus = make_corpus(params, tmp_path / "corpus")
    assert {split: entry["rows"] for split, entry in corpus["splits"].items()} == {
        "train": 36_718,
        "validation": 3_760,
        "test": 4_358,
    }
    assert make_tokenizer(params, None, tmp_path / "tokenizer")["vocab_size"] == 32_100
    began = time.process_time()
    info = make_tokens(params, tmp_path / "corpus", tmp_path / "tokenizer", tmp_path / "tokens")
    # All three splits on one core; the requirement is 20 s for the train split.
    assert time.process_time() - began < 25
    train = info["splits"]["train"]
    assert (train["n_tokens"], train["n_blocks"]) == (2_729_653, 5_331)
    assert info["dtype"] == "uint16"
    assert load_tokens(tmp_path / "tokens", "train").nbytes == 2 * 2_729_653
    assert 400 < info["splits"]["test"]["unigram_perplexity"] < 2000
    assert read_json(tmp_path / "tokens" / "tokens.json") == info


def test_the_vocabulary_of_t5(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(VOCABULARY)
    assert vocabulary_size(tokenizer) == 32_100
    assert sentinel_ids(tokenizer) == list(range(32_099, 31_999, -1))
    rows = read_text_rows(DATA / "wikitext-2-raw" / "test.txt")[:400]
    text = "\n\n".join(row if row.strip() else "" for row in rows)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > 10_000
    # WikiText writes " @-@ "; T5's vocabulary has no "<" and no newline: what is lost is exactly that.
    assert np.isin(ids, [0, 1]).sum() == 0
