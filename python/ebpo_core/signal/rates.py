"""Distribution of a rate over prompts: a Beta with point masses at 0 and 1, fitted to counts. NumPy only.

A group has ``k`` hits (completions with a certain reward) among ``n``. The rate of its prompt is 0 with probability
``zero``, 1 with probability ``one``, and else from Beta(a, b), so that::

    P(k | n) = zero [k = 0] + one [k = n] + (1 - zero - one) C(n, k) B(a + k, b + n - k) / B(a, b)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ebpo_core.signal.cells import Codes, Vector

# Constraints: the Beta's mean in [0.01, 0.99], its a + b in [0.1, 1000], and neither of the two below 0.05.
_LOGIT = 4.6
_LOG_SIZE = (math.log(0.1), math.log(1000.0))
_SMALLEST = 0.05
_ITERATIONS = 100
_ZOOMS = 4
# Entries of the largest array: 32 MiB of float64.
_BLOCK = 1 << 22


def log_gamma(numbers: ArrayLike) -> Vector:
    """Logarithm of the gamma function of positive numbers, to about 1e-11: Stirling's series at x + 8."""
    x = np.asarray(numbers, dtype=np.float64)
    shift = np.log(x * (x + 1) * (x + 2) * (x + 3)) + np.log((x + 4) * (x + 5) * (x + 6) * (x + 7))
    z = x + 8
    series = 1 / (12 * z) - 1 / (360 * z**3) + 1 / (1260 * z**5) - 1 / (1680 * z**7)
    return np.asarray((z - 0.5) * np.log(z) - z + 0.5 * math.log(2 * math.pi) + series - shift)


def log_beta(a: ArrayLike, b: ArrayLike) -> Vector:
    """Logarithm of the beta function."""
    return log_gamma(a) + log_gamma(b) - log_gamma(np.add(a, b))


@dataclass(frozen=True, eq=False)
class Rates:
    """Fitted distributions, one for each of R weightings of the same groups.

    Attributes:
        zero, one: (R,) probabilities of the two point masses.
        a, b: (R,) parameters of the Beta.
    """

    zero: Vector
    one: Vector
    a: Vector
    b: Vector

    @property
    def mean(self) -> Vector:
        """(R,) mean rate."""
        return np.asarray(self.one + (1 - self.zero - self.one) * self.a / (self.a + self.b))

    def power(self, size: int) -> Vector:
        """(R,) ``E[q ** size]``: the probability that all of ``size`` completions of a prompt are hits."""
        moment = np.exp(log_beta(self.a + size, self.b) - log_beta(self.a, self.b))
        return np.asarray(self.one + (1 - self.zero - self.one) * moment)

    def posterior_power(self, hits: Codes, sizes: Codes, size: int) -> Vector:
        """(M,) ``E[q ** size | hits, sizes]`` of M groups, by the first of the distributions.

        Args:
            hits: (M,).
            sizes: (M,).
            size: The number of further completions.
        """
        zero, one, a, b = (float(values[0]) for values in (self.zero, self.one, self.a, self.b))
        after_a, after_b = a + hits, b + sizes - hits
        evidence = log_beta(after_a, after_b)
        moment = np.exp(log_beta(after_a + size, after_b) - evidence)
        # Chances of the very sequence seen. Where no point mass explains it, it is from the Beta, however small the
        # chance: that of a mixed group of a thousand is beyond the smallest float.
        from_beta = (1 - zero - one) * np.exp(evidence - log_beta(a, b))
        from_point = zero * (hits == 0) + one * (hits == sizes)
        share = np.divide(from_beta, from_beta + from_point, out=np.ones_like(from_beta), where=from_point > 0)
        return np.asarray(share * moment + (1 - share) * (hits == sizes))


