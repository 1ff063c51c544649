"""What a system lacks that Linux has is one line where it is needed, and no matter where it is not.

The systems are this one with things taken away: from bwsk alone, as Python's own libraries and torch have looked at
the system's name and not at what it has.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import T5Config

from bwsk import locks
from bwsk.errors import BwskError
from tests.tiny import make_inputs

_ASKS = """
import builtins, ctypes, io, os, platform, sys
def asks_for_bwsk(depth=4):
    frame = sys._getframe(2)
    for _ in range(depth):  # by way of pathlib
        if frame is None:
            return False
        if frame.f_globals.get("__name__", "").startswith("bwsk"):
            return True
        frame = frame.f_back
    return False
def lacking(function, lacks, error):
    def run(*args, **options):
        if lacks(args[0] if args else None) and asks_for_bwsk():
            raise error
        return function(*args, **options)
    return run
"""
# macOS: no /proc, no control groups, no glibc, and two numbers less.
MACOS = f"""{_ASKS}
absent = FileNotFoundError(2, "No such file or directory")
def linux_only(path):
    return str(path).startswith(("/proc", "/sys/fs"))
io.open, os.stat = (lacking(function, linux_only, absent) for function in (io.open, os.stat))
os.sysconf = lacking(os.sysconf, "SC_AVPHYS_PAGES".__eq__, ValueError("unrecognized configuration name"))
platform.libc_ver = lambda *args, **options: ("", "")
ctypes.CDLL = lacking(ctypes.CDLL, lambda name: name is None, OSError("no such library"))
del os.sched_getaffinity
"""
# Windows: no locks, limits or numbers of the system's either.
WINDOWS = f"""{MACOS}
os.sysconf = lacking(os.sysconf, lambda name: True, AttributeError("module 'os' has no attribute 'sysconf'"))
builtins.__import__ = lacking(builtins.__import__, ("fcntl", "resource").__contains__, ModuleNotFoundError("none here"))
"""


def python(prelude: str, code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", prelude + code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)


def bwsk(prelude: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = f"import sys\nsys.argv = ['bwsk', *{arguments!r}]\nfrom bwsk.cli import main\nmain()"
    return python(prelude, code, cwd)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    small = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**small.to_dict(), "architectures": ["T5ForConditionalGeneration"]}))
    return path


LIBRARY = """
import bwsk, torch
from transformers import AutoConfig, T5ForConditionalGeneration
config = AutoConfig.from_pretrained("config.json")
model = T5ForConditionalGeneration(config).train()
tokens = torch.ones(2, 4, dtype=torch.long)
def gradient():
    torch.manual_seed(0)
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return model.shared.weight.grad.clone()
stock = gradient()
assert bwsk.classify(model).s_ratio > 0
assert bwsk.trace(model, batch=2, input_length=4).operations
assert bwsk.predict_memory(model, batch=2, input_length=4).peak_mib > 0
handle = bwsk.make_reversible(model)
assert torch.equal(gradient(), stock)
"""


@pytest.mark.parametrize("system", [WINDOWS, MACOS], ids=["windows", "macos"])
def test_the_library_works_without_what_only_linux_has(system: str, config: Path) -> None:
    done = python(system, LIBRARY, config.parent)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("system", [WINDOWS, MACOS], ids=["windows", "macos"])
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["classify", "config.json"], ["plan", "config.json"]])
def test_commands_that_write_nothing_work_as_well(system: str, arguments: list[str], config: Path) -> None:
    done = bwsk(system, *arguments, cwd=config.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_studies_need_a_posix_system_and_say_so_in_one_line(config: Path, study: Path) -> None:
    place = config.parent
    for arguments in (
        ["tokens", "--params", str(study / "params.yaml"), "--corpus", str(study / "build" / "corpus"),
         "--tokenizer", str(study / "build" / "tokenizer"), "--out", "tokens"],
        ["train", "finetune-conventional", "--params", str(study / "params.yaml"), "--gpus", "0", "--out", "out"],
        ["classify", "config.json", "--json", "census.json"],
    ):  # fmt: skip
        done = bwsk(WINDOWS, *arguments, cwd=place)
        assert done.returncode == 1, arguments
        (line,) = done.stderr.splitlines()
        assert line.startswith("bwsk: error: ")
        assert "needs a POSIX system such as Linux, found linux, which has no flock; run it there" in line
    assert [path.name for path in place.iterdir()] == ["config.json"]


def test_the_doctor_says_that_studies_need_a_posix_system(tmp_path: Path) -> None:
    done = bwsk(WINDOWS, "doctor", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "POSIX" in line]
    assert line.startswith("fail system ")
    assert line.endswith("-> the library alone works here")
    done = bwsk(MACOS, "doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "POSIX" not in done.stdout
    assert "ok   CPU " in done.stdout


def test_a_variant_trains_where_the_system_tells_nothing_about_itself(tmp_path: Path) -> None:
    make_inputs(tmp_path / "study")
    command = ["train", "scratch-bwsk-reversible", "--gpus", "0", "--out", "out"]
    census = "build/analysis/census.json"
    done = bwsk(MACOS, *command, "--census", census, cwd=tmp_path / "study")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "study" / "out" / "training_results.json").read_text())


def test_a_lock_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    with pytest.raises(BwskError, match=r"gpu\.lock: needs a POSIX system"):
        locks.try_lock(tmp_path / "gpu.lock")
    with pytest.raises(BwskError, match="the workflow: needs a POSIX system"):
        locks.require_posix("the workflow")
