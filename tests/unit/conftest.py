"""Fixtures of the unit tests: a finished tiny study and the embedded study's data, made once (see `study_fixture`)."""

from tests.unit.study_fixture import data, editable, params, study

__all__ = ["data", "editable", "params", "study"]
