"""Training of FusionRoute routers (arXiv 2601.05106 §4); ``pip install "ebpo-core[fusionroute]"``.

``FusionRouteSFTTrainer`` with ``FusionRouteSFTConfig`` is the first phase, ``FusionRouteCDPOTrainer`` with
``FusionRouteCDPOConfig`` the second. Both keep what the frozen experts say of the data, see :func:`expert_columns`. The
losses are in :mod:`.losses`, and in NumPy beside the paper's formulas in :mod:`.reference`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cdpo import FusionRouteCDPOTrainer
    from .config import FusionRouteCDPOConfig, FusionRouteSFTConfig
    from .data import tokenize_pairs, tokenize_samples
    from .expert_cache import ExpertSource, expert_columns
    from .sequences import PreferencePairs, TokenSequences
    from .sft import FusionRouteSFTTrainer

__all__ = [
    "ExpertSource",
    "FusionRouteCDPOConfig",
    "FusionRouteCDPOTrainer",
    "FusionRouteSFTConfig",
    "FusionRouteSFTTrainer",
    "PreferencePairs",
    "TokenSequences",
    "expert_columns",
    "tokenize_pairs",
    "tokenize_samples",
]

_LAZY = {
    "ExpertSource": "expert_cache",
    "FusionRouteCDPOConfig": "config",
    "FusionRouteCDPOTrainer": "cdpo",
    "FusionRouteSFTConfig": "config",
    "FusionRouteSFTTrainer": "sft",
    "PreferencePairs": "sequences",
    "TokenSequences": "sequences",
    "expert_columns": "expert_cache",
    "tokenize_pairs": "data",
    "tokenize_samples": "data",
}


def __getattr__(name: str) -> Any:
    # transformers.Trainer takes seconds to import, and accelerate is an extra: load a name at its first use.
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_LAZY[name]}", __name__)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ebpo_core"):
            raise
        raise ImportError(
            f"{__name__}.{name} needs the module {error.name!r}, which was not found: "
            'pip install "ebpo-core[fusionroute]" (Python >= 3.11)'
        ) from error
    return getattr(module, name)
