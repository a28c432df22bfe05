"""The fitted distribution against distributions that are known, and on files too small or too plain to tell."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rollout_files import draw_rates, draw_rewards

from ebpo_core.signal.rates import Rates, fit_rates, log_beta, log_gamma


def fit(rewards: np.ndarray) -> Rates:
    hits = rewards.sum(axis=1).astype(np.int64)
    return fit_rates(hits, np.full(len(hits), rewards.shape[1]), np.ones((1, len(hits))))


def log_likelihood(hits: np.ndarray, size: int, zero: float, one: float, a: float, b: float) -> float:
    beta = np.exp(log_beta(a + hits, b + size - hits) - log_beta(a, b))
    return float(np.log(zero * (hits == 0) + one * (hits == size) + (1 - zero - one) * beta).sum())


def test_log_gamma_is_that_of_the_standard_library() -> None:
    numbers = [0.05, 0.3, 1.0, 2.5, 40.0, 1e3, 1e5]
    np.testing.assert_allclose(log_gamma(numbers), [math.lgamma(x) for x in numbers], rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(
    ("truth", "prompts", "size"),
    [((0.3, 0.1, 2.0, 3.0), 3000, 16), ((0.2, 0.2, 1.5, 1.5), 6000, 8), ((0.0, 0.0, 3.0, 1.0), 3000, 8)],
)
def test_a_known_distribution_is_recovered(truth: tuple[float, ...], prompts: int, size: int) -> None:
    rng = np.random.default_rng(3)
    rewards = draw_rewards(rng, draw_rates(rng, prompts, *truth), size)
    fitted = fit(rewards)
    zero, one, a, b = truth
    assert fitted.zero[0] == pytest.approx(zero, abs=0.04)
    assert fitted.one[0] == pytest.approx(one, abs=0.04)
    if zero + one:
        assert fitted.a[0] / (fitted.a[0] + fitted.b[0]) == pytest.approx(a / (a + b), abs=0.03)
    assert fitted.mean[0] == pytest.approx(one + (1 - zero - one) * a / (a + b), abs=0.02)
    for power in (2, 8, 32):
        expected = Rates(*(np.array([value]) for value in truth)).power(power)[0]
        assert fitted.power(power)[0] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("truth", [(0.3, 0.1, 2.0, 3.0), (0.0, 0.0, 0.4, 1.0), (0.1, 0.4, 1.0, 1.0)])
def test_no_distribution_that_we_know_of_is_likelier(truth: tuple[float, ...]) -> None:
    rng = np.random.default_rng(5)
    rewards = draw_rewards(rng, draw_rates(rng, 300, *truth), 8)
    hits, fitted = rewards.sum(axis=1), fit(rewards)
    best = log_likelihood(hits, 8, *(float(v[0]) for v in (fitted.zero, fitted.one, fitted.a, fitted.b)))
    assert best >= log_likelihood(hits, 8, *truth) - 0.01
    for _ in range(300):  # nor one nearby
        zero, one, _ = rng.dirichlet([300 * fitted.zero[0] + 1, 300 * fitted.one[0] + 1, 300])
        a, b = np.exp(np.log([fitted.a[0], fitted.b[0]]) + 0.3 * rng.normal(size=2))
        assert best >= log_likelihood(hits, 8, zero, one, max(a, 0.05), max(b, 0.05)) - 0.01


@pytest.mark.parametrize(
    ("hits", "sizes"),
    [([0], [4]), ([4], [4]), ([0, 0, 0], [4, 4, 4]), ([1, 0], [1, 1]), ([0, 2, 3], [1, 4, 100_000]), ([2, 2], [4, 4])],
)
def test_few_prompts_give_a_distribution(hits: list[int], sizes: list[int]) -> None:
    fitted = fit_rates(np.array(hits), np.array(sizes), np.ones((2, len(hits))))
    for values in (fitted.zero, fitted.one, fitted.a, fitted.b, fitted.power(64)):
        assert np.isfinite(values).all()
        assert values[0] == values[1]
    assert (fitted.zero + fitted.one <= 1 + 1e-12).all()
    chances = fitted.posterior_power(np.array(hits), np.array(sizes), 8)
    assert ((chances >= 0) & (chances <= 1)).all()


def test_weights_count_groups() -> None:
    hits, sizes = np.array([0, 1, 2, 4]), np.full(4, 4)
    twice = fit_rates(np.repeat(hits, [3, 2, 1, 2]), np.full(8, 4), np.ones((1, 8)))
    weighted = fit_rates(hits, sizes, np.array([[3.0, 2.0, 1.0, 2.0]]))
    for name in ("zero", "one", "a", "b"):
        assert getattr(twice, name)[0] == pytest.approx(getattr(weighted, name)[0], rel=1e-6, abs=1e-9)


def test_the_posterior_is_bayes_rule() -> None:
    rates = Rates(*(np.array([value]) for value in (0.2, 0.1, 1.3, 2.2)))
    hits, sizes = np.array([0, 2, 5]), np.array([5, 5, 5])
    # By sums over a fine grid of the Beta, and the two points
    grid = (np.arange(200_000) + 0.5) / 200_000
    density = grid**0.3 * (1 - grid) ** 1.2
    density *= 0.7 / density.sum()
    for number, (k, n) in enumerate(zip(hits, sizes, strict=True)):
        chance = density * grid**k * (1 - grid) ** (n - k)
        total = chance.sum() + 0.2 * (k == 0) + 0.1 * (k == n)
        expected = ((chance * grid**3).sum() + 0.1 * (k == n)) / total
        assert rates.posterior_power(hits, sizes, 3)[number] == pytest.approx(expected, rel=1e-5)
