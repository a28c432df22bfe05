"""Settings for every test here: what vLLM's packages warn of on a CPU machine is not this package's doing."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("checkpoints")


def pytest_configure(config: pytest.Config) -> None:
    for line in ("ignore::DeprecationWarning:(?!ebpo_core)", "ignore::FutureWarning:(?!ebpo_core)"):
        config.addinivalue_line("filterwarnings", line)
