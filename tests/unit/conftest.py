"""Fixtures of the unit tests: a finished tiny study, made once (see `study_fixture`)."""

from tests.unit.study_fixture import editable, params, study

__all__ = ["editable", "params", "study"]
