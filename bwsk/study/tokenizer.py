"""The tokenizer of a study: from the Hub, from a local directory, or trained on the study's own text.

A trained one is laid out as T5's: a SentencePiece unigram model (Kudo 2018, https://aclanthology.org/P18-1007) with
`<pad>` 0, `</s>` 1 and `<unk>` 2, and the 100 sentinels of span corruption at the end of the vocabulary, counted
backwards (`<extra_id_0>` is the last id). It is trained by SentencePiece itself: the trainer of the `tokenizers`
library gives another vocabulary in every process.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bwsk.errors import BwskError
from bwsk.files import atomic_directory, read_json, sha256_file, write_json
from bwsk.study import hub
from bwsk.study.corpus import read_rows
from bwsk.study.params import DirectoryTokenizer, HubTokenizer, Params, TrainedTokenizer
from bwsk.study.provenance import identity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTEAD = "set tokenizer.source: directory and tokenizer.path to a folder with tokenizer.json or spiece.model"
FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SENTINELS = 100


def make_tokenizer(params: Params, corpus: Path | None, out: Path) -> dict[str, Any]:
    """Store the tokenizer of `params.tokenizer` as `out/tokenizer.json` and `out/tokenizer_config.json`.

    `corpus` is what `make_corpus` stored, needed only to train. Returns the content of `out/info.json`: name,
    vocabulary size (largest id + 1), ids of pad and eos, sha256 of `tokenizer.json`. BwskError on an unusable source.
    """
    with atomic_directory(out) as folder:
        match params.tokenizer:
            case HubTokenizer(id=name, revision=revision):
                # config.json names the class of an older repository's tokenizer.
                source = hub.fetch("tokenizer", name, revision, [*FILES, "config.json"], INSTEAD)
                tokenizer = _load(source, f"tokenizer {name}")
            case DirectoryTokenizer(path=path):
                name = Path(path).name
                tokenizer = _load(Path(path), f"tokenizer.path: {path}")
            case TrainedTokenizer(vocab_size=vocab_size):
                if corpus is None:
                    raise BwskError("tokenizer.source: train needs the corpus; give --corpus build/corpus")
                name = "trained on the train split"
                model = folder / "spiece.model"
                model.write_bytes(_train(read_rows(corpus, "train"), vocab_size))
                tokenizer = _load(folder, "tokenizer")
                model.unlink()
        tokenizer.save_pretrained(folder)
        info = {
            "name": name,
            "source": params.tokenizer.source,
            "identity": identity(params, "tokenizer"),
            "vocab_size": vocabulary_size(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "sha256": sha256_file(folder / "tokenizer.json"),
        }
        write_json(folder / "info.json", info)
    return info


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """A fast tokenizer from a local directory (saved, or with a bare `spiece.model`) or from such a file in it.

    Never asks the Hub and never runs code of the directory. BwskError if it cannot be loaded, is not a fast
    tokenizer, or has no pad or eos token.
    """
    path = Path(path)
    if path.is_file() and path.name in FILES:
        path = path.parent
    return _load(path, str(path))


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Largest id + 1: how many rows a model's embedding needs for this tokenizer."""
    return max(tokenizer.get_vocab().values()) + 1


def sentinel_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of `<extra_id_0>`, `<extra_id_1>`, … as far as the tokenizer has them, in this order."""
    vocabulary = tokenizer.get_vocab()
    ids = (vocabulary.get(f"<extra_id_{index}>") for index in range(SENTINELS))
    return [token for token in ids if token is not None]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a whole text, at once, without special tokens and without the tokenizer's length limit."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend.encode(text, add_special_tokens=False).ids


def _load(path: Path, name: str) -> PreTrainedTokenizerBase:
    if not path.is_dir():
        raise BwskError(f"{name}: is not a directory; name a folder with tokenizer.json or spiece.model")
    if not any((path / file).is_file() for file in ("tokenizer.json", "spiece.model")):
        raise BwskError(f"{name}: has neither tokenizer.json nor spiece.model; name a folder that has one of them")
    config = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    if "auto_map" in config:
        raise BwskError(f"{name}: asks to run code of the repository (auto_map), which is never done; remove it")
    for token in ("pad_token", "eos_token"):
        if config.get(token, "") is None:
            raise BwskError(f"{name}: has no {token.replace('_', ' ')}; set {token} in its tokenizer_config.json")
    from transformers import AutoTokenizer, T5Tokenizer

    typed = any((path / file).is_file() for file in ("tokenizer_config.json", "config.json"))
    loader: Any = AutoTokenizer if typed else T5Tokenizer
    try:
        tokenizer = loader.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    # The loaders raise whatever the file's content leads to, a bare Exception included.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BwskError(f"{name}: cannot be loaded as a tokenizer ({reason}); name another or save it again") from None
    if not tokenizer.is_fast:
        raise BwskError(f"{name}: found {type(tokenizer).__name__}, must be a fast tokenizer (one with tokenizer.json)")
    for token in ("pad", "eos"):
        if getattr(tokenizer, f"{token}_token_id") is None:
            raise BwskError(f"{name}: has no {token} token; set {token}_token in its tokenizer_config.json")
    return tokenizer


def _train(rows: list[str], vocab_size: int) -> bytes:
    """A SentencePiece unigram model of `vocab_size` pieces less the sentinels, which the T5 tokenizer adds."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(row.strip() for row in rows if row.strip()),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size - SENTINELS,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            pad_piece="<pad>",
            eos_piece="</s>",
            unk_piece="<unk>",
            # Lines longer than the default 4192 bytes would be left out without a word.
            max_sentence_length=2**30,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        found = f"tokenizer.vocab_size: found {vocab_size}"
        # "… Vocabulary size too high (9900). Please set it to a value <= 4007."
        limit = str(error).partition("<= ")[2].rstrip(".")
        if limit.isdigit():
            raise BwskError(f"{found}, the train split yields {int(limit) + SENTINELS} at most; set that") from None
        reason = " ".join(str(error).split())[:300]
        raise BwskError(f"{found}, cannot be trained on the train split ({reason}); set another") from None
    return model.getvalue()
