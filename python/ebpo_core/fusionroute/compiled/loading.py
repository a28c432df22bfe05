"""Compiled experts of a checkpoint: loaded beside its router, refused where the router is another one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from ebpo_core.fusionroute.experts.references import ExpertReference

from .experts import CompiledExperts
from .files import compiled_folder, read_adapters, router_hash
from .targets import target_modules


def load_compiled(
    router: Any,
    compiled: Mapping[str, Any],
    references: Iterable[ExpertReference],
    checkpoint: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str = "",
    verify: bool = True,
) -> CompiledExperts:
    """The compiled experts of ``checkpoint``.

    Args:
        router: of the checkpoint, loaded.
        compiled: of its config.
        references: of the experts, in order.
        checkpoint, revision, subfolder: folder, or hub id with its revision, and where in it.
        verify: compare the weights with those that the adapters were trained beside.

    Raises:
        FileNotFoundError, ValueError: adapters that are missing or do not fit, or a router that has changed.
    """
    known = list(references)
    folder = compiled_folder(checkpoint, revision, subfolder)
    found = router_hash(folder) if verify else compiled["router"]
    if found != compiled["router"]:
        raise ValueError(
            f"the router in {os.fspath(checkpoint)!r} is not the one its experts were compiled for: the config has "
            f"{compiled['router']}, found {found}. Compile the checkpoint again (fusionroute compile), or load it with "
            "compiled=False, which loads the experts themselves"
        )
    modules = target_modules(router)
    adapters = read_adapters(folder, [each.name for each in known], modules, compiled["rank"], float(compiled["scale"]))
    adapters.to(router.device, router.dtype)
    return CompiledExperts(router, adapters, known, folder)
