"""EBPO on verl's tensors: the settings under ``algorithm``, the estimator of this process, the scoring of one batch.

verl computes advantages in one CPU process, over the whole batch, so that process holds the one running prior.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ebpo_core.estimator import EBPO
from ebpo_core.integrations import saturation, settings

NAME = "ebpo"
WHERE = "algorithm.ebpo"

_ADAPTER_OPTIONS = ("keys", "allow_missing_prior")
# `upsample_batch_to_divisible_size` marks its synthetic rows so, and masks all their tokens.
_PADDING = re.compile(r"pad[0-9a-f]{32}")

_running: EBPO | None = None


@dataclass(frozen=True)
class Settings:
    """What the user asked for, checked."""

    options: dict[str, Any]
    """Keyword arguments of :class:`ebpo_core.EBPO`."""
    keys: tuple[str, ...]
    """Columns of the data set whose values choose a prior: outermost first; dots reach into dict columns."""
    allow_missing_prior: bool
    """Resume from a checkpoint without a prior, with an empty one."""


def is_ebpo(algorithm: Any) -> bool:
    """Whether ``algorithm.adv_estimator`` names this estimator."""
    return bool(algorithm.get("adv_estimator", None) == NAME)


def is_padding(uid: str) -> bool:
    """Whether ``uid`` is one that verl gives to synthetic rows."""
    return _PADDING.fullmatch(uid) is not None


def read_settings(algorithm: Any) -> Settings:
    """Settings out of verl's ``algorithm`` node.

    Args:
        algorithm: OmegaConf node, verl's ``AlgoConfig``, a mapping, or None for the defaults. Read here:
            ``ebpo`` (options of :class:`ebpo_core.EBPO`, ``keys``, ``allow_missing_prior``) and
            ``norm_adv_by_std_in_grpo``, whose False means ``normalize="none"`` where ``ebpo.normalize`` is unset.

    Raises:
        TypeError, ValueError: as :func:`ebpo_core.integrations.settings.estimator_options`.
    """
    node = None if algorithm is None else algorithm.get("ebpo", None)
    mapping = settings.read_mapping(_plain(node), WHERE)
    own = {name: mapping.pop(name) for name in _ADAPTER_OPTIONS if name in mapping}
    settings.check_names(mapping, (*settings.option_names(), *_ADAPTER_OPTIONS), WHERE)
    options = settings.estimator_options(mapping, WHERE)
    if algorithm is not None and not algorithm.get("norm_adv_by_std_in_grpo", True):
        options.setdefault("normalize", "none")
    allow = own.get("allow_missing_prior", False)
    if not isinstance(allow, bool):
        raise TypeError(f"{WHERE}.allow_missing_prior={allow!r}: expected true or false")
    return Settings(options, _columns(own.get("keys")), allow)


def check_filters(algorithm: Any) -> None:
    """Warn, once, if verl drops saturated groups."""
    filters = None if algorithm is None else algorithm.get("filter_groups", None)
    if filters is not None and filters.get("enable", False):
        saturation.warn_once("verl", "algorithm.filter_groups.enable")


def running(wanted: Settings) -> EBPO:
    """The estimator of this process, made at the first call."""
    global _running
    if _running is None:
        _running = EBPO(**wanted.options)
    expected = EBPO(**wanted.options).options
    if _running.options != expected:
        raise ValueError(
            f"{WHERE} asks for {expected}, and this process already estimates with {_running.options}: "
            "use one setting a process, or call ebpo_core.integrations.verl.reset() before another run"
        )
    return _running


def reset() -> None:
    """Forget the estimator of this process; the next batch, or trainer, starts with an empty prior."""
    global _running
    _running = None


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
        last: ``(B,)`` position of the last output of the session that each row belongs to. Only last outputs count;
            the others get their session's advantage. None: every row is a session.
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
    uids = [str(uid) for uid in index]
    answered = response_mask.detach().ne(0).any(-1).cpu().numpy()
    real = answered & np.array([not is_padding(uid) for uid in uids], dtype=bool)
    counts = real if last is None else real & (last == np.arange(rows))
    rewards = np.where(real, token_level_rewards.detach().sum(-1, dtype=torch.float64).cpu().numpy(), 0.0)
    _check_finite(rewards, uids)
    advantages = ebpo(rewards, uids, mask=counts, keys=None if keys is None else list(keys))
    if last is not None:
        advantages = np.where(real, advantages[last], 0.0)
    dtype = token_level_rewards.dtype
    limit = torch.finfo(dtype)
    column = torch.from_numpy(advantages).clamp(limit.min, limit.max).to(token_level_rewards.device, dtype)
    return column.unsqueeze(-1) * response_mask


def _check_finite(rewards: NDArray[np.float64], uids: Sequence[str]) -> None:
    bad = np.flatnonzero(~np.isfinite(rewards))
    if bad.size:
        raise ValueError(
            f"token_level_rewards sum to {rewards[bad[0]]} in row {bad[0]} (uid {uids[bad[0]]!r}), and {bad.size} of "
            f"{rewards.size} rows are not finite: return finite rewards from the reward function"
        )


def _columns(keys: Any) -> tuple[str, ...]:
    columns = () if keys is None else (keys,) if isinstance(keys, str) else tuple(keys) if _is_list(keys) else None
    if columns is None or not all(isinstance(column, str) and column for column in columns):
        raise TypeError(
            f"{WHERE}.keys={keys!r}: expected the name of a column of the data set, or a list of names, outermost first"
        )
    return columns


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, Mapping))


def _plain(node: Any) -> Any:
    """OmegaConf nodes as plain dicts and lists, interpolations resolved; anything else as it is."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
