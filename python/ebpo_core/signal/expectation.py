"""Expected dead shares and signal at other group sizes, with intervals by a bootstrap over prompts.

**Dead share.** A group of G is dead if all its rewards are equal, which has probability ``sum over v of E[q_v ** G]``,
q_v a prompt's rate of the reward v. Where nine in ten groups of the file have at least G rewards that is *measured* on
them: the share of a group's G-subsets that are all equal, ``C(k, G) / C(n, G)``, has this expectation whatever the
distribution. Beyond, it is *fitted*: computed from the distribution of :mod:`~ebpo_core.signal.rates`, which is an
extrapolation.

**Signal.** GRPO divides by the group's standard deviation, so a group's squared advantages sum to G - 1 if it is
informative and to 0 if it is dead, whatever the prompt. Their mean, ``1 - 1/G`` or 0, is the *signal of a group*: one
unit a prompt, less the part that the group's own mean takes away. It is counted by the group and not by the completion,
since completions of one prompt repeat one direction of the gradient and prompts add directions. The **signal per
rollout** at G is what a fixed number of rollouts buys with groups of G, in units a rollout::

    signal(G) = (1 - 1/G) * (1 - dead share at G) / G

It is small for small G on hard or easy prompts (most groups are dead, and the mean of two rewards is mostly noise) and
for large G (the same prompt again), with a best G between that grows with the share of extreme prompts. It does not
know how well gradients of different completions and prompts align, which rewards cannot tell.

**Intervals.** Prompts, with all their groups, are weighted at random by the Bayesian bootstrap (exponential weights),
together with one imagined prompt about which nothing is known (all distributions over the rewards equally likely).
That prompt is also in every fit. So a file in which every group is dead has an interval that reaches below 1, the
further the fewer its prompts, where resampling the file alone would find no doubt at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ebpo_core.evaluation.estimators import Interval
from ebpo_core.signal.cells import Codes, Vector
from ebpo_core.signal.groups import Groups
from ebpo_core.signal.rates import Rates, fit_rates, log_beta

SIZES = (2, 4, 8, 16, 32, 64)
"""Group sizes that are looked at."""

# Share of groups that must have G rewards for the share at G to be measured on them.
_MOST = 0.9
# Their weights are held at once.
_MOST_RESAMPLES = 100_000
# Largest size of the imagined prompt's group: beyond, its shape and not its size matters.
_IMAGINED = 64


class Shares(NamedTuple):
    """Shares of groups, with intervals."""

    failed: Interval
    passed: Interval
    dead: Interval


class Expected(NamedTuple):
    """Groups of one size as they would be.

    Attributes:
        size: G.
        failed, passed, dead: Shares of groups, with intervals.
        signal: Signal per rollout, with its interval.
        measured: False where the shares come from the fitted distribution.
    """

    size: int
    failed: Interval
    passed: Interval
    dead: Interval
    signal: Interval
    measured: bool


class Pairs(NamedTuple):
    """One level's groups by (hits, size), under R weightings, the file's own first. The last are the imagined prompt's.

    Attributes:
        hits, sizes: (K,) int64.
        weights: (R, K).
        imagined: How many of the K, at the end, stand for the imagined prompt.
        imagined_b: That prompt's rate is from Beta(1, imagined_b).
    """

    hits: Codes
    sizes: Codes
    weights: Vector
    imagined: int
    imagined_b: float

    def measured(self, size: int | None) -> Vector:
        """(R,) share of ``size``-subsets (None: of whole groups) that are all hits; the first of real prompts alone."""
        real = len(self.hits) - self.imagined
        hits, sizes = self.hits[:real].astype(np.float64), self.sizes[:real].astype(np.float64)
        enough = np.ones(real, dtype=bool) if size is None else sizes >= size
        if size is None:
            chance = (hits == sizes).astype(np.float64)
            usual = int(self.sizes[-1])
        else:
            usual = size
            chance = np.ones(real)
            for drawn in range(size):
                chance *= np.maximum(hits - drawn, 0) / np.maximum(sizes - drawn, 1)
        imagined_chance = float(np.exp(log_beta(1 + usual, self.imagined_b) - log_beta(1, self.imagined_b)))
        imagined = self.weights[:, real:].sum(axis=1)
        imagined[0] = 0
        own = self.weights[:, :real] * enough
        return np.asarray((own @ chance + imagined * imagined_chance) / (own.sum(axis=1) + imagined))


@dataclass(frozen=True, eq=False)
class Expectation:
    """Everything about other group sizes.

    Attributes:
        dead_now: Shares of the file's own groups.
        sizes: One :class:`Expected` for each of ``SIZES``.
        best_size: The size with most signal per rollout.
        best_share: Share of the bootstrap's weightings in which that size is the best.
        rates: The fitted distribution at each level of the groups.
        level: Coverage of the intervals.
    """

    dead_now: Shares
    sizes: tuple[Expected, ...]
    best_size: int
    best_share: float
    rates: tuple[Rates, ...]
    level: float

    def interval(self, draws: Vector) -> Interval:
        """The interval of a number from its (R,) values."""
        return _interval(draws, self.level)


def expect(groups: Groups, *, resamples: int = 200, level: float = 0.95, seed: int = 0) -> Expectation | None:
    """Expected shares and signal at ``SIZES``; None where no group has two rewards.

    Args:
        groups: Of the file.
        resamples: Weightings of the bootstrap.
        level: Coverage of the intervals, in (0, 1).
        seed: Of the bootstrap.

    Raises:
        ValueError: An option out of its range.
    """
    if not 1 <= resamples <= _MOST_RESAMPLES:
        raise ValueError(f"resamples={resamples}: expected a number from 1 to {_MOST_RESAMPLES}")
    if seed < 0:
        raise ValueError(f"seed={seed}: expected at least 0")
    if not 0 < level < 1:
        raise ValueError(f"confidence={level}: expected a number between 0 and 1")
    if not groups.paired.any():
        return None
    pairs = _tabulate(groups, resamples, seed)
    rates = tuple(fit_rates(one.hits, one.sizes, one.weights) for one in pairs)
    failed = [one.failed for one in groups.levels]
    sizes = groups.sizes[groups.paired]

    expected, signals = [], []
    for size in SIZES:
        measured = bool((sizes >= size).mean() >= _MOST)
        shares = [one.measured(size) for one in pairs] if measured else [fit.power(size) for fit in rates]
        fail, passed = _by_side(shares, failed, resamples)
        dead = np.minimum(fail + passed, 1.0)
        signal = (1 - 1 / size) * (1 - dead) / size
        signals.append(signal)
        intervals = [_interval(draws, level) for draws in (fail, passed, dead, signal)]
        expected.append(Expected(size, intervals[0], intervals[1], intervals[2], intervals[3], measured))
    best = np.argmax(signals, axis=0)  # (R,)
    fail, passed = _by_side([one.measured(None) for one in pairs], failed, resamples)
    now = [_interval(draws, level) for draws in (fail, passed, np.minimum(fail + passed, 1.0))]
    return Expectation(
        dead_now=Shares(*now),
        sizes=tuple(expected),
        best_size=SIZES[best[0]],
        best_share=float((best[1:] == best[0]).mean()),
        rates=rates,
        level=level,
    )


def dead_chance(groups: Groups, rates: Sequence[Rates], size: int) -> Vector:
    """(M,) probability that ``size`` further completions of each group's prompt all get one reward."""
    total = np.zeros(len(groups.sizes))
    for level, fit in zip(groups.levels, rates, strict=True):
        total += fit.posterior_power(level.hits, groups.sizes, size)
    return np.minimum(total, 1.0)


