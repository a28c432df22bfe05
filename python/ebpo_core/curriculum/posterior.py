"""Pass rates from few rollouts: the Beta posterior's mean and interval, and a prior fitted to many problems.

With ``c`` passes among ``n`` rollouts and a prior Beta(a, b) the posterior is Beta(a + c, b + n - c). The plain rate
c / n of 16 rollouts is 0 or 1 for many problems whose true rate is neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

_SMALLEST, _LARGEST = 0.05, 1000.0


class BetaPrior(NamedTuple):
    """Beta(a, b): as if ``a`` passes and ``b`` failures had been seen before."""

    a: float = 1.0
    b: float = 1.0


UNIFORM = BetaPrior(1.0, 1.0)
JEFFREYS = BetaPrior(0.5, 0.5)


class Posterior(NamedTuple):
    """Mean and equal-tailed credible interval of a pass rate."""

    mean: float
    low: float
    high: float


@lru_cache(maxsize=4096)  # k rollouts give k + 1 posteriors, however many problems there are
def posterior(passes: int, rollouts: int, prior: BetaPrior = UNIFORM, level: float = 0.95) -> Posterior:
    """Mean and credible interval of the pass rate after ``passes`` of ``rollouts``.

    Raises:
        ValueError: Counts that do not fit, a prior that is not positive, or a ``level`` outside (0, 1).
    """
    from scipy.special import betaincinv  # type: ignore[import-untyped, unused-ignore]

    if not 0 <= passes <= rollouts:
        raise ValueError(f"passes={passes}: expected 0 to rollouts={rollouts}")
    if not 0 < level < 1:
        raise ValueError(f"level={level}: expected a number between 0 and 1")
    if not (prior.a > 0 and prior.b > 0):
        raise ValueError(f"prior={tuple(prior)}: expected two positive numbers")
    a, b = prior.a + passes, prior.b + rollouts - passes
    tail = (1 - level) / 2
    low, high = betaincinv(a, b, [tail, 1 - tail])  # the inverse of the Beta distribution's function
    return Posterior(a / (a + b), float(low), float(high))


def fit_prior(passes: Sequence[int], rollouts: Sequence[int]) -> BetaPrior:
    """The Beta distribution of the problems' true pass rates, by moments: an empirical-Bayes prior.

    Mean m is the share of all rollouts that passed. The variance of the true rates is that of the observed rates less
    their sampling noise, ``tau2 = Var1(c/n) - mean(p (1 - p) / (n - 1))``, and ``a + b = m (1 - m) / tau2 - 1``. That
    sum is kept at 1000 at most, which also covers ``tau2 <= 0`` (rates that differ no more than by noise), and so large
    that both parameters are at least 0.05.

    Returns:
        The prior; the uniform one where nothing can be fitted: fewer than two problems, one rollout each, or rollouts
        that all passed or all failed.
    """
    counts, sizes = np.asarray(passes, dtype=np.float64), np.asarray(rollouts, dtype=np.float64)
    if counts.shape != sizes.shape or counts.ndim != 1:
        raise ValueError(f"passes has shape {counts.shape}, rollouts {sizes.shape}: expected one of each a problem")
    if len(counts) < 2 or sizes.min() < 2 or counts.sum() in (0, sizes.sum()):
        return UNIFORM
    rates = counts / sizes
    mean = float(counts.sum() / sizes.sum())
    tau2 = float(rates.var(ddof=1) - (rates * (1 - rates) / (sizes - 1)).mean())
    size = mean * (1 - mean) / tau2 - 1 if tau2 > 0 else _LARGEST
    size = min(_LARGEST, max(size, _SMALLEST / min(mean, 1 - mean)))
    return BetaPrior(mean * size, (1 - mean) * size)
