"""The other rules of the twin: GRPO and its relatives."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from .estimator import arrange, normalized
from .prior import Array, Moments, mean


def baseline_advantages(
    method: str,
    rewards: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    eps: float = 1e-6,
    c: float = 0.5,
    k: int = 1,
) -> Array:
    """Advantages of the methods to compare with, by their names in :func:`ebpo_core.advantages`."""
    r, index, valid = arrange(rewards, groups, mask)
    out = np.zeros_like(r)
    members = {m: r[valid & (index == m)] for m in range(index.max() + 1)}
    members = {m: g for m, g in members.items() if g.size}
    if method == "reinforce_pp":
        out = normalized(r, valid, "batch", 1, eps)
    elif method == "constant":
        out[valid] = r[valid] - c
    elif method == "batch_mean" and valid.any():
        out[valid] = r[valid] - Moments.of(r[valid]).mean
    for m, g in members.items():
        rows = valid & (index == m)
        n, centred = g.size, r[rows] - mean(g)
        if method == "grpo":
            s = np.sqrt(Moments.of(g).variance(1))
            out[rows] = centred / (s + eps) if s > 0 else 0.0
        elif method == "dr_grpo":
            out[rows] = centred
        elif method == "rloo":
            out[rows] = centred * n / (n - 1) if n > 1 else 0.0
        elif method == "maxrl":
            invertible = mean(g) > 0 and mean(g) + eps > 1 / np.finfo(np.float64).max
            out[rows] = centred / (mean(g) + eps) if invertible else 0.0
        elif method == "pass_at_k":
            out[rows] = pass_at_k_group(g, k)
        elif method == "james_stein":
            others = [x for k, x in members.items() if k != m]
            out[rows] = james_stein_group(g, others)
    return out.reshape(np.shape(rewards))


def pass_at_k_group(group: Array, k: int) -> Array:
    """Weights of the max@k gradient, less the others' own estimate of it, by going through every subset."""
    n = group.size
    if n == 1:
        return np.zeros(1)
    out = np.zeros(n)
    for i in range(n):
        others = [*group[:i], *group[i + 1 :]]
        best = [max(group[i], *chosen) if chosen else group[i] for chosen in combinations(others, k - 1)]
        alone = [max(chosen) for chosen in combinations(others, min(k, n - 1))]
        out[i] = k * (np.mean(best) - np.mean(alone))
    return out


def james_stein_group(group: Array, others: list[Array]) -> Array:
    """Two-level leave-one-out James-Stein baseline (arXiv 2511.03710) of one group, given the other groups."""
    n, K = group.size, len(others) + 1
    if K == 1:
        return (group - mean(group)) * n / (n - 1) if n > 1 else np.zeros(1)
    means = np.array([mean(g) for g in others])
    between = Moments.of(means)
    noise = [Moments.of(g).variance(1) / g.size for g in others if g.size > 1]
    v = float(np.mean(noise)) if noise else 0.0
    s = between.variance(0)
    lam = (K - 1) / K * (v / (v + s)) if v + s > 0 else 0.0
    if n == 1:
        return group - between.mean  # no rows are left for the inner mean: lambda is 1
    # r - [(1 - lam) mu^{-i} + lam mubar], where r - mu^{-i} = n / (n - 1) (r - mu)
    inner = (group - mean(group)) * n / (n - 1)
    return inner + lam * ((group - inner) - between.mean)
