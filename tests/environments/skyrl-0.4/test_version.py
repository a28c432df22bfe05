"""The suite of ``tests.txt`` runs in this folder's environment; here only: that it is the environment meant."""

from __future__ import annotations

import sys
from importlib.metadata import version

import pytest


@pytest.mark.skipif(sys.version_info < (3, 12), reason="SkyRL 0.4.0 needs Python 3.12 or newer; see docs/frameworks.md")
def test_this_is_the_newest_skyrl() -> None:
    assert version("skyrl") == "0.4.0"
