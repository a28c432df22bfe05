"""The advantage estimator ``ebpo`` for rLLM: ``import ebpo_core.integrations.rllm`` in the script that trains, then::

    rllm.algorithm.adv_estimator=ebpo

rLLM calls the estimator with the groups of one role at a time: all of a batch in its synchronous trainer, a single one
as soon as it is finished in the asynchronous buffer. A single group has no batch to be centred on, so it is scored in
streaming mode (:meth:`ebpo_core.EBPO.group`). Each role has a prior of its own, which falls back on the one of all
roles while it is young.

rLLM's checkpoints have no place for an estimator's state. Call :func:`save` and :func:`load` beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rllm.trainer.algorithms.advantage import register_rllm_adv_estimator
from rllm.trainer.algorithms.config import rLLMAdvantageEstimator

from ebpo_core.checkpoint import write_prior
from ebpo_core.estimator import EBPO
from ebpo_core.integrations import checks, process

NAME = "ebpo"

Array = NDArray[np.float64]

estimator = process.ProcessEstimator()


def compute_ebpo_advantages(
    rewards: Sequence[Array], algorithm_config: Any = None, **kwargs: Any
) -> tuple[list[Array], list[Array]]:
    """The estimator as rLLM calls it with the groups of one role: they enter the prior, then are scored.

    Args:
        rewards: One ``(n_m,)`` array a group, of any sizes.
        algorithm_config: rLLM's; ``norm_adv_by_std_in_grpo=False`` means ``normalize="none"``, as for its GRPO, where
            ``EBPO_OPTIONS`` does not say.
        kwargs: ``traj_groups``, aligned with ``rewards``; their ``group_role`` chooses the prior.

    Returns:
        Advantages and returns, the same list twice, in the shapes of ``rewards``.

    Raises:
        ValueError: rewards that are not finite, or wrong options. The prior is then untouched.
    """
    if not rewards:
        return [], []
    ebpo = running(algorithm_config)
    flat = np.concatenate([np.asarray(group, dtype=np.float64) for group in rewards])
    checks.check_finite(flat)
    roles = {str(group.group_role) for group in kwargs.get("traj_groups") or ()}
    key = roles.pop() if len(roles) == 1 else None
    if len(rewards) == 1:
        scored = [np.asarray(ebpo.group(flat, key=key), dtype=np.float64)]
        return scored, scored
    sizes = [len(group) for group in rewards]
    groups = np.repeat(np.arange(len(sizes)), sizes)
    keys = None if key is None else [key] * len(flat)
    scored = np.split(ebpo(flat, groups, keys=keys), np.cumsum(sizes)[:-1])
    return scored, scored


def running(algorithm_config: Any = None) -> EBPO:
    """The estimator of this process, with the options in ``EBPO_OPTIONS``."""
    return estimator.get(scaled=getattr(algorithm_config, "norm_adv_by_std_in_grpo", True))


def save(path: Path | str, algorithm_config: Any = None) -> None:
    """Write the prior as ``ebpo_prior.json`` in the folder ``path`` (a checkpoint of rLLM's back end, say)."""
    write_prior(path, running(algorithm_config))


def load(path: Path | str, algorithm_config: Any = None) -> None:
    """Restore what :func:`save` wrote, before training goes on. A missing file raises FileNotFoundError."""
    running(algorithm_config)
    estimator.restore(path)


# `AlgorithmConfig.from_config` turns every name it does not know into OTHER ("other") and looks that up; a name in
# `traj_group_adv_estimator_map` is looked up as it is written. So the estimator answers to both.
register_rllm_adv_estimator(NAME)(compute_ebpo_advantages)
register_rllm_adv_estimator(rLLMAdvantageEstimator.OTHER)(compute_ebpo_advantages)
