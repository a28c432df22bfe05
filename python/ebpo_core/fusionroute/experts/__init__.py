"""The frozen experts: where they are, what their weights hash to, how they are loaded, shared, placed and copied."""

from __future__ import annotations

from .expert import Expert, Experts
from .references import ExpertReference
from .tokenizers import check_tokenizers

__all__ = ["Expert", "ExpertReference", "Experts", "check_tokenizers"]
