"""Clustered sampling of EBPO (arXiv 2602.05165, §3.4): difficulty, topics, and training in their order.

``ebpo curriculum`` is its command. :mod:`~ebpo_core.curriculum.difficulty` turns rollouts into pass rates,
:mod:`~ebpo_core.curriculum.topics` finds labels, :mod:`~ebpo_core.curriculum.samplers` orders, with adapters for TRL
(:mod:`~ebpo_core.curriculum.trl`) and verl (:mod:`~ebpo_core.curriculum.verl`). Importing this needs NumPy alone.
"""

from __future__ import annotations

from .difficulty import Difficulty, arrange, bucket_of, curriculum_rows, difficulties
from .posterior import BetaPrior, Posterior, fit_prior, posterior
from .samplers import CurriculumSampler
from .topics import PAPER_TOPICS, UNLABELLED, column_topics, function_topics, parse_label, server_topics

__all__ = [
    "PAPER_TOPICS",
    "UNLABELLED",
    "BetaPrior",
    "CurriculumSampler",
    "Difficulty",
    "Posterior",
    "arrange",
    "bucket_of",
    "column_topics",
    "curriculum_rows",
    "difficulties",
    "fit_prior",
    "function_topics",
    "parse_label",
    "posterior",
    "server_topics",
]
