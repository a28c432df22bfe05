"""Dead shares at other group sizes against enumeration and simulation; signal per rollout; bands of prompts."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from rollout_files import draw_rates, draw_rewards

from ebpo_core.signal.bands import find_bands
from ebpo_core.signal.expectation import SIZES, Expectation, expect
from ebpo_core.signal.groups import Groups, group_rewards
from ebpo_core.signal.rollouts import Rollouts


def rollouts_of(rewards: list[list[float]] | np.ndarray) -> Rollouts:
    groups = np.concatenate([np.full(len(group), number) for number, group in enumerate(rewards)])
    flat = np.concatenate([np.asarray(group, dtype=float) for group in rewards])
    return Rollouts("plain", flat, {"reward": flat}, groups, "group", None, np.zeros_like(groups), has_steps=False)


def groups_of(rewards: list[list[float]] | np.ndarray) -> Groups:
    return group_rewards(rollouts_of(rewards))


def expected(rewards: list[list[float]] | np.ndarray, **options: int) -> Expectation:
    found = expect(groups_of(rewards), **options)
    assert found is not None
    return found


@pytest.mark.parametrize("values", [(0.0, 1.0), (-1.0, 0.5, 2.0), tuple(np.arange(12.0))])
def test_measured_shares_are_those_of_all_subsets(values: tuple[float, ...]) -> None:
    rng = np.random.default_rng(len(values))
    rewards = rng.choice(values, size=(9, 8), p=None if len(values) < 12 else [0.4, *[0.6 / 11] * 11])
    found = expected(rewards, resamples=5)
    mean = rewards.mean()
    for one in found.sizes:
        assert one.measured == (one.size <= 8)
        if not one.measured:
            continue
        subsets = [group[list(chosen)] for group in rewards for chosen in combinations(range(8), one.size)]
        dead = [subset[0] for subset in subsets if (subset == subset[0]).all()]
        failed = [value for value in dead if value < mean]
        if len(values) <= 8:  # beyond, rare values are followed together
            assert one.dead.value == pytest.approx(len(dead) / len(subsets))
            assert one.failed.value == pytest.approx(len(failed) / len(subsets))
        assert one.passed.value == pytest.approx(one.dead.value - one.failed.value)


def test_a_few_short_groups_do_not_spoil_the_measurement() -> None:
    rng = np.random.default_rng(9)
    rewards = [list(group) for group in draw_rewards(rng, draw_rates(rng, 40, 0.2, 0.2, 1, 1), 8)]
    whole = expected(np.array(rewards[2:]), resamples=5)
    rewards[0], rewards[1] = rewards[0][:3], rewards[1][:1]
    found = expected(rewards, resamples=5)
    assert [one.measured for one in found.sizes] == [True, True, True, False, False, False]
    assert found.sizes[2].dead.value == whole.sizes[2].dead.value
    assert [one.measured for one in expected([*rewards, *([[0.0, 1.0]] * 10)], resamples=5).sizes][:2] == [True, False]


TRUTHS = [(0.3, 0.1, 2.0, 3.0), (0.0, 0.0, 0.5, 1.0), (0.1, 0.3, 1.0, 1.0)]


@pytest.mark.parametrize("truth", TRUTHS)
def test_expected_dead_shares_are_those_of_a_simulation_within_the_intervals(truth: tuple[float, ...]) -> None:
    rng = np.random.default_rng(11)
    rates = draw_rates(rng, 400_000, *truth)
    failed = {size: ((1 - rates) ** size).mean() for size in SIZES}
    passed = {size: (rates**size).mean() for size in SIZES}
    held = 0
    files = 24
    for seed in range(files):
        rng = np.random.default_rng(seed)
        rewards = draw_rewards(rng, draw_rates(rng, 150, *truth), 8)
        for one in expected(rewards, resamples=80, seed=seed).sizes:
            held += one.failed.low <= failed[one.size] <= one.failed.high
            held += one.passed.low <= passed[one.size] <= one.passed.high
            assert one.dead.value == pytest.approx(failed[one.size] + passed[one.size], abs=0.2)
    # Intervals of 95 %, of which those of one file stand or fall together
    assert held / (files * 2 * len(SIZES)) > 0.85


def test_three_rewards_extrapolate_to_a_simulation() -> None:
    rng = np.random.default_rng(2)
    chances = rng.dirichlet([0.5, 0.7, 0.4], size=2000)

    def draw(size: int) -> np.ndarray:
        return np.stack([rng.choice([0.0, 0.5, 1.0], size=size, p=chance) for chance in chances])

    found = expected(draw(4), resamples=40)
    for one in found.sizes:
        simulated = (chances**one.size).sum(axis=1).mean()
        assert one.dead.value == pytest.approx(simulated, abs=0.03), one.size


def test_continuous_rewards_are_never_dead() -> None:
    found = expected(np.random.default_rng(0).normal(size=(20, 4)), resamples=5)
    assert all(one.dead.value == 0 for one in found.sizes)
    assert found.best_size == 2  # each group is a unit, and none is dead: the more groups the better


def test_all_dead_leaves_a_doubt_that_grows_with_fewer_prompts() -> None:
    for reward in (0.0, 1.0):
        few, many = (expected(np.full((prompts, 4), reward), resamples=200).sizes[1].dead for prompts in (5, 200))
        assert few.value == many.value == 1
        assert few.low is not None
        assert many.low is not None
        assert few.low < many.low < 1
        assert few.high == many.high == 1


def test_signal_per_rollout_is_its_formula_and_prefers_larger_groups_for_harder_prompts() -> None:
    rng = np.random.default_rng(4)
    best = []
    for rate in (0.5, 0.05, 0.01):
        found = expected(draw_rewards(rng, np.full(400, rate), 16), resamples=20)
        for one in found.sizes:
            assert one.signal.value == pytest.approx((1 - 1 / one.size) * (1 - one.dead.value) / one.size)
        best.append(found.best_size)
    assert best == sorted(best)
    assert best[0] == 4
    assert best[2] >= 16


def test_prompts_that_come_back_are_one_unit_of_the_bootstrap() -> None:
    rng = np.random.default_rng(6)
    rewards = np.repeat(draw_rewards(rng, draw_rates(rng, 20, 0.3, 0.1, 1, 1), 4), 10, axis=0)
    alone = rollouts_of(rewards)
    known = replace(alone, prompts=np.repeat(np.arange(20), 40))
    widths = []
    for rollouts in (alone, known):
        found = expect(group_rewards(rollouts), resamples=100)
        assert found is not None
        widths.append(found.dead_now.dead.high - found.dead_now.dead.low)  # type: ignore[operator]
    assert widths[1] > 2 * widths[0]


def test_bands_sort_prompts_and_say_what_they_buy() -> None:
    rng = np.random.default_rng(8)
    rates = draw_rates(rng, 400, 0.3, 0.2, 1, 1)
    groups = groups_of(draw_rewards(rng, rates, 8))
    found = expect(groups, resamples=20)
    assert found is not None
    bands = {band.name: band for band in find_bands(groups, found)}
    assert sum(band.prompts for band in bands.values()) == 400
    assert bands["always lowest"].prompts == (groups.dead & groups.failed).sum()
    assert bands["always highest"].prompts == (groups.dead & ~groups.failed).sum()
    mean = sum(band.share * band.signal for band in bands.values())
    assert sum(band.share * band.relative for band in bands.values()) == pytest.approx(1)
    assert bands["1/4 to 3/4"].relative == pytest.approx(bands["1/4 to 3/4"].signal / mean)
    assert bands["1/4 to 3/4"].signal > bands["below 1/4"].signal > bands["always lowest"].signal
    # What was promised is what more rollouts of these prompts give, in groups of the best size
    again = draw_rewards(rng, rates, found.best_size).mean(axis=1)
    middle = (groups.means >= 0.25) & (groups.means < 0.75)
    informative = ((again[middle] > 0) & (again[middle] < 1)).mean()
    assert bands["1/4 to 3/4"].informative == pytest.approx(informative, abs=0.08)


@pytest.mark.parametrize(("name", "value"), [("resamples", 0), ("level", 1.0), ("level", 0.0)])
def test_options_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=str(value)):
        expect(groups_of([[0.0, 1.0]]), **{name: value})


def test_nothing_to_expect_of_single_completions() -> None:
    assert expect(groups_of([[0.0], [1.0]])) is None


def test_groups_are_summed_exactly() -> None:
    groups = groups_of([[0.1, 0.1, 0.1], [0.3, np.nan, 0.7], [0.7, 0.7]])
    assert groups.sizes.tolist() == [3, 2, 2]
    assert groups.dead.tolist() == [True, False, True]
    assert groups.failed.tolist() == [True, False, False]
    assert groups.squares[0] == groups.squares[2] == 0
    assert groups.squares[1] == pytest.approx(0.08)
    assert groups.means.tolist() == pytest.approx([0.1, 0.5, 0.7])
    assert (groups.lowest, groups.highest, groups.distinct) == (0.1, 0.7, 3)
    with pytest.raises(ValueError, match="every reward is missing"):
        groups_of([[np.nan, np.nan]])