def fit_rates(hits: Codes, sizes: Codes, weights: Vector) -> Rates:
    """Maximum likelihood for each of R weightings, by a grid over the Beta that is refined around its best point.

    At each point of the grid the two point masses come from EM, whose likelihood has one maximum. A grid finds the
    better of the two hills that such a likelihood can have (many prompts of rate 0, or a Beta that piles up there).

    Args:
        hits: (K,) int64, 0..sizes.
        sizes: (K,) int64, at least 1.
        weights: (R, K), not negative; how many groups each pair of hits and sizes stands for.
    """
    rows = max(1, _BLOCK // (len(hits) * 117))
    parts = [_fit(hits, sizes, weights[start : start + rows]) for start in range(0, len(weights), rows)]
    return Rates(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def _fit(hits: Codes, sizes: Codes, weights: Vector) -> tuple[Vector, Vector, Vector, Vector]:
    logit, log_size = np.linspace(-_LOGIT, _LOGIT, 13), np.linspace(*_LOG_SIZE, 9)
    steps = logit[1] - logit[0], log_size[1] - log_size[0]
    # (1, J): the first grid is the same for every weighting
    at_logit, at_size = (grid.reshape(1, -1) for grid in np.meshgrid(logit, log_size))
    around = np.arange(-3, 4) / 3
    offset_logit, offset_size = (grid.reshape(1, -1) for grid in np.meshgrid(around, around))
    every = np.arange(len(weights))
    for zoom in range(_ZOOMS):
        if zoom:
            at_logit = np.clip(at_logit + offset_logit * steps[0], -_LOGIT, _LOGIT)
            at_size = np.clip(at_size + offset_size * steps[1], *_LOG_SIZE)
            steps = steps[0] / 3, steps[1] / 3
        mean, size = 1 / (1 + np.exp(-at_logit)), np.exp(at_size)
        a, b = np.maximum(mean * size, _SMALLEST), np.maximum((1 - mean) * size, _SMALLEST)
        likelihood, zero, one = _point_masses(hits, sizes, weights, a, b)  # (R, J) each
        best = likelihood.argmax(axis=1)
        # (R, 1): what is best, around which the next grid lies
        a, b, at_logit, at_size = (
            np.broadcast_to(values, likelihood.shape)[every, best][:, None] for values in (a, b, at_logit, at_size)
        )
    return zero[every, best], one[every, best], a[:, 0], b[:, 0]


def _point_masses(hits: Codes, sizes: Codes, weights: Vector, a: Vector, b: Vector) -> tuple[Vector, Vector, Vector]:
    """Log-likelihood and both point masses, (R, J) each; ``a`` and ``b`` of the Betas are (R, J) or (1, J)."""
    none, every = hits == 0, hits == sizes
    # (R or 1, K, J), without the binomial coefficient, which is 1 where it matters
    log_chance = log_beta(a[:, None] + hits[:, None], b[:, None] + (sizes - hits)[:, None]) - log_beta(a, b)[:, None]
    never, always = np.exp(log_chance[:, none]), np.exp(log_chance[:, every])
    of_none, of_every = weights[:, none, None], weights[:, every, None]
    total = weights.sum(axis=1)[:, None]

    zero = np.full((len(weights), a.shape[1]), 0.25)
    one = zero.copy()
    for _ in range(_ITERATIONS):
        rest = 1 - zero - one
        from_zero = zero[:, None] / (zero[:, None] + rest[:, None] * never + 1e-300)
        from_one = one[:, None] / (one[:, None] + rest[:, None] * always + 1e-300)
        zero, one = (of_none * from_zero).sum(axis=1) / total, (of_every * from_one).sum(axis=1) / total

    rest = 1 - zero - one
    mixed = ~(none | every)
    likelihood = (weights[:, None, mixed] @ log_chance[:, mixed])[:, 0]
    likelihood += weights[:, mixed].sum(axis=1)[:, None] * np.log(np.maximum(rest, 1e-300))
    likelihood += (of_none * np.log(zero[:, None] + rest[:, None] * never + 1e-300)).sum(axis=1)
    likelihood += (of_every * np.log(one[:, None] + rest[:, None] * always + 1e-300)).sum(axis=1)
    return likelihood, zero, one
