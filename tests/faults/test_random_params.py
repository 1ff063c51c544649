"""Parameters at random: whatever stands in params.yaml, it is accepted whole or refused in one line that names it."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bwsk.errors import BwskError
from bwsk.study.params import load_params
from tests.tiny import PARAMS

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["", "hub", "float16", "3e-4", "../..", "\0", "\n", "{}", "finetune", -1, 0, 2**63, 1e400]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


def paths(value: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key path of the tiny study, sections included."""
    if not isinstance(value, dict):
        return [prefix]
    inner = [path for key, part in value.items() for path in paths(part, (*prefix, key))]
    return ([prefix] if prefix else []) + inner


CHANGES = st.lists(st.tuples(st.sampled_from(paths(PARAMS)), VALUES), min_size=1, max_size=3)


def check(file: Path, changes: list[tuple[tuple[str, ...], Any]]) -> bool:
    """Whether the study with these changes is refused; fails unless it is refused well or accepted."""
    content = copy.deepcopy(PARAMS)
    for path, value in changes:
        part: Any = content
        for key in path[:-1]:
            part = part.get(key) if isinstance(part, dict) else None
        if isinstance(part, dict):
            part[path[-1]] = value
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    before = file.read_bytes()
    try:
        params = load_params(file)
    except BwskError as error:
        line = str(error)
        assert "\n" not in line
        assert line.startswith(f"{file}: ") or line.startswith(f"{file}, line ")
        assert len(line) < 1000
        return True
    finally:
        assert file.read_bytes() == before
    assert params.variant_names
    return False


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
def test_random_changes(changes, tmp_path: Path, figures: Counter[str]) -> None:
    figures["random parameters"] += 1
    figures["random parameters refused"] += check(tmp_path / "params.yaml", changes)


@pytest.mark.faults
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
def test_many_random_changes(changes, tmp_path: Path, figures: Counter[str]) -> None:
    figures["random parameters"] += 1
    figures["random parameters refused"] += check(tmp_path / "params.yaml", changes)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_random_bytes(content: bytes, tmp_path: Path, figures: Counter[str]) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes(content)
    with pytest.raises(BwskError) as error:
        load_params(file)
    assert "\n" not in str(error.value)
    figures["random parameters refused"] += 1
    figures["random parameters"] += 1
