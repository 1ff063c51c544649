"""Studies that were really trained, once per session; a test that changes one works on a copy."""

from __future__ import annotations

import pytest

from tests.workflow.dvc_study import ONE_VARIANT, Checkout, new_checkout


@pytest.fixture(scope="session")
def one_variant(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A study of one variant, made by `dvc repro` and pushed to the default remote."""
    return _published(new_checkout(tmp_path_factory.mktemp("one") / "author", ONE_VARIANT))


@pytest.fixture(scope="session")
def six_variants(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """The whole study of six variants, made by `dvc repro` and pushed to the default remote."""
    return _published(new_checkout(tmp_path_factory.mktemp("six") / "author", {}))


def _published(checkout: Checkout) -> Checkout:
    checkout.dvc("repro")
    checkout.commit("results")
    checkout.dvc("push")
    return checkout
