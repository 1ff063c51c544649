"""What this machine has, and whether a study could run on it.

Every line is ok, warn (the study runs with a limitation) or fail (it does not run), with advice. Tokens and secrets are
never read. A DVC remote is shown without user, password and query.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from bwsk import _compat
from bwsk.errors import BwskError
from bwsk.locks import require_posix
from bwsk.memory.available import free_host_memory
from bwsk.study import hub
from bwsk.study import tested_versions as tested
from bwsk.study.params import DirectoryCorpus, Params, load_params

Status = Literal["ok", "warn", "fail"]
GIB = 2**30

NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "pydantic")
# What a study needs beyond the library: the extra `study` of the package.
STUDY = ("snakemake", "dvc", "datasets", "pyarrow", "sentencepiece", "protobuf", "jinja2", "matplotlib")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status
    found: str
    advice: str = ""


def examine(study: Path | None) -> list[Finding]:
    """All findings about the machine and, if given, about the study in the directory `study`."""
    findings = [*_software(), *_hardware(study or Path("."))]
    devices = _gpus()
    findings += [finding for finding, _ in devices]
    hub_reason = hub.unreachable()
    findings.append(_hub(hub_reason))
    findings.append(_dvc(study or Path(".")))
    if study is not None:
        findings += _study(study, bool(devices) and any(usable for _, usable in devices), hub_reason)
    return findings


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """The findings as strict JSON, with whether the study could run."""
    return {"runs": runs(findings), "findings": [asdict(finding) for finding in findings]}


def runs(findings: list[Finding]) -> bool:
    """Whether nothing failed."""
    return all(finding.status != "fail" for finding in findings)


def _software() -> Iterator[Finding]:
    yield Finding("Python", "ok", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    try:
        require_posix("study")
    except BwskError as error:
        yield Finding("system", "fail", str(error).split(": ", 1)[1], "the library alone works here")
    groups: tuple[tuple[tuple[str, ...], Status, str], ...] = (
        (NEEDED, "fail", "pip install the package again"),
        (STUDY, "warn", "pip install the extra 'study' to run the workflow"),
    )
    for names, status, advice in groups:
        found = {name: _version(name) for name in names}
        missing = [name for name, version in found.items() if version is None]
        have = ", ".join(f"{name} {version}" for name, version in found.items() if version)
        name = "library" if names is NEEDED else "workflow"
        if missing:
            yield Finding(name, status, f"{', '.join(missing)} missing; have {have or 'none'}", advice)
        else:
            yield Finding(name, "ok", have)
    for what, version, remedy in tested.outside():
        yield Finding(what, "warn", version, remedy)
    for lacking in _compat.missing():
        yield Finding("library", "warn" if lacking.optional else "fail", lacking.found, lacking.advice)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _hardware(place: Path) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    yield Finding("CPU", "ok", f"{cores} cores" + (f", OMP_NUM_THREADS={threads}" if threads else ""))
    memory = free_host_memory()
    if memory is not None:
        status: Status = "ok" if memory >= 4096 else "warn"
        advice = "" if status == "ok" else "T5-small wants 4 GiB; close other programs, or raise the limit set here"
        yield Finding("memory", status, f"{memory / 1024:.1f} GiB free", advice)
    existing = next(folder for folder in (place.resolve(), *place.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    # Six T5-small variants with two checkpoints each, weights and AdamW moments: about 10 GiB.
    status = "ok" if free >= 12 * GIB else "warn"
    advice = "" if status == "ok" else "six T5-small variants with checkpoints want 12 GiB"
    yield Finding("disk", status, f"{free / GIB:.1f} GiB free for the study", advice)
    if not os.access(existing, os.W_OK):
        yield Finding("directory", "fail", f"{existing} is not writable", "run the study where you can write")


def _gpus() -> list[tuple[Finding, bool]]:
    """A finding per GPU and whether it can be used; a single warning if there is none."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = f"none visible to torch (built for {built})" if built else "this torch is built for the CPU alone"
        advice = "six T5-small trainings take hours to days on a CPU; the demo takes minutes"
        return [(Finding("GPU", "warn", why, advice), False)]
    found: list[tuple[Finding, bool]] = []
    for index in range(torch.cuda.device_count()):
        name = f"GPU {index}"
        try:
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            capability = (properties.major, properties.minor)
            supported = [
                "float16",
                *(["bfloat16"] if capability >= (8, 0) or torch.version.hip else []),
                *(["tf32"] if capability >= (8, 0) and not torch.version.hip else []),
            ]
            text = f"{properties.name}, {free / GIB:.1f} GiB free of {total / GIB:.1f} GiB, {', '.join(supported)}"
            low = free < 3 * GIB
            advice = "T5-small trains in 2 to 3 GiB; free the GPU" if low else ""
            found.append((Finding(name, "warn" if low else "ok", text, advice), True))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            found.append((Finding(name, "warn", f"cannot be used ({reason})", "check the driver"), False))
    return found


def _hub(reason: str | None) -> Finding:
    if reason is None:
        return Finding("Hub", "ok", "reachable")
    return Finding("Hub", "warn", f"not reachable ({reason})", "use local copies: source: directory in params.yaml")


