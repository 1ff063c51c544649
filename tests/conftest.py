"""Shared by all tests: one thread, no network, no colour."""

from __future__ import annotations

import os

# Before torch is imported anywhere: bits depend on the number of threads, and the Hub must never be asked.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_COLOR"] = "1"
