"""NumPy twin of :mod:`ebpo_core.decoupled`: several rewards of each completion with a scale each."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .estimator import EBPO, arrange, normalized
from .methods import baseline_advantages
from .prior import Array


def decoupled_advantages(
    method: str,
    rewards: ArrayLike,
    weights: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    keys: list[Any] | None = None,
    **options: Any,
) -> Array:
    """``sum over k of w_k A_k``, A_k of ``rewards[..., k]`` by itself; a NaN reward adds nothing.

    "gdpo": A_k by "grpo", and the sum is standardised over all completions of the batch that have a reward.
    """
    r, w = np.asarray(rewards, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    total = np.zeros(r.shape[:-1])
    for k in range(w.size):
        if method == "ebpo":
            total += w[k] * EBPO(**options)(r[..., k], groups, mask=mask, keys=keys)
        else:
            single = "grpo" if method == "gdpo" else method
            total += w[k] * baseline_advantages(single, r[..., k], groups, mask=mask, **options)
    if method == "gdpo":
        known = np.where(np.isnan(r).all(axis=-1), np.nan, total)
        flat, _, valid = arrange(known, groups, mask)
        total = normalized(flat, valid, "batch", 1, options.get("eps", 1e-6)).reshape(total.shape)
    return total
