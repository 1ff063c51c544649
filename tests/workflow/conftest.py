"""Studies that were really trained, once per session; a test that changes one works on a copy."""

from __future__ import annotations

import pytest

from tests.workflow.dvc_study import ONE_VARIANT, Checkout, new_checkout


@pytest.fixture(scope="session")
def one_variant(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A study of one variant, made by `dvc repro` and pushed to the default remote."""
    checkout = new_checkout(tmp_path_factory.mktemp("one") / "author", ONE_VARIANT)
    checkout.dvc("repro")
    return _pushed(checkout)


@pytest.fixture(scope="session")
def six_variants(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """The whole study, made by Snakemake (which runs jobs side by side), taken over into DVC and pushed."""
    checkout = new_checkout(tmp_path_factory.mktemp("six") / "author", {})
    checkout.snakemake("--cores", "2", "--resources", "gpu=0")
    checkout.bwsk("record")
    return _pushed(checkout)


def _pushed(checkout: Checkout) -> Checkout:
    checkout.commit("results")
    checkout.dvc("push")
    return checkout
