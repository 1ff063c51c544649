"""Atomic writes and strict JSON."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bwsk.errors import BwskError
from bwsk.files import atomic_directory, atomic_path, read_json, sha256_file, sha256_json, write_json, write_text


def test_files_appear_together_and_leave_others_alone(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("mine")
    (tmp_path / "a").write_text("old")
    with atomic_directory(tmp_path) as partial:
        (partial / "a").write_text("new")
        (partial / "sub").mkdir()
        (partial / "sub" / "b").write_text("deep")
        assert (tmp_path / "a").read_text() == "old"
        assert not (tmp_path / "sub").exists()
    assert (tmp_path / "a").read_text() == "new"
    assert (tmp_path / "sub" / "b").read_text() == "deep"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "other", "sub"]


@pytest.mark.parametrize("error", [RuntimeError, BwskError, KeyboardInterrupt, SystemExit])
def test_an_exception_changes_nothing(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def fail() -> None:
        with atomic_directory(tmp_path) as partial:
            (partial / "a").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_files_get_the_permissions_of_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_kill_during_writing_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("old")
    script = textwrap.dedent(
        f"""
        import time
        from pathlib import Path
        from bwsk.files import atomic_path
        with atomic_path(Path({str(target)!r})) as partial:
            partial.write_text("half")
            print("writing", flush=True)
            time.sleep(60)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert target.read_text() == "old"
    with atomic_path(target) as partial:
        partial.write_text("new")
    assert target.read_text() == "new"


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from bwsk.files import write_json
        for index in range(60):
            write_json(Path({str(target)!r}), {{"values": [index] * 20000}})
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    seen = set()
    while process.poll() is None:
        if target.exists():
            seen.add(tuple(set(read_json(target)["values"])))
            time.sleep(0.001)
    assert process.returncode == 0
    assert len(seen) > 3
    assert all(len(values) == 1 for values in seen)


def test_a_target_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BwskError, match=r"file: cannot be written \(.*\); name a writable directory"):
        write_json(tmp_path / "file" / "a.json", {})
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("in the way")
    with pytest.raises(BwskError, match="writing failed"):
        write_text(tmp_path / "folder", "x")
    assert (tmp_path / "folder" / "x").read_text() == "in the way"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=30)
@given(st.dictionaries(st.text(), json_values))
def test_json_round_trip(tmp_path_factory: pytest.TempPathFactory, value: dict[str, object]) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value
    assert list(read_json(path)) == list(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_never_written(value: float, tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": [1.0, value]})
    assert read_json(tmp_path / "a.json") == {"old": 1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not strict JSON ("),
        (b"{", "not strict JSON ("),
        (b'{"a": NaN}', "not strict JSON (NaN is not JSON)"),
        (b'{"a": -Infinity}', "not strict JSON (-Infinity is not JSON)"),
        (b"[" * 100_000, "not strict JSON ("),
        (b'{"a": "\xff"}', "not strict JSON ("),
        (b"[1]", "found a JSON list, must be an object"),
        (b"1" * 5000, "not strict JSON ("),
    ],
)
def test_json_that_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(BwskError) as caught:
        read_json(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == data


def test_json_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BwskError, match="no such file; run the step that makes it"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(BwskError, match=r"cannot be read \("):
        read_json(tmp_path)


def test_digests(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_json({"a": 1, "b": [2.5, None]}) == sha256_json({"b": [2.5, None], "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 1.5})
