"""A checkout of this repository in a temporary place, with an embedded study that trains in seconds, and its commands.

Nothing is replaced: real git, DVC and Snakemake, run as a user runs them, by their command lines.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).parents[2]
# Small enough for a training in a second, large enough that seeds and learning rates give other weights.
SMALLER: dict[str, Any] = {
    "base.steps": 8,
    "train.max_steps": 6,
    "train.epochs": 1,
    "train.eval_every": 3,
    "train.log_every": 1,
    "evaluate.max_windows": 8,
}
ONE_VARIANT = {"variants.inits": ["scratch"], "variants.modes": ["conventional"]}


@dataclass(frozen=True)
class Checkout:
    """A checkout in `root`; commands run in its study `root/demo` unless told otherwise."""

    root: Path

    @property
    def study(self) -> Path:
        return self.root / "demo"

    def run(self, *command: str, ok: bool = True, cwd: Path | None = None, **variables: str) -> str:
        """Output of a command, both streams; fails the test if its success is not `ok`."""
        done = subprocess.run(
            command,
            cwd=cwd or self.study,
            env={**environment(self.root), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        assert (done.returncode == 0) is ok, f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-6000:]}"
        return done.stdout

    def dvc(self, *arguments: str, ok: bool = True, **variables: str) -> str:
        return self.run("dvc", *arguments, ok=ok, **variables)

    def git(self, *arguments: str, ok: bool = True) -> str:
        return self.run("git", *arguments, ok=ok, cwd=self.root)

    def bwsk(self, *arguments: str, ok: bool = True) -> str:
        return self.run("bwsk", *arguments, ok=ok)

    def snakemake(self, *arguments: str, ok: bool = True) -> str:
        return self.run("snakemake", "--directory", "demo", *arguments, ok=ok, cwd=self.root)

    def commit(self, message: str = "change") -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "-m", message)

    def set(self, **values: Any) -> None:
        """Set values of the study's params.yaml; `train__lr_scratch=…` is `train.lr_scratch`."""
        set_params(self.study / "params.yaml", {key.replace("__", "."): value for key, value in values.items()})

    def stale_stages(self) -> set[str]:
        """What `dvc repro` would run: the stages that DVC finds changed, and all that come after them."""
        lock = yaml.safe_load((self.study / "dvc.lock").read_text())["stages"]
        stale = set(self.status())
        while True:
            made = {out["path"] for name in stale & set(lock) for out in lock[name].get("outs", [])}
            after = {name for name, stage in lock.items() if made & _and_parents(stage.get("deps", []))}
            if after <= stale:
                return stale
            stale |= after

    def stale_jobs(self) -> set[str]:
        """What Snakemake would run, as `rule` or `rule variant`."""
        return _jobs(self.snakemake("--dry-run", "--printshellcmds"))

    def status(self) -> dict[str, Any]:
        return json.loads(self.dvc("status", "--json"))

    def sha256(self) -> dict[str, str]:
        """Hash of each file below results/, and of the tokens and the base checkpoint."""
        roots = ["results", "build/tokens", "build/base", "build/corpus", "build/evaluation", "build/curves"]
        files = [file for root in roots for file in sorted((self.study / root).rglob("*")) if file.is_file()]
        return {str(file.relative_to(self.study)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    def weights(self, variant: str = "scratch-conventional") -> Path:
        return self.study / "results" / variant / "model.safetensors"

    def seed_of(self, variant: str = "scratch-conventional") -> int:
        return json.loads((self.study / "results" / variant / "training_results.json").read_text())["provenance"][
            "seed"
        ]

    def clone(self, target: Path) -> Checkout:
        """`git clone` of what is committed."""
        self.run("git", "clone", "--quiet", str(self.root), str(target), cwd=self.root)
        return Checkout(target)

    def copy(self, target: Path) -> Checkout:
        """A copy with everything, times included: what a test changes."""
        shutil.copytree(self.root, target, symlinks=True)
        return Checkout(target)


def new_checkout(root: Path, params: dict[str, Any]) -> Checkout:
    """A git repository with the files of this project as they lie here, and a smaller embedded study."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.split("\0"):
        if name and (PROJECT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, root / name)
    checkout = Checkout(root)
    set_params(checkout.study / "params.yaml", {**SMALLER, **params})
    checkout.bwsk("stages")
    checkout.git("init", "--quiet", "--initial-branch=main")
    checkout.commit("study")
    return checkout


def set_params(path: Path, values: dict[str, Any]) -> None:
    params = yaml.safe_load(path.read_text())
    for key, value in values.items():
        *sections, name = key.split(".")
        part = params
        for section in sections:
            part = part[section]
        part[name] = value
    path.write_text(yaml.safe_dump(params, sort_keys=False))


def _and_parents(deps: list[dict[str, Any]]) -> set[str]:
    """The paths of dependencies and of the folders that they lie in: an output may be the folder."""
    paths = [Path(dep["path"]) for dep in deps]
    return {folder.as_posix() for path in paths for folder in (path, *path.parents)}


def _jobs(shown: str) -> set[str]:
    """The jobs in what `snakemake --dry-run` prints, told apart by the variant or the mode that their command names."""
    jobs = set()
    for command in re.findall(r"^Shell command: bwsk (.+)$", shown, re.MULTILINE):
        words = command.split()
        if prediction := re.search(r"build/analysis/(memory-\S+)\.json", command) if words[0] == "memory" else None:
            jobs.add(prediction[1])
            continue
        variant = [part for word in words for part in word.split("/") if re.fullmatch(VARIANT, part)]
        jobs.add(" ".join([words[0], *variant[:1]]))
    return jobs


VARIANT = r"(finetune|scratch)-(conventional|bwsk-analyzed|bwsk-reversible)"


def environment(root: Path) -> dict[str, str]:
    keep = ("HOME", "LANG", "LC_ALL", "TMPDIR", "USER", "LOGNAME", "SSH_AUTH_SOCK", "OMP_NUM_THREADS")
    return {
        **{name: os.environ[name] for name in keep if name in os.environ},
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        # The commands of this checkout, not of the one that is installed.
        "PYTHONPATH": str(root),
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
        "COLUMNS": "200",
        "DVC_NO_ANALYTICS": "1",
        # DVC's database of what it has hashed, by default in a place that all repositories of the machine share.
        "DVC_SITE_CACHE_DIR": str(root.parent / "dvc-site-cache"),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        "GIT_AUTHOR_NAME": "A Tester",
        "GIT_AUTHOR_EMAIL": "tester@example.org",
        "GIT_COMMITTER_NAME": "A Tester",
        "GIT_COMMITTER_EMAIL": "tester@example.org",
    }
