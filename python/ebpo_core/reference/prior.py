"""Moments and priors of the twin: the Welford accumulators of the paper, and what the options need besides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def mean(x: Array) -> float:
    """The mean, taken about the first value, so that equal values have exactly that value as their mean."""
    return float(x[0] + (x - x[0]).mean())


@dataclass(frozen=True)
class Moments:
    """Count, mean and M2 (sum of squared deviations): a Welford accumulator. The default is the empty one."""

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    @classmethod
    def of(cls, x: Array) -> Moments:
        """Moments of the values ``x``, shape ``(n,)``."""
        return cls(float(x.size), mean(x), float(((x - mean(x)) ** 2).sum())) if x.size else cls()

    def merge(self, other: Moments) -> Moments:
        """Chan, Golub & LeVeque (1979): the moments of both samples together."""
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.m2 + other.m2 + delta**2 * (self.count * (other.count / count)),
        )

    def decay(self, rho: float) -> Moments:
        """Forget: the weight of everything seen shrinks by ``rho``, the mean stays."""
        return Moments(self.count * rho, self.mean, self.m2 * rho)

    def variance(self, ddof: int) -> float:
        """``m2 / (count - ddof)``, and 0 when that divisor is not positive."""
        return self.m2 / (self.count - ddof) if self.count > ddof else 0.0


@dataclass(frozen=True)
class Prior:
    """The paper's W_glob (``rewards``) and W_group (``means``), and what the options of §6 need besides."""

    rewards: Moments = field(default_factory=Moments)
    means: Moments = field(default_factory=Moments)
    ssw: float = 0.0  # sum over groups of the sum of squares within
    dof: float = 0.0  # sum over groups of n - 1
    inv_n: float = 0.0  # sum over groups of 1 / n

    @classmethod
    def of(cls, groups: Iterable[Array]) -> Prior:
        """Statistics of a batch, given each group's valid rewards; empty groups do not count."""
        groups = [g for g in groups if g.size]
        if not groups:
            return cls()
        return cls(
            rewards=Moments.of(np.concatenate(groups)),
            means=Moments.of(np.array([mean(g) for g in groups])),
            ssw=float(sum(Moments.of(g).m2 for g in groups)),
            dof=float(sum(g.size - 1 for g in groups)),
            inv_n=float(sum(1.0 / g.size for g in groups)),
        )

    def merge(self, other: Prior) -> Prior:
        """Statistics of both together."""
        return Prior(
            self.rewards.merge(other.rewards),
            self.means.merge(other.means),
            self.ssw + other.ssw,
            self.dof + other.dof,
            self.inv_n + other.inv_n,
        )

    def decay(self, rho: float) -> Prior:
        """Multiply every count and sum by ``rho``; means are unchanged."""
        return Prior(self.rewards.decay(rho), self.means.decay(rho), self.ssw * rho, self.dof * rho, self.inv_n * rho)

    def sigma2(self, kind: str, ddof: int) -> float:
        """``total``: variance of all rewards. ``within``: pooled within groups; ``total`` until one has two rows."""
        if kind == "within" and self.dof > 0:
            return self.ssw / self.dof
        return self.rewards.variance(ddof)

    def tau2(self, kind: str, ddof: int) -> float:
        """``raw``: variance of group means. ``debiased``: less their sampling noise, by the method of moments."""
        if kind == "raw":
            return self.means.variance(ddof)
        noise = self.sigma2("within", ddof) * (self.inv_n / self.means.count) if self.means.count > 0 else 0.0
        return max(0.0, self.means.variance(1) - noise)
