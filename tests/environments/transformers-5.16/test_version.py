"""The suites of ``tests.txt`` run in this folder's environment; here only: that it is the environment meant."""

from __future__ import annotations

import transformers


def test_this_is_the_oldest_transformers_that_fusionroute_supports() -> None:
    assert transformers.__version__ == "5.16.0"
