"""Settings shared by every test: reproducible property tests, and one thread per library on small machines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tiny models are slower on more threads
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a hub

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "repository",
    deadline=None,  # timing belongs into benches
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repository")


@pytest.fixture
def served() -> Iterator[Any]:
    """A server of the answer in :mod:`serving_script`."""
    from openai_server import running  # these import transformers, which most tests do without
    from serving_script import script_server

    with running(script_server()) as server:
        yield server
