"""Names of a package that are imported at their first use, so that importing the package costs nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazily(package: str, homes: Mapping[str, str], extra: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of ``package`` (PEP 562): ``homes`` maps each name to the module inside that defines it.

    Args:
        package: the package's ``__name__``.
        homes: module of each name, relative to the package: ``{"EBPOTrainer": "trainer"}``.
        extra: what installs the libraries that these modules import, for the error where one is missing.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(f"{package}.{homes[name]}")
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("ebpo_core"):
                raise
            raise ImportError(
                f"{package}.{name} needs the module {error.name!r}, which was not found: "
                f'pip install "ebpo-core[{extra}]" (Python 3.11 or newer)'
            ) from error
        return getattr(module, name)

    return get
