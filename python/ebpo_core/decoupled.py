"""Several rewards of each completion with a scale each: every reward is scored by itself, and the advantages are added.

::

    A_i = sum over k of w_k * A_ik        A_ik the advantage of reward k, 0 where it was not given (NaN)

A sum of the rewards would drown the one with the small range. A group's statistics of reward k are those of its
completions that have reward k, so groups may be uneven in each reward, and a reward may be missing in whole groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebpo_core.inputs import MAX_REWARD, array_of, is_tensor, read_batch, read_rewards

Array = NDArray[np.float64]


def decoupled(
    advantages: Callable[..., Any],
    rewards: Any,
    groups: Any,
    weights: Any,
    method: str,
    rows: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Any:
    """The weighted sum of the advantages of K rewards; of "gdpo", standardised over the batch.

    Args:
        advantages: :func:`ebpo_core.advantages`, of one reward.
        rewards: ``(N, K)`` with ``groups``, ``(M, G, K)`` without.
        groups: As in :func:`ebpo_core.advantages`.
        weights: ``(K,)``.
        method: As in :func:`ebpo_core.advantages`.
        rows: Its other arguments with one entry per completion, ``mask`` among them.
        options: Of the method.

    Returns:
        Advantages ``(N,)`` or ``(M, G)`` in the container and float dtype of ``rewards``.
    """
    values, _ = read_rewards(rewards)
    kinds = _weights(weights)
    shape = "(M, G, K)" if groups is None else "(N, K) with groups"
    if values.ndim != (3 if groups is None else 2) or values.shape[-1] != kinds.size:
        raise ValueError(
            f"rewards has shape {values.shape} and weights {kinds.shape}: expected {shape}, K the number of weights"
        )
    first = rewards[..., 0] if is_tensor(rewards) or isinstance(rewards, np.ndarray) else values[..., 0]
    batch = read_batch(first, groups, rows["mask"])  # refuses what is wrong beside the rewards, and knows the way back
    rule = "grpo" if method == "gdpo" else method
    total = np.zeros(values.shape[:-1])
    kind = 0
    try:
        for kind, weight in enumerate(kinds):
            own = np.ascontiguousarray(values[..., kind], dtype=np.float64)
            total += weight * advantages(own, groups, method=rule, **rows, **options)
    except ValueError as error:
        if not str(error).startswith("rewards"):  # an option, which is the same for all
            raise
        raise ValueError(f"{error}; these rewards are those of kind {kind}, rewards[..., {kind}]") from None
    if method == "gdpo":
        large = float(np.abs(total).max())
        if large > MAX_REWARD:
            raise ValueError(
                f"weights={kinds.tolist()} make a sum of advantages of magnitude {large:g}, which is to be "
                "standardised: it must be at most 1e140; divide all weights by one number, which changes the result by "
                "eps alone"
            )
        total[np.isnan(values).all(axis=-1)] = np.nan
        total = advantages(total, groups, method="reinforce_pp", **rows, **options)
    limit = np.finfo(values.dtype).max
    result = batch.restore(np.clip(total, -limit, limit).reshape(-1))
    return result.tolist() if isinstance(rewards, (list, tuple)) else result


def _weights(weights: Any) -> Array:
    array = array_of("weights", weights, "pass one number for each reward of a completion")
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "fiu":
        raise TypeError(f"weights={weights!r}: expected one real number for each reward of a completion")
    bad = np.flatnonzero(~(np.abs(array) <= MAX_REWARD))
    if bad.size:
        raise ValueError(f"weights[{bad[0]}] is {array[bad[0]]}: expected a finite number of magnitude up to 1e140")
    return array.astype(np.float64)
