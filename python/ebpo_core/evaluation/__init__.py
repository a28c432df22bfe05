"""Evaluation by sampling: avg@k, pass@k and maj@k with bootstrap intervals, from transformers or a server.

``ebpo eval`` is its command and :func:`evaluate` gives pass@1 of a model in memory; the parts work alone.
:mod:`~ebpo_core.evaluation.estimators` are the numbers, :mod:`~ebpo_core.evaluation.local_model` and
:mod:`~ebpo_core.evaluation.server` draw the samples, :mod:`~ebpo_core.evaluation.journal` keeps them through a kill,
:mod:`~ebpo_core.evaluation.scoring` scores them.

Importing this needs NumPy alone; torch, transformers, matplotlib and rich are imported where they are used.
"""

from __future__ import annotations

from ebpo_core.data import Problem

from .estimators import Interval, bootstrap, majority_at_k, pass_at_k
from .journal import Journal, read_journal
from .local_model import LocalModel, complete
from .pass_at_1 import Evaluation, evaluate
from .problems import PromptFormat, load_problems
from .sampling import Backend, Completion, Request, SamplingOptions, collect, sample_seed
from .scoring import MathScorer, RewardScorer, Scored, Scorer, load_scorer
from .server import Server, ServerError, ServerModel
from .summary import Summary, summarize, write_results

__all__ = [
    "Backend",
    "Completion",
    "Evaluation",
    "Interval",
    "Journal",
    "LocalModel",
    "MathScorer",
    "Problem",
    "PromptFormat",
    "Request",
    "RewardScorer",
    "SamplingOptions",
    "Scored",
    "Scorer",
    "Server",
    "ServerError",
    "ServerModel",
    "Summary",
    "bootstrap",
    "collect",
    "complete",
    "evaluate",
    "load_problems",
    "load_scorer",
    "majority_at_k",
    "pass_at_k",
    "read_journal",
    "sample_seed",
    "summarize",
    "write_results",
]
