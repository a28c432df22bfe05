"""EBPO inside TRL: ``from ebpo_core.trainer import EBPOConfig, EBPOTrainer``; ``pip install "ebpo-core[train]"``.

``EBPOConfig`` / ``EBPOTrainer`` are TRL's ``GRPOConfig`` / ``GRPOTrainer`` with the advantages of arXiv 2602.05165;
``EBPOArguments`` / ``EBPOMixin`` are the two halves to put in front of another GRPO-like pair of classes.
The checkpoint helpers (``read_prior``, ``write_prior``, ``last_complete_checkpoint``) work without TRL.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ebpo_core.checkpoint import PRIOR_NAME, is_complete, last_complete_checkpoint, read_prior, write_prior

if TYPE_CHECKING:
    from .config import EBPOArguments, EBPOConfig
    from .trainer import EBPOMixin, EBPOTrainer

__all__ = [
    "PRIOR_NAME",
    "EBPOArguments",
    "EBPOConfig",
    "EBPOMixin",
    "EBPOTrainer",
    "is_complete",
    "last_complete_checkpoint",
    "read_prior",
    "write_prior",
]

_LAZY = {
    "EBPOArguments": "config",
    "EBPOConfig": "config",
    "EBPOMixin": "trainer",
    "EBPOTrainer": "trainer",
}


def __getattr__(name: str) -> Any:
    # TRL takes seconds to import and is an extra, while reading a prior needs neither: load it at first use.
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_LAZY[name]}", __name__)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ebpo_core"):
            raise
        raise ImportError(
            f"{__name__}.{name} needs TRL >= 1.16, and the module {error.name!r} was not found: "
            'pip install "ebpo-core[train]" (Python >= 3.11)'
        ) from error
    return getattr(module, name)
