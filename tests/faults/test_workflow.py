"""The whole study through Snakemake: the same bytes from every run, whatever was killed on the way."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.harness import digest
from tests.workflow.dvc_study import Checkout, environment, new_checkout

pytestmark = pytest.mark.faults

# Two variants, so that jobs run side by side; small, so that it is the steps that are killed and not the waiting.
TWO = {
    "variants.inits": ["scratch"],
    "variants.modes": ["conventional", "bwsk-reversible"],
    "train.checkpoint_every": 2,
}
COMMAND = ["snakemake", "--directory", "demo", "--cores", "2", "--resources", "gpu=0"]
SEED = 7
KILLS = 5


@pytest.fixture(scope="module")
def two_variants(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return new_checkout(tmp_path_factory.mktemp("workflow") / "two", TWO)


@pytest.fixture(scope="module")
def whole(two_variants: Checkout, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkout, float]:
    """An undisturbed run, and its seconds."""
    checkout = two_variants.copy(tmp_path_factory.mktemp("whole") / "author")
    started = time.monotonic()
    checkout.snakemake(*COMMAND[3:])
    return checkout, time.monotonic() - started


@pytest.fixture(scope="module")
def reference(whole: tuple[Checkout, float]) -> tuple[dict[str, str], float]:
    """Hashes of its files, and its seconds."""
    return made(whole[0]), whole[1]


def made(checkout: Checkout) -> dict[str, str]:
    """Hash of every artifact without wall-clock figures; of records with such figures, of the rest of them."""
    roots = ("build/corpus", "build/tokenizer", "build/tokens", "build/base", "build/curves", "results")
    files = [file for root in roots for file in sorted((checkout.study / root).rglob("*")) if file.is_file()]
    # The card, its figures and results.json hold times; results.json is held by its parts.
    return {
        str(file.relative_to(checkout.study)): digest(file)
        for file in files
        if file.name not in ("README.md", "results.json", "memory_and_time.png")
    }


def start(checkout: Checkout) -> subprocess.Popen[str]:
    return subprocess.Popen(
        COMMAND,
        cwd=checkout.root,
        env=environment(checkout.root),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def jobs_of(process: subprocess.Popen[str]) -> list[int]:
    """Processes of bwsk in the session of this Snakemake."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                session = int((entry / "stat").read_text().rpartition(")")[2].split()[3])
            except (OSError, ValueError):
                continue
            if session == process.pid and b"\0bwsk\0" in command:
                found.append(int(entry.name))
    return found


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Snakemakes that a test has started; their sessions end with it, orphaned jobs included."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("whom", ["snakemake", "job", "all"])
def test_killed_over_and_over_and_continued_by_the_same_command(
    two_variants: Checkout,
    reference: tuple[dict[str, str], float],
    tmp_path: Path,
    started: list[subprocess.Popen[str]],
    figures: Counter[str],
    whom: str,
) -> None:
    """SIGKILL to Snakemake alone (its jobs go on as orphans), to one job, or to everything at once."""
    hashes, seconds = reference
    checkout = two_variants.copy(tmp_path / "author")
    draw = random.Random(f"{SEED} {whom}")
    for _ in range(KILLS):
        process = start(checkout)
        started.append(process)
        deadline = time.monotonic() + draw.uniform(3.0, max(seconds / 4, 6.0))
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        jobs = jobs_of(process)
        if process.poll() is not None:
            break
        targets = {"snakemake": [process.pid], "job": jobs[:1], "all": [process.pid, *jobs]}[whom]
        for pid in targets:
            os.kill(pid, signal.SIGKILL)
            figures["kills"] += 1
            figures["kills in the workflow"] += 1
        if whom == "job":
            os.kill(process.pid, signal.SIGINT)
        process.wait(timeout=120)
    output = checkout.snakemake(*COMMAND[3:])
    assert "--unlock" not in output
    assert made(checkout) == hashes
    assert "Nothing to be done" in checkout.snakemake(*COMMAND[3:])
    assert not list(checkout.study.rglob(".partial-*"))


def test_a_second_snakemake_says_who_holds_the_study(
    two_variants: Checkout, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    checkout = two_variants.copy(tmp_path / "author")
    first = start(checkout)
    started.append(first)
    while first.poll() is None and not list((checkout.study / ".snakemake" / "locks").glob("*.lock")):
        time.sleep(0.05)
    time.sleep(1.0)
    said = checkout.snakemake(*COMMAND[3:], ok=False)
    assert re.search(rf"bwsk: this study is in use by pid {first.pid} on \S+, snakemake", said), said
    # A look at what would run is allowed meanwhile, and does not take the locks away.
    checkout.snakemake("--cores", "1", "--dry-run")
    assert list((checkout.study / ".snakemake" / "locks").glob("*.lock"))
    assert first.poll() is None


def test_twice_from_scratch_and_on_any_number_of_cores_the_same_weights(tmp_path: Path) -> None:
    """All six variants, made twice from nothing, one job at a time and two side by side."""
    found = []
    for cores in ("1", "2"):
        checkout = new_checkout(tmp_path / cores, {})
        checkout.snakemake("--cores", cores, "--resources", "gpu=0")
        found.append(made(checkout))
    weights = {name for name in found[0] if name.startswith("results/") and name.endswith("model.safetensors")}
    assert len(weights) == 6
    assert found[0] == found[1]


def test_a_tampered_result_is_not_published_and_is_made_again(
    whole: tuple[Checkout, float], tmp_path: Path, reference: tuple[dict[str, str], float]
) -> None:
    """A file of results/ that was tampered with is caught by the commands that publish."""
    checkout = whole[0].copy(tmp_path / "author")
    weights = checkout.study / "results" / "scratch-conventional" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-9] ^= 4
    weights.write_bytes(content)
    said = checkout.run("bwsk", "results", ok=False)
    assert "model.safetensors is not the trained file" in said
    checkout.snakemake(*COMMAND[3:], "--force", "results/scratch-conventional/model.safetensors")
    checkout.snakemake(*COMMAND[3:])
    assert made(checkout) == reference[0]


def test_checkout_and_study_may_be_called_anything(tmp_path: Path) -> None:
    checkout = new_checkout(tmp_path / 'it\'s $HOME "b" é', TWO)
    checkout.study.rename(checkout.root / "my {x} $HOME 'study'")
    command = ["snakemake", "--directory", "my {x} $HOME 'study'", "--cores", "1", "build/tokenizer/info.json"]
    checkout.run("sh", "-c", 'umask 0; exec "$0" "$@"', *command, cwd=checkout.root)
    for folder in ("build", "build/tokenizer"):  # for everybody to read at most, whatever the umask
        assert not (checkout.root / command[2] / folder).stat().st_mode & 0o002
    planned = checkout.run(*command[:-1], "--dry-run", cwd=checkout.root, PWD=str(checkout.root))
    assert "tail -f my {x} $HOME 'study'/build/logs/base.log" in planned
