"""The frozen experts: where they are, what their weights hash to, how they are loaded, shared, offloaded, exported."""

from __future__ import annotations

from .expert import Expert
from .experts import Experts
from .references import ExpertReference
from .tokenizers import check_tokenizers

__all__ = ["Expert", "ExpertReference", "Experts", "check_tokenizers"]
