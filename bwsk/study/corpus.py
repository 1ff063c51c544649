"""The corpus: three splits of text rows, from the Hub, from a local directory, or from the Python installation.

Whatever the source, a split is stored as `{split}.parquet` with one column, `text`. A row of a `.txt` file is a line
and keeps its line feed, as the rows of the Hub's WikiText do. A byte order mark is dropped and CRLF line ends become
LF, so that a file gives the same tokens on whichever system it was written. Nothing else is changed.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from bwsk.errors import BwskError
from bwsk.files import atomic_directory, read_json, write_json
from bwsk.study.params import SPLITS, DirectoryCorpus, EmbeddedCorpus, HubCorpus, Params
from bwsk.study.provenance import identity

INSTEAD = "set corpus.source: directory and corpus.path to a folder with train/validation/test .txt"


def make_corpus(params: Params, out: Path) -> dict[str, Any]:
    """Store the splits of `params.corpus` as `out/{split}.parquet` and describe them in `out/corpus.json`.

    Returns the content of `corpus.json`: per split the rows, the UTF-8 bytes of their text, and the sha256 of the rows
    (each followed by a NUL byte), which does not depend on how they are stored. BwskError on an unusable source.
    """
    match params.corpus:
        case HubCorpus() as source:
            name, splits = source.id, _from_hub(source)
        case DirectoryCorpus() as source:
            name, splits = Path(source.path).name, _from_directory(source)
        case EmbeddedCorpus():
            name, splits = "pydoc_data.topics", embedded()
    info = {
        "name": name,
        "source": params.corpus.source,
        "identity": identity(params, "corpus"),
        "splits": {split: _describe(f"corpus {name}, {split}", rows) for split, rows in splits.items()},
    }
    with atomic_directory(out) as folder:
        for split, rows in splits.items():
            _write_rows(folder / f"{split}.parquet", rows)
        write_json(folder / "corpus.json", info)
    return info


def read_rows(corpus: Path, split: str) -> list[str]:
    """The rows of a split that `make_corpus` stored; BwskError if they do not match `corpus.json`."""
    entry = _split_entry(corpus, split)
    path = corpus / f"{split}.parquet"
    rows = _read_parquet(path, "text")
    if _digest(rows) != entry.get("sha256"):
        raise BwskError(f"{path}: not the text that corpus.json describes; run the corpus step again")
    return rows


def embedded() -> dict[str, list[str]]:
    """The lines of Python's help topics: about a tenth of the text each for validation and test, the rest to train on.

    Topics are taken in the order of the sha256 of their names: validation gets those that fit into its tenth, then
    test, then train. Topics quote each other; each paragraph is kept only where it comes first (in the order of
    names), so that no paragraph of validation or test is seen in training.
    """
    from pydoc_data.topics import topics

    kept: dict[str, list[str]] = {}
    seen: set[str] = set()
    for name in sorted(topics):
        kept[name] = []
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                kept[name] += [line + "\n" for line in paragraph.strip("\n").split("\n")]
    sizes = {name: sum(map(len, rows)) for name, rows in kept.items()}
    room = dict.fromkeys(("validation", "test"), sum(sizes.values()) // 10)
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in sorted(kept, key=lambda name: hashlib.sha256(name.encode()).digest()):
        split = next((split for split, left in room.items() if sizes[name] <= left), "train")
        if split in room:
            room[split] -= sizes[name]
        splits[split] += kept[name]
    return splits


def _from_hub(source: HubCorpus) -> dict[str, list[str]]:
    import datasets

    from bwsk.study import hub

    name = f"corpus {source.id}"
    if hub.unreachable():
        # Use what an earlier run has cached, instead of retrying an unreachable host.
        datasets.config.HF_HUB_OFFLINE = True
    hub.quiet_unless_terminal()
    try:
        loaded = datasets.load_dataset(source.id, source.config, revision=source.revision)
    except Exception as error:
        raise BwskError(f"{name}: {_explain(error, source)}; {INSTEAD}") from None
    splits = {}
    for split in SPLITS:
        if split not in loaded:
            raise BwskError(f"{name}: has no split {split!r}, found {', '.join(loaded)}; {INSTEAD}")
        table = loaded[split].with_format("arrow")[:]
        splits[split] = _texts(f"{name}, {split}", table, source.column)
    return splits


def _explain(error: Exception, source: HubCorpus) -> str:
    from datasets.exceptions import DatasetNotFoundError

    from bwsk.study import hub

    text = " ".join(str(error).split())
    if "BuilderConfig" in text or "Config name is missing" in text:
        return f"has no config {source.config!r} ({text[:300]})"
    if isinstance(error, DatasetNotFoundError):
        return f"the Hub does not give it ({text[:300]})"
    return hub.explain(error, source.revision)


def _from_directory(source: DirectoryCorpus) -> dict[str, list[str]]:
    folder = Path(source.path)
    if not folder.is_dir():
        raise BwskError(f"corpus.path: {folder} is not a directory; name a folder with train/validation/test .txt")
    splits = {}
    for split in SPLITS:
        path = split_file(folder, split)
        splits[split] = read_text_rows(path) if path.suffix == ".txt" else _read_parquet(path, source.column)
    return splits


def split_file(folder: Path, split: str) -> Path:
    """The one file of a split in a local corpus: `{split}.txt` or `{split}.parquet`."""
    found = [path for path in (folder / f"{split}.txt", folder / f"{split}.parquet") if path.exists()]
    if len(found) == 2:
        raise BwskError(f"corpus.path: {folder} has both {split}.txt and {split}.parquet; keep one of them")
    if not found:
        raise BwskError(f"corpus.path: {folder} has neither {split}.txt nor {split}.parquet; add one of them")
    if not found[0].is_file():  # reading a pipe or a device might never end
        raise BwskError(f"{found[0]}: cannot be read (not a regular file); name a folder with files")
    return found[0]


def read_text_rows(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, each with its line feed (the last as it is); BwskError if it is not text."""
    return split_lines(decode_text(path))


