"""Tokens of a split, as published: the rows joined into one text, tokenised once, without special tokens.

A row that is blank counts as ''. Training reads consecutive blocks of the stream, n_tokens // block of them, the
remainder dropped; the published perplexity reads overlapping windows that start at 0, stride, 2 stride, … while
start < n_tokens − window. A split is stored as `{split}.npy`, a one-dimensional array of the smallest unsigned type
that holds the vocabulary, to be memory-mapped.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bwsk.errors import BwskError
from bwsk.files import atomic_directory, read_json, sha256_file, write_json
from bwsk.study.corpus import decode_text, read_rows, split_lines
from bwsk.study.params import SPLITS, Params
from bwsk.study.provenance import identity
from bwsk.study.tokenizer import encode, load_tokenizer, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_tokens(params: Params, corpus: Path, tokenizer: Path, out: Path) -> dict[str, Any]:
    """Tokenise the three splits into `out/{split}.npy` and describe them in `out/tokens.json`, which is returned.

    Per split: rows, bytes, n_tokens, n_blocks, n_windows, sha256 of the file, and for validation and test the
    perplexity of the train split's add-one unigram model (null for train). BwskError if the train split is too short
    for one block, or another for one window.
    """
    from bwsk.study.progress import progress

    loaded = load_tokenizer(tokenizer)
    if not (tokenizer / "tokenizer.json").is_file():
        raise BwskError(f"{tokenizer}: has no tokenizer.json; name what the tokenizer step made")
    vocab_size = vocabulary_size(loaded)
    dtype = token_dtype(vocab_size)
    corpus_info = read_json(corpus / "corpus.json").get("splits", {})
    splits: dict[str, dict[str, Any]] = {}
    counts = np.zeros(vocab_size, dtype=np.int64)
    with atomic_directory(out) as folder, progress(len(SPLITS), "tokens", unit="split") as bar:
        for split in SPLITS:
            rows = read_rows(corpus, split)
            tokens = tokenize(loaded, rows, params.tokens.separator).astype(dtype)
            entry = {
                "rows": len(rows),
                "bytes": corpus_info[split].get("bytes"),
                "n_tokens": len(tokens),
                "n_blocks": len(blocks(tokens, params.tokens.block)),
                "n_windows": len(windows(len(tokens), params.tokens.window, params.tokens.stride)),
            }
            _require_enough(split, entry, params)
            if split == "train":
                counts += np.bincount(tokens, minlength=vocab_size)
            path = folder / f"{split}.npy"
            np.save(path, tokens)
            entry["sha256"] = sha256_file(path)
            entry["unigram_perplexity"] = None if split == "train" else unigram_perplexity(counts, tokens)
            splits[split] = entry
            bar.advance(1, tokens=len(tokens))
        info = {
            "identity": identity(params, "tokens"),
            "dtype": dtype.name,
            "vocab_size": vocab_size,
            "tokenizer_sha256": sha256_file(tokenizer / "tokenizer.json"),
            "splits": splits,
        }
        write_json(folder / "tokens.json", info)
    return info


def join(rows: list[str], separator: str) -> str:
    """The text of a split: its rows, blank ones as '', with `separator` between them."""
    return separator.join(row if row.strip() else "" for row in rows)


def tokenize(tokenizer: PreTrainedTokenizerBase, rows: list[str], separator: str) -> np.ndarray:
    """Token ids (n_tokens,) of the rows, joined and tokenised as one text."""
    return np.asarray(encode(tokenizer, join(rows, separator)), dtype=np.int64)


def count_text(path: Path, tokenizer: Path, separator: str, block: int, window: int, stride: int) -> dict[str, int]:
    """Counts of any UTF-8 text file whose lines are rows; a short text has no blocks or windows."""
    rows = split_lines(decode_text(path))
    tokens = tokenize(load_tokenizer(tokenizer), rows, separator)
    return {
        "rows": len(rows),
        "bytes": sum(len(row.encode()) for row in rows),
        "n_tokens": len(tokens),
        "n_blocks": len(blocks(tokens, block)),
        "n_windows": len(windows(len(tokens), window, stride)),
        "block": block,
        "window": window,
        "stride": stride,
    }


def load_tokens(directory: Path, split: str) -> np.ndarray:
    """The stored token ids (n_tokens,) of a split, memory-mapped read-only; BwskError if `tokens.json` differs."""
    path = directory / f"{split}.npy"
    info = read_json(directory / "tokens.json")
    again = "run the tokens step again"
    try:
        expected = (info["dtype"], (info["splits"][split]["n_tokens"],))
    except (KeyError, TypeError):
        raise BwskError(f"{directory / 'tokens.json'}: does not describe the split {split!r}; {again}") from None
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise BwskError(f"{path}: no such file; {again}") from None
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BwskError(f"{path}: not a readable array ({reason}); {again}") from None
    found = (tokens.dtype.name, tokens.shape)
    if found != expected:
        raise BwskError(f"{path}: found {_array(found)}, tokens.json says {_array(expected)}; {again}")
    return tokens


def blocks(tokens: np.ndarray, block: int) -> np.ndarray:
    """A view (n_tokens // block, block) of consecutive blocks; the remainder is dropped."""
    count = len(tokens) // block
    return tokens[: count * block].reshape(count, block)


def windows(n_tokens: int, window: int, stride: int) -> np.ndarray:
    """Starts (n_windows,) of the published windows: 0, stride, … while start < n_tokens − window."""
    return np.arange(0, max(n_tokens - window, 0), stride)


def unigram_perplexity(counts: np.ndarray, tokens: np.ndarray) -> float:
    """exp of the mean NLL of `tokens` under p(t) = (counts[t] + 1) / Σ(counts + 1); counts: (vocabulary,).

    A model reaches this if it knows only how frequent each token is. A model that learns from context is below it.
    """
    log_p = np.log(counts + 1.0) - math.log(float(np.sum(counts + 1.0)))
    return float(np.exp(-np.mean(log_p[tokens])))


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds the ids 0 … vocab_size − 1, at least 16 bits."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def require_vocabulary(vocab_size: int, model_vocab: int, model: str) -> None:
    """BwskError if a tokenizer with ids below `vocab_size` has some that a model of `model_vocab` embeddings lacks."""
    if vocab_size > model_vocab:
        raise BwskError(
            f"tokenizer: its {vocab_size} ids do not fit the {model_vocab} embeddings of {model}; "
            "set tokenizer and base so that they belong together"
        )


def _require_enough(split: str, entry: dict[str, Any], params: Params) -> None:
    kind = "block" if split == "train" else "window"
    if not entry[f"n_{kind}s"]:
        length = getattr(params.tokens, kind)
        needed = f"at least {length}" if kind == "block" else f"more than {length}"
        raise BwskError(
            f"corpus, {split}: {entry['n_tokens']} tokens, one {kind} needs {needed}; "
            f"use a longer text or set tokens.{kind} lower"
        )


def _array(kind: tuple[str, tuple[int, ...]]) -> str:
    dtype, shape = kind
    return f"{dtype} × {' × '.join(map(str, shape))}"