def _tabulate(groups: Groups, resamples: int, seed: int) -> list[Pairs]:
    """The groups of at least two, for each level, with the same random weights of prompts."""
    paired = groups.paired
    sizes = groups.sizes[paired]
    prompts = np.unique(groups.prompts[paired], return_inverse=True)[1].reshape(-1)
    count = int(prompts.max()) + 1
    usual = min(int(np.median(sizes)), _IMAGINED)
    others = float(max(groups.distinct, 2) - 1)
    imagined_hits = np.arange(usual + 1)
    ways = np.array([math.log(math.comb(usual, hits)) for hits in imagined_hits])
    chance = np.exp(ways + log_beta(1 + imagined_hits, others + usual - imagined_hits) - log_beta(1, others))

    found = []
    for level in groups.levels:
        # One pair of numbers as one, which is faster to sort.
        codes, place = np.unique(level.hits[paired] * (int(sizes.max()) + 1) + sizes, return_inverse=True)
        hits, of_size = np.divmod(codes, int(sizes.max()) + 1)
        found.append((hits, of_size, place.reshape(-1), np.empty((resamples + 1, len(codes) + usual + 1))))
    rng = np.random.default_rng(seed)
    for row in range(resamples + 1):
        weight = rng.standard_exponential(count + 1) if row else np.ones(count + 1)
        of_group = weight[prompts]
        for hits, _, place, weights in found:
            weights[row, : len(hits)] = np.bincount(place, of_group, len(hits))
            weights[row, len(hits) :] = weight[-1] * chance
    return [
        Pairs(
            np.concatenate([hits, imagined_hits]),
            np.concatenate([of_size, np.full(usual + 1, usual)]),
            weights,
            usual + 1,
            others,
        )
        for hits, of_size, _, weights in found
    ]


def _by_side(shares: Sequence[Vector], failed: Sequence[bool], resamples: int) -> tuple[Vector, Vector]:
    """(R,) sums over the levels below the mean, and over the others."""
    sides = np.zeros((2, resamples + 1))
    for share, low in zip(shares, failed, strict=True):
        sides[0 if low else 1] += share
    return sides[0], sides[1]


def _interval(draws: Vector, level: float) -> Interval:
    """The first of the values with percentiles of the others, which are made to hold it."""
    value = float(draws[0])
    low, high = np.quantile(draws[1:], [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, min(float(low), value), max(float(high), value))
