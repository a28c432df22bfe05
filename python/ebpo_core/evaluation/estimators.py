"""avg@k, pass@k and maj@k of one problem, and their bootstrap intervals over problems. NumPy only.

A problem has ``n`` samples, of which ``c`` are right. With ``k <= n`` the three are expectations over the subsets of
``k`` samples, computed exactly, so none depends on the order in which samples were drawn::

    avg@k  = c / n                                     the mean of k: the same for every k, and pass@1
    pass@k = 1 - C(n - c, k) / C(n, k)                 at least one of k is right (Chen et al. 2021)
    maj@k  = P(the most frequent answer of k is right) a tie counts as the share of the tied answers that are right
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Resampling weights in memory at once, in float64 entries: 32 MiB.
_BLOCK = 1 << 22


class Interval(NamedTuple):
    """A mean over problems with its percentile bootstrap interval; both ends None for fewer than two problems."""

    value: float
    low: float | None
    high: float | None


class Mean(NamedTuple):
    """A mean and its standard error; NaN for the error of a single value."""

    value: float
    standard_error: float


def mean_and_error(values: Sequence[float]) -> Mean:
    """The mean of independent values with its standard error.

    Raises:
        ValueError: No values.
    """
    if not values:
        raise ValueError("values is empty: there is nothing to average")
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return Mean(mean, math.nan)
    return Mean(mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count))


def _check(n: int, c: int, k: int) -> None:
    if not 0 <= c <= n:
        raise ValueError(f"c={c}: right samples lie between 0 and n={n}")
    if not 1 <= k <= n:
        raise ValueError(f"k={k}: give between 1 and n={n} samples a problem, or draw more samples")


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased pass@k of a problem with ``c`` right ones among ``n`` samples, rounded once.

    Raises:
        ValueError: ``k`` is not in 1..n or ``c`` not in 0..n.
    """
    _check(n, c, k)
    every = math.comb(n, k)
    return (every - math.comb(n - c, k)) / every


def majority_at_k(answers: Sequence[Hashable | None], right: Sequence[bool], k: int) -> float:
    """Probability that the most frequent answer among ``k`` of the ``n`` samples is right.

    Args:
        answers: ``(n,)`` extracted answers; equal ones vote together, None (no answer was found) does not vote.
        right: ``(n,)`` whether each sample was scored as right. Where samples with one answer were not all scored
            alike, that answer counts as right in the share of them that was.
        k: Samples that vote, 1..n. A tie is broken at random: it counts as the share of its answers that are right.

    Raises:
        ValueError: Lengths differ, or ``k`` is out of range.
    """
    if len(answers) != len(right):
        raise ValueError(f"answers has {len(answers)} entries and right {len(right)}: give one of each a sample")
    n = len(answers)
    _check(n, sum(map(bool, right)), k)
    votes: Counter[Hashable] = Counter(answer for answer in answers if answer is not None)
    scored = Counter(answer for answer, is_right in zip(answers, right, strict=True) if is_right and answer is not None)
    credit = {answer: count / votes[answer] for answer, count in scored.items()}
    if k == n:
        most = max(votes.values(), default=0)
        winners = [answer for answer, count in votes.items() if count == most]
        return sum(credit.get(answer, 0.0) for answer in winners) / max(1, len(winners))
    silent = n - votes.total()
    total = 0.0
    for answer, share in credit.items():
        others = [count for other, count in votes.items() if other != answer]
        total += share * _wins(votes[answer], others, silent, k)
    return min(1.0, total / math.comb(n, k))


def _wins(mine: int, others: Sequence[int], silent: int, k: int) -> float:
    """Number of k-subsets in which an answer with ``mine`` samples has the most votes, a tie of t counted as 1 / t.

    For each number of votes v, ``ways[t, x]`` counts how the other answers give x samples, none more than v of its own
    and t of them exactly v; a product of polynomials in x, one factor an answer.
    """
    total = 0.0
    for v in range(1, min(mine, k) + 1):
        ways = np.zeros((k // v, k + 1))
        ways[0] = [math.comb(silent, x) for x in range(k + 1)]
        for count in others:
            below = np.array([math.comb(count, x) for x in range(min(v - 1, count) + 1)], dtype=np.float64)
            product = np.stack([np.convolve(row, below)[: k + 1] for row in ways])
            if count >= v:
                product[1:, v:] += ways[:-1, : k + 1 - v] * math.comb(count, v)
            ways = product
        ties = np.arange(1, len(ways) + 1)
        total += math.comb(mine, v) * float((ways[:, k - v] / ties).sum())
    return total


def bootstrap(values: Array, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0) -> list[Interval]:
    """Means over problems with percentile bootstrap intervals: problems are drawn, not samples.

    Args:
        values: ``(problems, metrics)`` finite numbers; every metric sees the same draws.
        resamples: Draws of the data set with replacement.
        level: Coverage, in (0, 1).
        seed: Same seed, same intervals.

    Returns:
        An :class:`Interval` a metric. Where every problem has the same value the interval has no width: the bootstrap
        cannot see beyond the problems at hand.

    Raises:
        ValueError: No problems, a value that is not finite, or an option out of its range.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not len(values):
        raise ValueError(f"values has shape {values.shape}: expected (problems, metrics) with at least one problem")
    if not np.isfinite(values).all():
        raise ValueError("values holds NaN or infinity: every problem needs a number in every metric")
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: expected at least 1")
    if not 0 < level < 1:
        raise ValueError(f"level={level}: expected a number between 0 and 1")
    problems = len(values)
    means = values.mean(axis=0)
    if problems == 1:
        return [Interval(float(mean), None, None) for mean in means]
    rng = np.random.default_rng(seed)
    drawn = np.empty((resamples, values.shape[1]))
    step = max(1, _BLOCK // problems)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        # How often each problem is drawn is multinomial; a matrix product then gives all means at once.
        weights = rng.multinomial(problems, np.full(problems, 1 / problems), size=size)
        drawn[start : start + size] = weights @ values / problems
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    same = (values == values[0]).all(axis=0)  # exactly no width, which the rounding of the products would hide
    low[same] = high[same] = means[same] = values[0, same]
    return [Interval(*map(float, ends)) for ends in zip(means, low, high, strict=True)]
