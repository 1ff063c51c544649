"""Shared by all tests: one thread, no network, no colour."""

from __future__ import annotations

import os

from hypothesis import settings

# Before torch is imported anywhere: bits depend on the number of threads, and the Hub must never be asked.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_COLOR"] = "1"

# Property-based tests look further on every run of a developer; a verdict on a change must not depend on the draw.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
