"""Checks that adapters share: rewards that are not finite, and filters that drop the groups EBPO learns from."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_warned: set[tuple[str, str]] = set()


def check_finite(rewards: NDArray[np.float64], uids: Sequence[Any] | None = None) -> None:
    """Refuse rewards ``(N,)`` that are NaN or infinite, where a framework has no way to say "not scored".

    Args:
        rewards: One a row.
        uids: ``(N,)`` name of each row's prompt, for the error.

    Raises:
        ValueError: names the first such row.
    """
    bad = np.flatnonzero(~np.isfinite(rewards))
    if bad.size:
        row = int(bad[0])
        named = "" if uids is None else f" (uid {uids[row]!r})"
        raise ValueError(
            f"the reward of row {row}{named} is {rewards[row]}, and {bad.size} of {rewards.size} rows are not finite: "
            "return finite rewards from the reward function"
        )


def warn_once(framework: str, option: str) -> None:
    """Warn, once a process for each pair, that ``option`` of ``framework`` hides saturated groups from the estimator.

    A group in which every completion failed (or passed) carries no signal for GRPO, so frameworks filter such groups
    out (DAPO's dynamic sampling). EBPO does learn from them (paper §3), and a prior that never sees them takes the mean
    of the mixed groups for the mean of all.

    Args:
        framework: ``"verl"``.
        option: The setting to change, as the user writes it: ``"algorithm.filter_groups.enable"``.
    """
    if (framework, option) in _warned:
        return
    _warned.add((framework, option))
    warnings.warn(
        f"{framework} filters saturated groups before EBPO sees them: set {option} off; the prior is biased, and "
        "the groups that EBPO can learn from and GRPO cannot are gone",
        UserWarning,
        stacklevel=3,
    )