def _dvc(place: Path) -> Finding:
    """Whether the repository around `place` has a default DVC remote, and whether a local one exists."""
    if _version("dvc") is None:
        return Finding("DVC", "warn", "not installed", "pip install the extra 'study' to push and pull results")
    command = [sys.executable, "-m", "dvc", "config", "--list"]
    try:
        result = subprocess.run(command, cwd=_existing(place), capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return Finding("DVC", "warn", "does not answer", "run dvc doctor")
    if result.returncode:
        return Finding("DVC", "warn", "not a DVC repository", "run dvc init to version what the study makes")
    config = dict(line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)
    remote = config.get("core.remote")
    url = config.get(f"remote.{remote}.url")
    if not remote or not url:
        return Finding("DVC", "ok", "no default remote", "dvc remote add -d NAME URL, to push and pull results")
    parts = urlsplit(url)
    if parts.scheme in ("", "file") or len(parts.scheme) == 1:
        # `dvc config --list` shows a relative path as an absolute one.
        if Path(parts.path if parts.scheme == "file" else url).is_dir():
            return Finding("DVC", "ok", f"remote {remote}: {url}")
        return Finding(
            "DVC",
            "warn",
            f"remote {remote}: {url} is not there",
            "the first dvc push makes it; or mount it, or dvc remote modify it",
        )
    shown = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
    return Finding("DVC", "ok", f"remote {remote}: {shown}")


def _existing(place: Path) -> Path:
    return next(folder for folder in (place.resolve(), *place.resolve().parents) if folder.is_dir())


# What the steps make when a source is neither the Hub nor a directory.
_MADE_HERE = {
    "corpus": "Python's help topics",
    "tokenizer": "trained on the train split",
    "base": "pretrained on the train split",
}


def _study(study: Path, gpu: bool, hub_reason: str | None) -> Iterator[Finding]:
    """The study's requirements compared with what is available."""
    try:
        params = load_params(study / "params.yaml")
    except BwskError as error:
        yield Finding("study", "fail", str(error), "correct params.yaml")
        return
    yield Finding("study", "ok", f"{params.study.title}: {len(params.variant_names)} variants")
    yield _device(params, gpu)
    needs = []
    for section, source in (("corpus", params.corpus), ("tokenizer", params.tokenizer), ("base", params.base)):
        if source.source == "hub":
            needs.append((section, f"{source.id}@{source.revision[:12]}"))
        elif source.source == "directory":
            yield _directory(section, study / source.path, source)
        else:
            yield Finding(section, "ok", _MADE_HERE[section])
    for section, name in needs:
        if hub_reason is None:
            yield Finding(section, "ok", f"{name} from the Hub")
        elif _cached(section, params):
            yield Finding(section, "ok", f"{name} from the local cache")
        else:
            advice = f"connect, or set {section}.source: directory and {section}.path"
            yield Finding(section, "fail", f"{name} is on the Hub, which cannot be reached", advice)


def _device(params: Params, gpu: bool) -> Finding:
    import torch

    precision = params.train.precision
    if not gpu:
        wants = [key for key in ("train", "evaluate") if getattr(params, key).precision == "fp16"]
        if wants:
            keys = " and ".join(f"{key}.precision" for key in wants)
            return Finding("device", "fail", f"CPU, but {keys} is fp16", f"use a GPU, or set {keys}: fp32")
        return Finding("device", "ok", f"CPU in {precision}, train.threads {params.train.threads} (--resources gpu=0)")
    if precision == "bf16" and not torch.cuda.is_bf16_supported():
        return Finding("device", "fail", "GPU without bfloat16", "set train.precision to fp16 or fp32")
    return Finding("device", "ok", f"GPU in {precision} (--resources gpu={torch.cuda.device_count()})")


def _directory(section: str, path: Path, source: Any) -> Finding:
    """Whether a local source has the files that its step reads."""
    from bwsk.study.base_checkpoint import check_files
    from bwsk.study.corpus import split_file
    from bwsk.study.params import SPLITS
    from bwsk.study.tokenizer import FILES

    advice = f"correct {section}.path in params.yaml"
    try:
        if not path.is_dir():
            raise BwskError(f"{path} is not a directory")
        if isinstance(source, DirectoryCorpus):
            for split in SPLITS:
                split_file(path, split)
        elif section == "base":
            check_files(path, str(path))
        elif not any((path / name).is_file() for name in FILES[:2]):
            raise BwskError(f"{path} has neither tokenizer.json nor spiece.model")
    except BwskError as error:
        return Finding(section, "fail", str(error), advice)
    return Finding(section, "ok", str(path))


def _cached(section: str, params: Params) -> bool:
    """Whether the Hub's local cache holds what the step would fetch, so that it runs without a network."""
    from huggingface_hub import try_to_load_from_cache

    source = getattr(params, section)
    if section == "corpus":
        from datasets import config

        # `datasets` prepares a dataset once: owner___name/config/version/revision.
        prepared = Path(config.HF_DATASETS_CACHE) / source.id.replace("/", "___")
        return prepared.is_dir() and any(prepared.glob(f"{source.config or '*'}/*/{source.revision}/dataset_info.json"))
    names = ["model.safetensors"] if section == "base" else ["tokenizer.json", "spiece.model"]
    found = (try_to_load_from_cache(source.id, name, revision=source.revision) for name in names)
    return any(isinstance(path, str) for path in found)
