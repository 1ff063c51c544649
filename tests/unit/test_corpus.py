"""The corpus step: sources, what is stored, and one line for everything that is wrong with a source."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from threading import Thread

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from bwsk.errors import BwskError
from bwsk.files import read_json
from bwsk.study.corpus import embedded, make_corpus, read_rows, read_text_rows, split_lines
from bwsk.study.params import SPLITS, Params, load_params
from tests.unit.hub_stand_in import REVISION, hub

DEMO = Path(__file__).parents[2] / "demo" / "params.yaml"


def study(corpus: dict[str, object]) -> Params:
    values = load_params(DEMO).model_dump()
    return Params.model_validate({**copy.deepcopy(values), "corpus": corpus})


def directory(folder: Path, **other: object) -> Params:
    return study({"source": "directory", "path": str(folder), **other})


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for split in SPLITS:
        (folder / f"{split}.txt").write_bytes(f" = {split} = \n\n a second line\n \nno line feed".encode())
    return folder


def test_text_lines_are_rows_with_their_line_feeds(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    info = make_corpus(directory(texts), out)
    rows = read_rows(out, "train")
    assert rows == [" = train = \n", "\n", " a second line\n", " \n", "no line feed"]
    stored = parquet.read_table(out / "train.parquet")
    assert stored.column_names == ["text"]
    assert info == read_json(out / "corpus.json")
    assert info["splits"]["train"] == {
        "rows": 5,
        "bytes": (texts / "train.txt").stat().st_size,
        "sha256": hashlib.sha256(b"".join(row.encode() + b"\0" for row in rows)).hexdigest(),
    }


def test_the_same_text_gives_the_same_bytes_from_text_and_parquet(texts: Path, tmp_path: Path) -> None:
    make_corpus(directory(texts), tmp_path / "a")
    for split in SPLITS:
        rows = read_text_rows(texts / f"{split}.txt")
        (texts / f"{split}.txt").unlink()
        kind = pa.dictionary(pa.int32(), pa.string()) if split == "test" else pa.string()
        table = pa.table({"id": list(range(len(rows))), "body": pa.array(rows).cast(kind)})
        parquet.write_table(table, texts / f"{split}.parquet", row_group_size=2)
    make_corpus(directory(texts, column="body"), tmp_path / "b")
    for split in SPLITS:
        name = f"{split}.parquet"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_byte_order_mark_and_crlf_do_not_change_the_rows(texts: Path) -> None:
    path = texts / "train.txt"
    plain = read_text_rows(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_text_rows(path) == plain


def test_only_line_feeds_end_a_row() -> None:
    text = "a\fb\x1cc d\x85e\rf\ng\n"
    assert split_lines(text) == ["a\fb\x1cc d\x85e\rf\n", "g\n"]


@given(st.text())
def test_rows_lose_nothing(text: str) -> None:
    rows = split_lines(text)
    assert "".join(rows) == text
    assert all(row.find("\n") in (-1, len(row) - 1) for row in rows)


def test_a_line_of_a_million_characters(texts: Path, tmp_path: Path) -> None:
    (texts / "train.txt").write_text("word " * 200_000, encoding="utf-8")
    info = make_corpus(directory(texts), tmp_path / "out")
    assert info["splits"]["train"]["rows"] == 1
    assert info["splits"]["train"]["bytes"] == 1_000_000


def test_null_rows_of_parquet_are_empty_rows(texts: Path, tmp_path: Path) -> None:
    (texts / "train.txt").unlink()
    parquet.write_table(pa.table({"text": ["a", None, "b"]}), texts / "train.parquet")
    make_corpus(directory(texts), tmp_path / "out")
    assert read_rows(tmp_path / "out", "train") == ["a", "", "b"]


def test_embedded_splits_are_whole_and_share_no_paragraph(tmp_path: Path) -> None:
    splits = embedded()
    sizes = {split: sum(map(len, rows)) for split, rows in splits.items()}
    total = sum(sizes.values())
    assert total > 200_000
    for split in ("validation", "test"):
        assert 0.05 * total < sizes[split] <= 0.1 * total
    lines = {split: {row.strip() for row in rows if len(row.split()) > 9} for split, rows in splits.items()}
    # Paragraphs are unique; single sentences may recur in different paragraphs.
    assert len(lines["train"] & lines["test"]) < 0.02 * len(lines["test"])
    make_corpus(load_params(DEMO), tmp_path / "a")
    make_corpus(load_params(DEMO), tmp_path / "b")
    for name in (*(f"{split}.parquet" for split in SPLITS), "corpus.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def write(name: str, data: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return change


def replace_by_parquet(table: dict[str, list[object]]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "test.txt").unlink()
        parquet.write_table(pa.table(table), folder / "test.parquet")

    return change


def garbled_parquet(folder: Path) -> None:
    replace_by_parquet({"text": ["hello"]})(folder)
    path = folder / "test.parquet"
    path.write_bytes(path.read_bytes()[:-9])


def not_utf8_parquet(folder: Path) -> None:
    (folder / "test.txt").unlink()
    values = pa.array([b"ok", b"\xff\xfe"]).view(pa.string())
    parquet.write_table(pa.table({"text": values}), folder / "test.parquet")


def folder_for_file(folder: Path) -> None:
    (folder / "test.txt").unlink()
    (folder / "test.txt").mkdir()


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda folder: (folder / "test.txt").unlink(), "has neither test.txt nor test.parquet; add one"),
    "both": (write("test.parquet", b"x"), "has both test.txt and test.parquet; keep one"),
    "empty": (write("test.txt", b""), "texts, test: empty (0 rows, none with text)"),
    "blank": (write("test.txt", b" \n\t\n\n"), "texts, test: empty (3 rows, none with text)"),
    "latin-1": (write("test.txt", b"ab\nna\xefve\n"), "test.txt: not UTF-8 at byte 5 (line 2); save it as UTF-8"),
    "cut": (write("test.txt", "née".encode()[:2]), "test.txt: not UTF-8 at byte 1 (line 1)"),
    "surrogate": (write("test.txt", b"\xed\xa0\x80"), "test.txt: not UTF-8 at byte 0 (line 1)"),
    "utf-16": (write("test.txt", "hello".encode("utf-16")), "test.txt: is UTF-16 by its byte order mark"),
    "NUL": (write("test.txt", b"one\ntwo\0three\n"), "test.txt: a NUL byte at byte 7 (line 2), this is not a text"),
    "binary": (write("test.txt", bytes(range(256))), "test.txt: not UTF-8 at byte 128 (line 2)"),
    "no column": (replace_by_parquet({"body": ["a"]}), "test.parquet: no column 'text', found body; set corpus.column"),
    "numbers": (replace_by_parquet({"text": [1, 2]}), "column 'text' holds int64, must be text"),
    "NUL in parquet": (replace_by_parquet({"text": ["a", "b\0"]}), "texts, test: a NUL byte in row 2"),
    "no rows": (replace_by_parquet({"text": pa.array([], pa.string())}), "texts, test: empty (0 rows"),  # type: ignore[dict-item]
    "truncated parquet": (garbled_parquet, "test.parquet: not a readable parquet file ("),
    "parquet not UTF-8": (not_utf8_parquet, "test.parquet: column 'text' is not UTF-8"),
    "folder for file": (folder_for_file, "test.txt: cannot be read (not a regular file)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_source_is_one_line_and_changes_nothing(name: str, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_corpus(directory(texts), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    change, message = BAD[name]
    change(texts)
    with pytest.raises(BwskError) as caught:
        make_corpus(directory(texts), out)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    fresh = tmp_path / "fresh"
    with pytest.raises(BwskError):
        make_corpus(directory(texts), fresh)
    assert not fresh.exists()


def test_a_path_that_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(BwskError, match="is not a directory; name a folder with train/validation/test"):
        make_corpus(directory(tmp_path / "absent"), tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_output(texts: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(BwskError, match="cannot be written"):
        make_corpus(directory(texts), locked / "out")


def test_an_output_that_is_a_file(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(BwskError, match="cannot be written"):
        make_corpus(directory(texts), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_tampered_rows_are_refused(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_corpus(directory(texts), out)
    parquet.write_table(pa.table({"text": ["other"]}), out / "train.parquet")
    with pytest.raises(BwskError, match="not the text that"):
        read_rows(out, "train")
    (out / "corpus.json").write_text("{}")
    with pytest.raises(BwskError, match="does not describe the split 'train'"):
        read_rows(out, "train")


# --- the Hub, spoken to by the real client ---

CARD = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: small/train-*
  - split: validation
    path: small/validation-*
  - split: test
    path: small/test-*
---
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    root = tmp_path / "hub"
    folder = root / "datasets" / "owner" / "texts"
    (folder / "small").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for split in SPLITS:
        rows = ["", f" = {split} = \n", "Some text .\n"] * 5
        parquet.write_table(pa.table({"text": rows}), folder / "small" / f"{split}-00000.parquet")
    return root


def environment(tmp_path: Path, endpoint: str | None) -> dict[str, str]:
    """This process's environment with a cache of its own and the Hub at `endpoint`, or offline."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    variables["HF_HOME"] = str(tmp_path / "home")
    return variables | ({"HF_ENDPOINT": endpoint} if endpoint else {"HF_HUB_OFFLINE": "1"})


