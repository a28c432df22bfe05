"""The model type ``fusionroute`` in transformers' auto classes, without importing transformers before the user does."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Importing one of ours registers its class, which needs one of transformers' modules.
_AFTER = {
    "transformers.models.auto.configuration_auto": "ebpo_core.fusionroute.config",
    "transformers.models.auto.modeling_auto": "ebpo_core.fusionroute.model",
}


def register_with_transformers() -> None:
    """Register config and model: now if transformers' auto classes are loaded, else right after they are.

    Importing this package must not cost the seconds that torch and transformers take (``fusionroute --help``, traces,
    the client of a server), and yet ``import ebpo_core.fusionroute`` is all that ``from_pretrained`` needs.
    """
    for theirs, ours in _AFTER.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
    if not all(theirs in sys.modules for theirs in _AFTER):
        sys.meta_path.insert(0, _AfterAutoClasses())


class _AfterAutoClasses(MetaPathFinder):
    """Finds transformers' modules of auto classes as Python does, and has ours imported once they are executed."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:  # noqa: ARG002
        if fullname not in _AFTER:
            return None
        sys.meta_path.remove(self)  # or it would be asked again
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, _AFTER[fullname])
        return spec


class _Then(Loader):
    """A module's own loader, followed by the import of another module."""

    def __init__(self, loader: Loader, module: str) -> None:
        self._loader = loader
        self._module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(self._module)
