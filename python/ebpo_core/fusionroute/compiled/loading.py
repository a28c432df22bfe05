"""Compiled experts of a checkpoint: loaded beside its router, refused where the router is another one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ebpo_core.fusionroute.experts.references import ExpertReference

from .experts import CompiledExperts
from .files import read_adapters, router_hash
from .targets import target_modules


def load_compiled(
    router: Any,
    compiled: Mapping[str, Any],
    references: Iterable[ExpertReference],
    folder: Path,
    *,
    verify: bool = True,
) -> CompiledExperts:
    """The compiled experts of a checkpoint.

    Args:
        router: of the checkpoint, loaded.
        compiled: of its config.
        references: of the experts, in order.
        folder: of the checkpoint, see :func:`~.files.compiled_folder`.
        verify: compare the weights with those that the adapters were trained beside.

    Raises:
        FileNotFoundError, ValueError: adapters that are missing or do not fit, or a router that has changed.
    """
    known = list(references)
    found = router_hash(folder) if verify else compiled["router"]
    if found != compiled["router"]:
        raise ValueError(
            f"the router in {str(folder)!r} is not the one its experts were compiled for: the config has "
            f"{compiled['router']}, found {found}. Compile the checkpoint again (fusionroute compile), or load it with "
            "compiled=False, which loads the experts themselves"
        )
    modules = target_modules(router)
    adapters = read_adapters(folder, [each.name for each in known], modules, compiled["rank"], float(compiled["scale"]))
    adapters.to(router.device, router.dtype)
    return CompiledExperts(router, adapters, known, folder)