def run_step(tmp_path: Path, endpoint: str | None, **corpus: str) -> subprocess.CompletedProcess[str]:
    """`bwsk corpus` in a process of its own: the Hub's client reads its environment once, on import."""
    settings = {"source": "hub", "id": "owner/texts", "config": "small", "revision": REVISION, **corpus}
    section = "\n".join(f"  {key}: {value}" for key, value in settings.items())
    text = DEMO.read_text().split("corpus:")
    file = tmp_path / "params.yaml"
    file.write_text(f"{text[0]}corpus:\n{section}\n\ntokenizer:{text[1].partition('tokenizer:')[2]}")
    command = [sys.executable, "-m", "bwsk", "corpus", "--params", str(file), "--out", str(tmp_path / "out")]
    variables = environment(tmp_path, endpoint)
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)


def test_from_the_hub_and_then_without_it(dataset: Path, tmp_path: Path) -> None:
    with hub(dataset) as (endpoint, seen):
        result = run_step(tmp_path, endpoint)
        assert result.returncode == 0, result.stderr
        assert any(f"/resolve/{REVISION}/small/train-00000.parquet" in request for request in seen)
    assert read_rows(tmp_path / "out", "train") == ["", " = train = \n", "Some text .\n"] * 5
    assert read_json(tmp_path / "out" / "corpus.json")["name"] == "owner/texts"
    # What is cached is used when the Hub is gone.
    shutil.rmtree(tmp_path / "out")
    result = run_step(tmp_path, None)
    assert result.returncode == 0, result.stderr
    assert read_rows(tmp_path / "out", "validation")[1] == " = validation = \n"


