"""Settings for every test here: verl warns, at import, of each optional engine that a CPU machine has not."""

from __future__ import annotations

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; unset, it warns
os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's 15 a suite that runs beside leaves its workers no core

import pytest

QUIET = (
    "ignore:.* engine is not available:UserWarning",
    "ignore:NPU not support router replay:UserWarning",
    "ignore:Disabled critic as algorithm.adv_estimator:UserWarning",
    "ignore::DeprecationWarning:(?!ebpo_core)",
    "ignore::FutureWarning:(?!ebpo_core)",
)


def pytest_configure(config: pytest.Config) -> None:
    for line in QUIET:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True)
def empty_prior() -> None:
    """A process has one estimator: every test starts without one."""
    from ebpo_core.integrations import verl

    verl.reset()
