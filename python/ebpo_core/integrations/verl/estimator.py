"""EBPO on verl's tensors: the estimator of this process, and the scoring of one batch.

verl computes advantages in one CPU process, over the whole batch, so that process holds the one running prior.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ebpo_core.estimator import EBPO
from ebpo_core.inputs import tensor_of
from ebpo_core.integrations import checks, process

NAME = "ebpo"
WHERE = "algorithm.ebpo"

# `upsample_batch_to_divisible_size` marks its synthetic rows so, and masks all their tokens.
_PADDING = re.compile(r"pad[0-9a-f]{32}")

estimator = process.ProcessEstimator(keyed=True)


def is_ebpo(algorithm: Any) -> bool:
    """True where ``algorithm.adv_estimator`` names this estimator."""
    return bool(algorithm.get("adv_estimator", None) == NAME)


def is_padding(uid: str) -> bool:
    """True for a uid that verl gives to synthetic rows."""
    return _PADDING.fullmatch(uid) is not None


def check_filters(algorithm: Any) -> None:
    """Warn, once, if verl drops saturated groups."""
    filters = None if algorithm is None else algorithm.get("filter_groups", None)
    if filters is not None and filters.get("enable", False):
        checks.warn_once("verl", "algorithm.filter_groups.enable")


def running(algorithm: Any) -> EBPO:
    """The estimator of this process, made at the first call.

    Args:
        algorithm: verl's ``algorithm`` node: an OmegaConf node, verl's ``AlgoConfig``, a mapping, or None for the
            defaults. Read here: ``ebpo`` (options of :class:`ebpo_core.EBPO`, ``keys``, ``allow_missing_prior``) and
            ``norm_adv_by_std_in_grpo``.

    Raises:
        TypeError, ValueError: as :meth:`ebpo_core.integrations.process.ProcessEstimator.get`.
    """
    if algorithm is None:
        return estimator.get({}, WHERE)
    options = _plain(algorithm.get("ebpo", None))
    scaled = bool(algorithm.get("norm_adv_by_std_in_grpo", True))
    return estimator.get({} if options is None else options, WHERE, scaled=scaled)


def key_columns() -> tuple[str, ...]:
    """Columns of the data set that choose a prior, as the option ``keys`` of the running estimator names them."""
    return estimator.columns


def reset() -> None:
    """Forget the estimator of this process; the next batch, or trainer, starts with an empty prior."""
    estimator.reset()


def score(
    ebpo: EBPO,
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Sequence[Any] | NDArray[Any],
    *,
    last: NDArray[np.int64] | None = None,
    keys: Sequence[Any] | None = None,
) -> torch.Tensor:
    """Advantages of one batch, which enters the prior of ``ebpo``.

    A row's reward is the sum of its tokens' rewards, in float64. A row without a response token (verl's padding, or
    one whose tokens rollout correction rejected) neither counts nor gets an advantage.

    Args:
        ebpo: The estimator.
        token_level_rewards: ``(B, T)`` float.
        response_mask: ``(B, T)``, nonzero where a token is part of the response.
        index: ``(B,)`` uid of each row's prompt; rows of a prompt may stand anywhere.
        last: ``(B,)`` position of the last output of the session that each row belongs to, which has the session's
            reward: a session counts once, and all its outputs get its advantage. None: every row is a session.
        keys: ``(B,)`` key of each row's prior, as in :meth:`ebpo_core.EBPO.__call__`.

    Returns:
        ``(B, T)``, the advantage at every response token and 0 elsewhere, in dtype and device of the rewards.

    Raises:
        ValueError: shapes that do not fit, or a reward that is not finite. The prior is then untouched.
    """
    rows = len(token_level_rewards)
    if response_mask.shape != token_level_rewards.shape or len(index) != rows:
        raise ValueError(
            f"token_level_rewards has shape {tuple(token_level_rewards.shape)}, response_mask "
            f"{tuple(response_mask.shape)} and index {len(index)} uids: expected (B, T), (B, T) and B"
        )
    # Which rows count, (B,): those with a response token and no padding, of a session whose last output is one.
    uids = [str(uid) for uid in index]
    answered = response_mask.detach().ne(0).any(-1).cpu().numpy()
    real = answered & np.array([not is_padding(uid) for uid in uids], dtype=bool)
    # Token rewards (B, T) to one reward a row, (B,).
    rewards = np.where(real, token_level_rewards.detach().sum(-1, dtype=torch.float64).cpu().numpy(), 0.0)
    checks.check_finite(rewards, uids)
    if last is not None:
        rewards, real = rewards[last], real & real[last]
    advantages = ebpo(rewards, uids, mask=real, keys=None if keys is None else list(keys), trajectories=last)
    # Back to (B, T): the row's advantage at every response token.
    column = tensor_of(advantages, token_level_rewards.dtype).to(token_level_rewards.device)
    return column.unsqueeze(-1) * response_mask


def _plain(node: Any) -> Any:
    """OmegaConf nodes as plain dicts and lists, interpolations resolved; anything else as it is."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
