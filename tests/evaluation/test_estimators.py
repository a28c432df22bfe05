"""pass@k, maj@k and the bootstrap against enumeration of every subset, and against what statistics promise."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpo_core.evaluation.estimators import bootstrap, majority_at_k, pass_at_k


def pass_by_enumeration(right: list[bool], k: int) -> Fraction:
    subsets = list(itertools.combinations(right, k))
    return Fraction(sum(any(subset) for subset in subsets), len(subsets))


def majority_by_enumeration(answers: list[str | None], right: list[bool], k: int) -> Fraction:
    """One vote a subset; a tie is worth the mean over its answers."""
    share = {
        answer: Fraction(sum(r for a, r in zip(answers, right, strict=True) if a == answer), answers.count(answer))
        for answer in set(answers)
    }
    total, subsets = Fraction(0), list(itertools.combinations(range(len(answers)), k))
    for subset in subsets:
        votes = Counter(answers[i] for i in subset if answers[i] is not None)
        if votes:
            winners = [answer for answer, count in votes.items() if count == max(votes.values())]
            total += sum((share[answer] for answer in winners), Fraction(0)) / len(winners)
    return total / len(subsets)


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(right)))
    assert pass_at_k(len(right), sum(right), k) == float(pass_by_enumeration(right, k))


@given(st.integers(1, 400), st.data())
def test_pass_at_k_grows_with_k_and_starts_at_the_mean(n: int, data: st.DataObject) -> None:
    c = data.draw(st.integers(0, n))
    values = [pass_at_k(n, c, k) for k in range(1, n + 1)]
    assert values[0] == c / n
    assert values[-1] == (c > 0)
    assert all(low <= high for low, high in itertools.pairwise(values))
    assert all(0 <= value <= 1 for value in values)


def test_pass_at_k_is_unbiased() -> None:
    n, k, p = 12, 5, 0.17
    expected = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-14)


def test_a_small_pass_at_k_of_many_samples_keeps_its_digits() -> None:
    assert pass_at_k(10**6, 1, 3) == 3e-6  # 1 - C/C in floats would leave ten digits


ANSWERS = st.lists(st.tuples(st.sampled_from(["a", "b", "c", "d", None]), st.booleans()), min_size=1, max_size=8)


@given(ANSWERS, st.data())
def test_majority_is_that_of_every_subset(samples: list[tuple[str | None, bool]], data: st.DataObject) -> None:
    answers, right = [answer for answer, _ in samples], [r for _, r in samples]
    k = data.draw(st.integers(1, len(samples)))
    expected = float(majority_by_enumeration(answers, right, k))
    assert majority_at_k(answers, right, k) == pytest.approx(expected, abs=1e-12)


@given(ANSWERS, st.randoms())
def test_majority_does_not_depend_on_the_order_of_samples(samples, random) -> None:  # type: ignore[no-untyped-def]
    shuffled = random.sample(samples, len(samples))
    for k in range(1, len(samples) + 1):
        one, other = (majority_at_k([a for a, _ in s], [r for _, r in s], k) for s in (samples, shuffled))
        assert one == pytest.approx(other, abs=1e-12)


def test_majority_of_many_samples() -> None:
    answers = ["right"] * 20 + ["wrong"] * 12
    right = [answer == "right" for answer in answers]
    # With two answers the right one wins k = 15 if it has 8 or more: hypergeometric.
    expected = sum(math.comb(20, x) * math.comb(12, 15 - x) for x in range(8, 16)) / math.comb(32, 15)
    assert majority_at_k(answers, right, 15) == pytest.approx(expected, abs=1e-13)
    assert majority_at_k(answers, right, 32) == 1
    assert majority_at_k(answers, right, 1) == pytest.approx(20 / 32)
    assert majority_at_k([None] * 5, [False] * 5, 3) == 0
    assert majority_at_k([str(i) for i in range(64)], [i == 0 for i in range(64)], 16) == pytest.approx(1 / 64)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_impossible_numbers_raise(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=r"^[ck]="):
        pass_at_k(n, c, k)


def test_majority_wants_one_answer_a_sample() -> None:
    with pytest.raises(ValueError, match="answers has 2"):
        majority_at_k(["a", "b"], [True], 1)


def test_bootstrap_of_many_problems_is_the_normal_interval() -> None:
    rng = np.random.default_rng(5)
    values = rng.beta(2, 3, size=(4000, 2))
    values[:, 1] = 1 - values[:, 0]
    first, mirrored = bootstrap(values, resamples=4000, seed=1)
    half = 1.959964 * values[:, 0].std() / math.sqrt(4000)
    assert first.low == pytest.approx(first.value - half, abs=0.05 * half)
    assert first.high == pytest.approx(first.value + half, abs=0.05 * half)
    # Every metric sees the same draws.
    assert mirrored.low == pytest.approx(1 - first.high)
    assert mirrored.high == pytest.approx(1 - first.low)


def test_bootstrap_is_the_distribution_of_all_draws_of_a_tiny_set() -> None:
    values = np.array([0.0, 0.25, 1.0])
    means = sorted(sum(draw) / 3 for draw in itertools.product(values, repeat=3))
    interval = bootstrap(values[:, None], resamples=200_000, level=0.5, seed=3)[0]
    assert interval.value == pytest.approx(values.mean())
    assert (interval.low, interval.high) == pytest.approx((means[6], means[20]))


def test_bootstrap_is_seeded_and_in_blocks_the_same() -> None:
    values = np.random.default_rng(0).random((50, 3))
    assert bootstrap(values, seed=4) == bootstrap(values, seed=4)
    assert bootstrap(values, seed=4) != bootstrap(values, seed=5)


def test_bootstrap_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    covered = 0
    for seed in range(300):
        values = rng.beta(2, 2, size=(60, 1))
        interval = bootstrap(values, resamples=500, level=0.9, seed=seed)[0]
        assert interval.low is not None
        assert interval.high is not None
        covered += interval.low <= 0.5 <= interval.high
    # Binomial(300, 0.9) has a standard deviation of 5.2; the bootstrap of 60 is a little narrow.
    assert 270 - 25 < covered < 270 + 16


def test_bootstrap_of_equal_values_has_no_width_and_of_one_problem_none() -> None:
    assert bootstrap(np.full((7, 1), 0.1)) == [(0.1, 0.1, 0.1)]
    assert bootstrap(np.array([[0.3, 0.7]])) == [(0.3, None, None), (0.7, None, None)]


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (np.zeros((0, 1)), {}, "shape"),
        (np.zeros(3), {}, "shape"),
        (np.array([[np.nan], [1.0]]), {}, "NaN"),
        (np.zeros((2, 1)), {"resamples": 0}, "resamples=0"),
        (np.zeros((2, 1)), {"level": 1.0}, r"level=1\.0"),
    ],
)
def test_bootstrap_refuses(values: np.ndarray, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap(values, **options)  # type: ignore[arg-type]
