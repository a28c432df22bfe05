"""Settings for every test here: fresh estimators, sources on the import path, frameworks' own warnings let pass."""

from __future__ import annotations

import importlib
import os
import sys
import typing

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; unset, it warns
os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's 15 a suite that runs beside leaves its workers no core
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import typing_extensions
from fetch_sources import SOURCES, roots

# SkyRL and NeMo-RL are made for Python 3.12 and later, where pydantic takes typing's own TypedDict.
if sys.version_info < (3, 12):
    typing.TypedDict = typing_extensions.TypedDict  # type: ignore[assignment]

# First what is to be an error, then what frameworks and the libraries below them say of themselves.
QUIET = (
    "ignore::DeprecationWarning:(?!ebpo_core)",
    "ignore::FutureWarning:(?!ebpo_core)",
    "ignore::PendingDeprecationWarning",
    "ignore::ResourceWarning",
    "ignore::SyntaxWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::UserWarning:(?!ebpo_core)",
)

for name in SOURCES:
    sys.path[:0] = [str(root) for root in roots(name)]


def pytest_configure(config: pytest.Config) -> None:
    for line in QUIET:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process has one estimator for each framework: every test starts without, and with warnings to come."""
    from ebpo_core.integrations import checks

    monkeypatch.delenv("EBPO_OPTIONS", raising=False)
    monkeypatch.setattr(checks, "_warned", set())
    for name in ("skyrl", "slime", "rllm", "contrib.openrlhf", "contrib.nemo_rl", "contrib.prime_rl"):
        module = sys.modules.get(f"ebpo_core.integrations.{name}")
        if module is not None:
            module.estimator.reset()


@pytest.fixture(scope="session")
def local_ray() -> typing.Iterator[None]:
    """A Ray of two processes on this machine."""
    ray = importlib.import_module("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
