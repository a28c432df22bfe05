"""Training of FusionRoute routers (arXiv 2601.05106 §4); ``pip install "ebpo-core[fusionroute]"``.

``FusionRouteSFTTrainer`` with ``FusionRouteSFTConfig`` is the first phase, ``FusionRouteCDPOTrainer`` with
``FusionRouteCDPOConfig`` the second. Both keep what the frozen experts say of the data, see :func:`expert_columns`. The
losses are in :mod:`.losses`, and in NumPy beside the paper's formulas in :mod:`.reference`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpo_core.lazy import lazily

if TYPE_CHECKING:
    from .cdpo import FusionRouteCDPOTrainer
    from .config import FusionRouteCDPOConfig, FusionRouteSFTConfig
    from .data import tokenize_pairs, tokenize_samples
    from .expert_cache import ExpertSource, expert_columns
    from .held_out import evaluate_pairs, evaluate_samples
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
    "evaluate_pairs",
    "evaluate_samples",
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
    "evaluate_pairs": "held_out",
    "evaluate_samples": "held_out",
    "expert_columns": "expert_cache",
    "tokenize_pairs": "data",
    "tokenize_samples": "data",
}

__getattr__ = lazily(__name__, _LAZY, "fusionroute")