def split_lines(text: str) -> list[str]:
    """The lines of a text, each with its line feed, the last as it is.

    Not `str.splitlines`, which also splits at form feeds, U+2028 and others that do not end a line.
    """
    lines = text.split("\n")
    return [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def decode_text(path: Path) -> str:
    """A text file as UTF-8, without byte order mark, CRLF read as LF; BwskError with byte and line if it is not one."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BwskError(f"{path}: cannot be read ({error.strerror})") from None

    def where(offset: int) -> str:
        line = data.count(b"\n", 0, offset) + 1
        return f"byte {offset} (line {line})"

    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BwskError(f"{path}: is UTF-16 by its byte order mark; save it as UTF-8")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BwskError(f"{path}: not UTF-8 at {where(error.start)}; save it as UTF-8") from None
    if (nul := data.find(b"\0")) >= 0:
        raise BwskError(f"{path}: a NUL byte at {where(nul)}, this is not a text; name a text file")
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _read_parquet(path: Path, column: str) -> list[str]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        # Reading through an open file: pyarrow takes a path's `key=value` parts for partitions.
        with open(path, "rb") as file:
            table = parquet.read_table(file)
    except FileNotFoundError:
        raise BwskError(f"{path}: no such file; run the corpus step again") from None
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise BwskError(f"{path}: not a readable parquet file ({reason}); write it again") from None
    return _texts(str(path), table, column)


def _texts(name: str, table: Any, column: str) -> list[str]:
    """The text column of an arrow table as a list; a null is an empty row."""
    import pyarrow as pa

    if column not in table.column_names:
        raise BwskError(f"{name}: no column {column!r}, found {', '.join(table.column_names)}; set corpus.column")
    values = table[column]
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise BwskError(f"{name}: column {column!r} holds {kind}, must be text; set corpus.column")
    try:
        return [row or "" for row in values.to_pylist()]
    except UnicodeDecodeError:
        raise BwskError(f"{name}: column {column!r} is not UTF-8; write the file again from UTF-8 text") from None


def _write_rows(path: Path, rows: list[str]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    # large_string: 64-bit offsets, a split may exceed 2 GiB.
    parquet.write_table(pa.table({"text": pa.array(rows, pa.large_string())}), path, compression="zstd")


def _describe(name: str, rows: list[str]) -> dict[str, int | str]:
    for number, row in enumerate(rows, start=1):
        if "\0" in row:
            raise BwskError(f"{name}: a NUL byte in row {number}, this is not a text; remove it")
    if not any(row.strip() for row in rows):
        raise BwskError(f"{name}: empty ({len(rows)} rows, none with text); every split needs text")
    return {"rows": len(rows), "bytes": sum(len(row.encode()) for row in rows), "sha256": _digest(rows)}


def _digest(rows: list[str]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.encode() + b"\0")
    return digest.hexdigest()


def _split_entry(corpus: Path, split: str) -> dict[str, Any]:
    splits = read_json(corpus / "corpus.json").get("splits")
    entry = splits.get(split) if isinstance(splits, dict) else None
    if not isinstance(entry, dict):
        raise BwskError(f"{corpus / 'corpus.json'}: does not describe the split {split!r}; run the corpus step again")
    return entry
