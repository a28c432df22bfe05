"""pytest-benchmark over the sizes of a training step: ``pytest benches --benchmark-only``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import ebpo_core
from ebpo_core import reference

PATHS: dict[str, Callable[[Any], Any]] = {
    "core": ebpo_core.advantages,
    "core-stateful": ebpo_core.EBPO(),
    "numpy-twin": reference.algorithm_1,
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("groups", "size"), [(64, 8), (128, 17), (512, 8), (1024, 16), (4096, 16)])
def test_advantages(benchmark: Any, path: str, groups: int, size: int) -> None:
    rewards = (np.random.default_rng(0).random((groups, size)) < 0.3).astype(np.float32)
    benchmark.group = f"{groups}x{size}"
    result = benchmark(PATHS[path], rewards)
    assert np.isfinite(result).all()
