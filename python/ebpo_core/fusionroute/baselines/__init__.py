"""Baselines that FusionRoute is compared with: merged weights, and the best of several full answers.

Each is a few lines with its formulas, to be read beside its paper; to merge models of many gigabytes, use a tool that
is made for it.
"""

from .merging import dare, task_arithmetic, ties
from .sequence import Selection, likelihood_scores, reward_scores, select_sequences

__all__ = [
    "Selection",
    "dare",
    "likelihood_scores",
    "reward_scores",
    "select_sequences",
    "task_arithmetic",
    "ties",
]
