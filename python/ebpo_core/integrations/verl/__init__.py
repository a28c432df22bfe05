"""The advantage estimator ``ebpo`` for verl (0.8 and later): ``algorithm.adv_estimator=ebpo``.

verl 0.9 imports this module by itself (entry point group ``verl.plugins``); under 0.8, or where plugins are turned off,
set ``VERL_USE_EXTERNAL_MODULES=ebpo_core.integrations.verl``. With verl 0.9.1 also set::

    trainer.checkpoint_callback_class=ebpo_core.integrations.verl.PriorCheckpoint

which saves and restores the prior with verl's checkpoints, logs ``ebpo/*`` and makes ``algorithm.ebpo.keys`` and
sessions with several outputs work; see docs/verl.md.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from verl.trainer.ppo.core_algos import register_adv_est

from ebpo_core.integrations.verl.checkpoint import PriorCheckpoint
from ebpo_core.integrations.verl.estimator import (
    NAME,
    WHERE,
    check_filters,
    is_padding,
    key_columns,
    reset,
    running,
    score,
)
from ebpo_core.integrations.verl.rows import take

__all__ = ["PriorCheckpoint", "compute_ebpo_advantage", "reset"]

_CALLBACK = "trainer.checkpoint_callback_class=ebpo_core.integrations.verl.PriorCheckpoint (verl 0.9.1 or later)"
_DEFAULT_N = 1  # of verl's actor_rollout_ref.rollout.n
_warned_unsaved = False


def compute_ebpo_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Sequence[Any] | None = None,
    config: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The estimator as verl calls it with a batch: the batch enters the prior, then is scored (paper, Algorithm 1).

    Args:
        token_level_rewards: ``(B, T)`` float.
        response_mask: ``(B, T)``, 1 at response tokens. Rows without any are padding and do not count.
        index: ``(B,)`` uid of each row's prompt.
        config: verl's ``algorithm`` node; the estimator's options are under ``algorithm.ebpo``.

    Returns:
        Advantages and returns, the same ``(B, T)`` tensor twice, as verl's own outcome estimators.

    Raises:
        ValueError: no uids, rewards that are not finite, wrong options, ``algorithm.ebpo.keys`` without
            :class:`PriorCheckpoint`, or, without it, a prompt with more rows than ``rollout.n`` (1 where a whole
            configuration does not set it).
    """
    if index is None:
        raise ValueError("the batch has no 'uid', and EBPO needs to know which rows share a prompt: set one per prompt")
    ebpo = running(config)
    check_filters(config)
    rows = take(len(index))
    if rows is None:
        _check_unaided(config, key_columns(), index)
    advantages = score(
        ebpo,
        token_level_rewards,
        response_mask,
        index,
        last=None if rows is None else rows.last,
        keys=None if rows is None else rows.keys,
    )
    return advantages, advantages


register_adv_est(NAME)(compute_ebpo_advantage)


def _check_unaided(algorithm: Any, keys: tuple[str, ...], index: Sequence[Any]) -> None:
    """Without the callback's help: refuse what would be computed wrongly, and say what will be lost."""
    if keys:
        raise ValueError(f"{WHERE}.keys={list(keys)}: verl passes no columns of the data set; set {_CALLBACK}")
    trainer, completions, named = _surroundings(algorithm)
    prompts = Counter(uid for uid in map(str, index) if not is_padding(uid))
    uid, most = max(prompts.items(), key=itemgetter(1), default=("", 0))
    if completions is not None and most > completions:
        raise ValueError(
            f"prompt {uid!r} has {most} rows and actor_rollout_ref.rollout.n{named}: its sessions have several "
            f"outputs, which must not count several times; set {_CALLBACK}"
        )
    global _warned_unsaved
    if trainer is not None and trainer.get("save_freq", -1) > 0 and not _warned_unsaved:
        _warned_unsaved = True
        warnings.warn(
            f"verl's checkpoints will not hold EBPO's prior: a resumed run starts with an empty one; set {_CALLBACK}",
            UserWarning,
            stacklevel=3,
        )


def _surroundings(algorithm: Any) -> tuple[Any, int | None, str]:
    """The ``trainer`` node and ``rollout.n`` beside verl's ``algorithm`` node, and how a message says the latter.

    Both are None for a node that stands alone. In a whole configuration an ``n`` that is not set is verl's default.
    """
    from omegaconf import DictConfig, OmegaConf

    root = algorithm._get_parent() if isinstance(algorithm, DictConfig) else None
    if not isinstance(root, DictConfig):
        return None, None, ""
    completions = OmegaConf.select(root, "actor_rollout_ref.rollout.n")
    named = f"={completions}" if completions is not None else f" is not set (verl's default is {_DEFAULT_N})"
    return root.get("trainer", None), _DEFAULT_N if completions is None else completions, named