LACKING: list[tuple[dict[str, str], str]] = [
    ({"revision": "0" * 40}, "the Hub does not give it (Revision '000"),
    ({"id": "owner/absent"}, "corpus owner/absent: the Hub does not give it (Dataset 'owner/absent' doesn't exist"),
    ({"config": "large"}, "has no config 'large' ("),
    ({"column": "body"}, "no column 'body', found text; set corpus.column"),
    ({"id": "owner/two"}, "has no split 'test', found train, validation; set corpus.source: directory"),
]


def test_what_the_hub_has_not(dataset: Path, tmp_path: Path) -> None:
    """All in one process, which costs seconds to start."""
    shutil.copytree(dataset / "datasets" / "owner" / "texts", dataset / "datasets" / "owner" / "two")
    card = dataset / "datasets" / "owner" / "two" / "README.md"
    card.write_text(CARD.replace("  - split: test\n    path: small/test-*\n", ""))
    script = """
import json, sys
from pathlib import Path
from bwsk.study.corpus import make_corpus
from bwsk.errors import BwskError
from bwsk.study.params import Params
for values in json.load(sys.stdin):
    try:
        make_corpus(Params.model_validate(values), Path(sys.argv[1]))
        print("made")
    except BwskError as error:
        print(error)
"""
    source = {"source": "hub", "id": "owner/texts", "config": "small", "revision": REVISION}
    cases = [study({**source, **changed}).model_dump() for changed, _ in LACKING]
    with hub(dataset) as (endpoint, _):
        result = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "out")],
            env=environment(tmp_path, endpoint),
            input=json.dumps(cases),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    lines = result.stdout.splitlines()
    assert len(lines) == len(LACKING), result.stdout
    for line, (_, message) in zip(lines, LACKING, strict=True):
        assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("offline", [False, True])
def test_an_unreachable_hub_is_asked_once(offline: bool, tmp_path: Path) -> None:
    """Its client, left to itself, tries again and again for half a minute."""
    calls: list[object] = []

    class HangUp(BaseRequestHandler):
        def handle(self) -> None:
            calls.append(self.client_address)

    with ThreadingTCPServer(("127.0.0.1", 0), HangUp) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        result = run_step(tmp_path, None if offline else f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
    assert len(calls) == (0 if offline else 1)
    assert_one_line(result, "corpus owner/texts: the Hub cannot be reached (", tmp_path)
    assert "; set corpus.source: directory and corpus.path to a folder with train/validation/test .txt" in result.stderr


def assert_one_line(result: subprocess.CompletedProcess[str], message: str, tmp_path: Path) -> None:
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("bwsk: error: ")
    assert message in lines[0]
    assert not (tmp_path / "out").exists()
