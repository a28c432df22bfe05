"""Empty stand-ins for modules that a framework imports and the code under test never calls, because they need a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any


def stand_in(module: str, *names: str) -> None:
    """Let ``from module import names`` succeed where ``module`` is not installed or cannot be imported."""
    if module in sys.modules:
        return
    made = types.ModuleType(module)
    vars(made).update(dict.fromkeys(names))
    sys.modules[module] = made


def source(name: str, module: str) -> Any:
    """``module`` of a framework in .sources, or skip the calling test module with what to do."""
    import pytest
    from fetch_sources import roots

    if not roots(name):
        pytest.skip(
            f"no source of {name}: python tests/environments/frameworks/fetch_sources.py {name}",
            allow_module_level=True,
        )
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == module.split(".")[0]:
            raise  # the framework has moved it: that is a failure
        pytest.skip(f"{error}: install tests/environments/frameworks/sources.txt", allow_module_level=True)
