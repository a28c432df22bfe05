"""EBPO inside TRL: ``from ebpo_core.trainer import EBPOConfig, EBPOTrainer``; ``pip install "ebpo-core[train]"``.

``EBPOConfig`` / ``EBPOTrainer`` are TRL's ``GRPOConfig`` / ``GRPOTrainer`` with the advantages of arXiv 2602.05165;
``EBPOArguments`` / ``EBPOMixin`` are the two halves to put in front of another GRPO-like pair of classes.
The checkpoint helpers (``read_prior``, ``write_prior``, ``last_complete_checkpoint``) work without TRL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpo_core.checkpoint import PRIOR_NAME, is_complete, last_complete_checkpoint, read_prior, write_prior
from ebpo_core.lazy import lazily

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

__getattr__ = lazily(__name__, _LAZY, "train")
