"""Shared by all tests: one thread, no network, no colour."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported anywhere, and for the processes that tests start too. One thread, because tests are small and
# may run side by side; all must also pass with the number that the caller sets. The Hub must never be asked.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_COLOR"] = "1"

# Property-based tests look further on every run of a developer; a verdict on a change must not depend on the draw.
# Nor does it depend on how fast the machine is.
TIMELESS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("developer", **TIMELESS)
settings.register_profile("ci", derandomize=True, **TIMELESS)
settings.load_profile("ci" if os.environ.get("CI") else "developer")

FIGURES: Counter[str] = Counter()


@pytest.fixture(scope="session")
def figures() -> Counter[str]:
    """What was counted over the session; printed at its end."""
    return FIGURES


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes: what it counted goes to the one that prints
        session.config.workeroutput["faults"] = dict(FIGURES)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    FIGURES.update(getattr(node, "workeroutput", {}).get("faults", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        counts = ", ".join(f"{count} {what}" for what, count in sorted(FIGURES.items()))
        terminalreporter.write_line(f"faults: {counts}")
