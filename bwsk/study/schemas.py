"""JSON files of a study, checked against the JSON schemas in `workflow/schemas/`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from bwsk.errors import BwskError
from bwsk.files import read_json
from bwsk.study.repository import WORKFLOW


def read_checked(path: Path, schema: str, part: str | None = None) -> dict[str, Any]:
    """The JSON object in `path`, valid by `workflow/schemas/<schema>.schema.json` (or by one of its `$defs`).

    Raises a one-line BwskError that names the file, the key and what was found.
    """
    value = read_json(path)
    error = next(iter(sorted(_validator(schema, part).iter_errors(value), key=_depth_first)), None)
    if error is not None:
        key = ".".join(map(str, error.absolute_path)) or "top level"
        problem = " ".join(error.message.split())
        problem = problem if len(problem) <= 160 else problem[:157] + "…"
        raise BwskError(f"{path}: {key}: {problem}; delete it and run the step that makes it")
    return value


@cache
def _validator(schema: str, part: str | None) -> Any:
    from jsonschema import Draft202012Validator

    document = read_json(WORKFLOW / "schemas" / f"{schema}.schema.json")
    return Draft202012Validator(document if part is None else document["$defs"][part])


def _depth_first(error: Any) -> tuple[int, str]:
    """The most specific of several errors first: it names the key that is wrong."""
    return -len(error.absolute_path), str(list(error.absolute_path))
