"""Baselines that FusionRoute is compared with: merged weights, and the best of several full answers.

Each is a few lines with its formulas, to be read beside its paper. :func:`merge_folders` applies a merging method to
models on the disk, tensor by tensor.
"""

from .merging import dare, task_arithmetic, ties
from .merging_folders import merge_folders
from .sequence import Selection, likelihood_scores, reward_scores, select_sequences

__all__ = [
    "Selection",
    "dare",
    "likelihood_scores",
    "merge_folders",
    "reward_scores",
    "select_sequences",
    "task_arithmetic",
    "ties",
]
