"""What the trainer computes from rewards beside the advantages: the weighted sum, shadow metrics, names of metrics."""

from __future__ import annotations

import math
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float64]


def distinct(names: Sequence[str]) -> list[str]:
    """The names of the reward functions, with a number where several have one: metrics are logged by name.

    Lambdas and partials of one function are such: ``<lambda>_1``, ``<lambda>_2``, in the order of the functions.
    """
    numbers = {name: count(1) for name in names}
    result: list[str] = []
    for name in names:
        own = name
        while names.count(name) > 1 and own in (*names, *result):
            own = f"{name}_{next(numbers[name])}"
        result.append(own)
    return result


def weighted_sum(rewards_per_func: Array, weights: Array) -> Array:
    """One reward per completion, by TRL's convention but in float64.

    Args:
        rewards_per_func: ``(N, n_funcs)``, NaN where a reward function returned None.
        weights: ``(n_funcs,)``.

    Returns:
        ``(N,)``: the weighted sum of what is not NaN, NaN where every function returned None, and infinite where any
        weighted reward is, so that the estimator refuses it (``inf - inf`` would pass for "unscorable").
    """
    with np.errstate(invalid="ignore"):
        products = rewards_per_func * weights
        rewards = np.nansum(products, axis=1)
    rewards[np.isinf(products).any(axis=1)] = np.inf
    rewards[np.isnan(rewards_per_func).all(axis=1)] = np.nan
    return np.asarray(rewards, dtype=np.float64)


def shadow_metrics(trl: Array, ebpo: Array, rewards: Array) -> dict[str, float]:
    """Differences of EBPO's advantages from TRL's, which are the ones that train in shadow mode.

    Args:
        trl: ``(n,)`` TRL's advantages.
        ebpo: ``(n,)`` EBPO's, of the same completions.
        rewards: ``(M, G)`` rewards of all groups; the last ``n`` completions are the ones compared.

    Returns:
        ``ebpo/shadow_advantage_correlation`` (Pearson), ``ebpo/shadow_sign_disagreement`` (share of completions pushed
        in opposite directions), ``ebpo/shadow_scale_ratio`` (root mean square of EBPO's over TRL's: how far a learning
        rate tuned for TRL's is off), ``ebpo/shadow_saturated_advantage`` (mean ``|A|`` that EBPO gives to groups whose
        rewards are all equal, where TRL's is 0). What is undefined is left out.
    """
    valid = ~np.isnan(rewards)
    top = np.where(valid, rewards, -np.inf).max(axis=1)
    bottom = np.where(valid, rewards, np.inf).min(axis=1)
    saturated = (valid & (top == bottom)[:, None]).reshape(-1)[-ebpo.size :]
    scored = valid.reshape(-1)[-ebpo.size :]
    trl, ebpo, saturated = trl[scored], ebpo[scored], saturated[scored]
    if not ebpo.size:
        return {}
    values = {"ebpo/shadow_sign_disagreement": float((trl * ebpo < 0).mean())}
    if trl.std() > 0 and ebpo.std() > 0:
        values["ebpo/shadow_advantage_correlation"] = float(np.corrcoef(trl, ebpo)[0, 1])
    if (trl != 0).any():
        values["ebpo/shadow_scale_ratio"] = math.sqrt(float((ebpo**2).mean() / (trl**2).mean()))
    if saturated.any():
        values["ebpo/shadow_saturated_advantage"] = float(np.abs(ebpo[saturated]).mean())
    return {name: value for name, value in values.items() if not math.isnan(value)}
