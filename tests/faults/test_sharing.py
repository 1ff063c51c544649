"""Several processes at once: a GPU each, one training per variant, one Snakemake per study; and no secrets in files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bwsk.files import partial_folder, sha256_file
from bwsk.locks import holder, try_lock, wait_lock
from bwsk.study.device import claim, visible_gpus
from tests.faults.conftest import Cases
from tests.faults.harness import PROJECT, Server

# A job with a GPU slot on a machine of simulated devices: takes one, says which, holds it until its input ends.
JOB = """
import os, sys
from pathlib import Path
from bwsk.study.device import claim, visible_gpus
names = visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), 4)
index, lock = claim(names, Path(sys.argv[1]), lambda text: print("says", text, flush=True))
print("has", names[index], flush=True)
sys.stdin.read()
"""


class Job:
    def __init__(self, folder: Path, visible: str | None = None) -> None:
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        if visible is not None:
            environment["CUDA_VISIBLE_DEVICES"] = visible
        self.process = subprocess.Popen(
            [sys.executable, "-c", JOB, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def line(self) -> str:
        return self.process.stdout.readline().strip()

    def end(self, number: int | None = None) -> None:
        if number is None:
            self.process.stdin.close()
        else:
            self.process.send_signal(number)
        self.process.wait(timeout=30)


def test_each_job_gets_a_device_of_its_own_and_a_killed_one_gives_it_back(tmp_path: Path) -> None:
    jobs = [Job(tmp_path / "locks") for _ in range(4)]
    assert sorted(job.line() for job in jobs) == ["has 0", "has 1", "has 2", "has 3"]
    fifth = Job(tmp_path / "locks")
    said = fifth.line()
    assert said.startswith("says GPU: all 4 in use, the first by pid ")
    jobs[2].end(signal.SIGKILL)
    assert fifth.line().startswith("has ")
    for job in (fifth, *(job for index, job in enumerate(jobs) if index != 2)):
        job.end()


def test_only_visible_devices_are_taken(tmp_path: Path) -> None:
    first, second = Job(tmp_path / "locks", "3,1"), Job(tmp_path / "locks", "1,3")
    assert {first.line(), second.line()} == {"has 3", "has 1"}
    third = Job(tmp_path / "locks", "0")
    assert third.line() == "has 0"
    for job in (first, second, third):
        job.end()


@pytest.mark.parametrize(
    ("variable", "names"),
    [
        (None, ["0", "1", "2", "3"]),
        ("", []),
        ("-1", []),
        ("2", ["2"]),
        ("2,0", ["2", "0"]),
        ("1,-1,2", ["1"]),
        ("1, 1", ["1"]),
        ("GPU-8932f937,GPU-0abc", ["GPU-8932f937", "GPU-0abc"]),
        ("MIG-1/2/3", ["MIG-1/2/3"]),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(variable: str | None, names: list[str]) -> None:
    assert visible_gpus(variable, 4) == names


def test_a_device_name_is_no_path(tmp_path: Path) -> None:
    _, lock = claim(["../../evil"], tmp_path / "locks", print)
    assert lock.path.parent == tmp_path / "locks"
    lock.release()


def test_a_lock_names_its_holder_and_is_waited_for(tmp_path: Path) -> None:
    path, said = tmp_path / "lock", []
    first = try_lock(path)
    assert first is not None
    assert try_lock(path) is None
    assert f"pid {os.getpid()} on " in holder(path)
    threading.Timer(0.7, first.release).start()
    second = wait_lock(path, "thing", said.append)
    assert second.waited
    assert len(said) == 1
    assert said[0].startswith(f"thing: in use by pid {os.getpid()} on ")
    second.release()


def test_abandoned_partial_folders_go_and_live_ones_stay(tmp_path: Path) -> None:
    (tmp_path / ".partial-abandoned").mkdir()
    (tmp_path / ".partial-abandoned" / "half").write_text("x")
    with partial_folder(tmp_path) as live:
        assert not (tmp_path / ".partial-abandoned").exists()
        with partial_folder(tmp_path) as other:
            assert live.exists()
            assert other != live
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults
def test_a_second_training_waits_and_takes_over_what_the_first_has_made(cases: Cases) -> None:
    name = "scratch-bwsk-reversible"
    reference, _, _ = cases.reference(name)
    training = cases.training(name)
    training.case.mkdir(parents=True)
    with Server() as second:
        answers = []
        thread = threading.Thread(target=lambda: answers.append(training.run(cases.server)))
        thread.start()
        lock = training.case / "checkpoints" / f"{name}.lock"
        while not lock.exists():
            time.sleep(0.01)
        log = training.case / "second"
        answers.append(second.run(training.argv, training.case, log))
        thread.join()
    assert [answer["status"] for answer in answers] == [0, 0]
    said = log.read_text()
    assert f"{name}: in use by pid " in said
    assert "trained meanwhile by the process that was waited for" in said
    assert training.files() == reference


@pytest.mark.faults
def test_a_token_reaches_no_file(cases: Cases, tmp_path: Path) -> None:
    """HF_TOKEN is set through training, evaluation and a failing Hub request; nothing written holds it."""
    marker = "hf_" + "MarkerMarkerMarkerMarkerMarkerMark"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", marker)
        patch.setenv("HUGGING_FACE_HUB_TOKEN", marker)
        with Server() as server:
            name = "scratch-bwsk-analyzed"
            training = cases.training(name, tmp_path)
            assert training.run(server)["status"] == 0
            out = training.case / "out"
            commands = {
                f"evaluate {out} --text {cases.study}/text/test.txt --window 32 --stride 16 --gpus 0 --json e.json": 0,
                "doctor": None,
                "doctor --json doctor.json": None,
                "corpus --params hub.yaml --out c": 1,
                "tokenizer --params hub.yaml --out t": 1,
            }
            text = (PROJECT / "params.yaml").read_text()
            (tmp_path / "hub.yaml").write_text(text)
            for number, (command, status) in enumerate(commands.items()):
                told = server.run(command.split(), tmp_path, tmp_path / f"log-{number}")
                assert status is None or told["status"] == status, (tmp_path / f"log-{number}").read_text()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 12
    for path in written:
        assert marker.encode() not in path.read_bytes(), path


def test_permissions_of_results_are_sane(cases: Cases) -> None:
    name = "finetune-conventional"
    cases.reference(name)
    training = cases.training(name)
    assert training.run(cases.server)["status"] == 0
    umask = os.umask(0)
    os.umask(umask)
    for path in (training.case / "out").rglob("*"):
        assert path.stat().st_mode & 0o7777 == 0o644 & ~umask, path
    record = json.loads((training.case / "out" / "training_results.json").read_text())
    assert record["provenance"]["weights_sha256"] == sha256_file(training.case / "out" / "model.safetensors")
