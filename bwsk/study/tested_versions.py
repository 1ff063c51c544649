"""The range of versions that the tests cover: from pyproject.toml's lower bounds to the newest."""

from __future__ import annotations

import platform
import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from itertools import chain
from pathlib import Path

import bwsk

# `make test-newest` has passed with these (Python: `make test-lowest`). Patch releases are not distinguished.
NEWEST = {
    "Python": "3.12",
    "torch": "2.14",
    "transformers": "5.24",
    "huggingface_hub": "2.4",
    "snakemake": "9.27",
    "dvc": "3.67",
}


def floors() -> dict[str, str]:
    """The lowest versions that this package requires, of those in `NEWEST`; empty if its requirements are unknown."""
    found = (re.match(r"([\w.-]+)>=([\d.]+)", line) for line in _asked())
    return {match[1]: match[2] for match in found if match and match[1] in NEWEST}


def _asked() -> list[str]:
    """The requirements in the checkout's pyproject.toml, or else in the installed package's metadata."""
    checkout = Path(bwsk.__file__).parents[1] / "pyproject.toml"
    if checkout.is_file():
        project = tomllib.loads(checkout.read_text(encoding="utf-8"))["project"]
        python, lines = (
            project["requires-python"],
            [project["dependencies"], *project["optional-dependencies"].values()],
        )
        return [f"Python{python}", *chain.from_iterable(lines)]
    try:
        about = metadata.metadata("bwsk")
    except metadata.PackageNotFoundError:
        return []
    return [f"Python{about['Requires-Python']}", *(about.get_all("Requires-Dist") or [])]


def installed() -> dict[str, str]:
    """The installed versions of the packages in `NEWEST`."""
    found = {"Python": platform.python_version()}
    for name in NEWEST:
        try:
            found.setdefault(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return found


def outside() -> Iterator[tuple[str, str, str]]:
    """Installed packages outside of the tested range: name, what was found, what to do."""
    lowest = floors()
    for name, version in installed().items():
        if _release(version) > _release(NEWEST[name]):
            yield name, f"{version}, newer than the tested {NEWEST[name]}", "if it fails, use requirements.lock"
        elif name in lowest and _release(version) < _release(lowest[name]):
            yield name, f"{version}, older than the floor {lowest[name]}", f"install {name} {lowest[name]} or newer"


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
