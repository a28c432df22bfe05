"""The policy gradient under advantages by turn, where the policy chooses the number of turns: who is unbiased.

The process, the rules and the enumeration are those of ``benches/turns.py``, whose table the documentation shows.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ebpo_core

PATH = Path(__file__).parents[2] / "benches" / "turns.py"
USUAL = "rewards less the turn's mean, summed"
ROW, DEFAULT = "EBPO, leave_one_out='row'", "EBPO"


@pytest.fixture(scope="module")
def turns() -> Any:
    spec = importlib.util.spec_from_file_location("bench_turns", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["bench_turns"] = importlib.util.module_from_spec(spec)  # dataclasses look the module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_turns"]


@pytest.mark.parametrize("prompts", [1, 2, 4])
def test_the_exact_gradient_is_the_derivative_of_the_objective(turns: Any, prompts: int) -> None:
    h = 1e-5
    for index, slope in enumerate(turns.exact_gradient(prompts)):
        up, down = list(turns.LOGITS), list(turns.LOGITS)
        up[index] += h
        down[index] -= h
        difference = turns.objective(tuple(up), prompts) - turns.objective(tuple(down), prompts)
        assert slope == pytest.approx(difference / (2 * h), abs=1e-9)


def test_over_every_batch_there_is_ours_has_no_bias(turns: Any) -> None:
    """The expectation, enumerated: 1,296 batches of two prompts with two trajectories each."""
    exact, got = turns.exact_gradient(2), turns.expected_gradients(turns.RULES)
    for name in (ROW, ROW + ", with history"):
        np.testing.assert_allclose(got[name], exact, rtol=0, atol=1e-14)
    bias = {name: np.linalg.norm(value - exact) / np.linalg.norm(exact) for name, value in got.items()}
    assert 0.4 < bias[DEFAULT] < 0.5
    assert 0.15 < bias["EBPO, leave_one_out=True"] < 0.25
    assert bias[USUAL] > 3
    # Looking pays, and the usual normalisation teaches not to look.
    assert exact[0] > 0 > got[USUAL][0]


def test_by_monte_carlo_the_intervals_tell_the_rules_apart(turns: Any) -> None:
    exact, batches = turns.exact_gradient(2), 8000
    rules = {name: turns.RULES[name] for name in (ROW, DEFAULT, USUAL)}
    for name, values in turns.sampled_gradients(rules, batches, seed=11, prompts=2, group=2).items():
        bias, half = values.mean(0) - exact, 3.29 * values.std(0, ddof=1) / np.sqrt(batches)  # 99.9 %
        assert (np.abs(bias) <= half).all() == (name == ROW), (name, bias, half)


def test_without_turns_and_with_uneven_groups(turns: Any) -> None:
    """One turn, 0/1 rewards, groups of 3, 2 and 1: every batch there is, and a discount has nothing to discount."""
    del turns
    rates, sizes = (0.3, 0.6, 0.9), (3, 2, 1)
    groups = np.repeat(np.arange(3), sizes)
    chance = np.repeat(rates, sizes)
    total = {"row": np.zeros(3), "group": np.zeros(3)}
    for code in range(2**6):
        actions = np.array([code >> i & 1 for i in range(6)], dtype=np.float64)
        weight = np.prod(np.where(actions == 1, chance, 1 - chance))
        for rule, option in (("row", "row"), ("group", True)):
            adv = ebpo_core.advantages(actions, groups, leave_one_out=option, normalize="none", tau2="debiased")
            total[rule] += weight * np.bincount(groups, adv * (actions - chance))
    exact = np.array(rates) * (1 - np.array(rates)) * sizes  # of E r in the logit, summed over a group
    np.testing.assert_allclose(total["row"], exact, rtol=0, atol=1e-14)
    assert (np.abs(total["group"][:2] - exact[:2]) > 0.01).all()


@pytest.mark.parametrize("gamma", [0.5, 0.0])
def test_a_discount_has_the_gradient_of_its_returns(turns: Any, gamma: float) -> None:
    """The expectation of score times discounted return: what a baseline must not change."""
    exact, got = np.zeros(2), np.zeros(2)
    ways = [turns.trajectories(right) for right in turns.RIGHT[:2]]
    for own in ways:
        for way in own:
            later = [sum(gamma**d * r for d, r in enumerate(way.rewards[k:])) for k in range(len(way.rewards))]
            exact += way.probability * np.array(later) @ way.scores / 2
    for a in ways[0]:
        for b in ways[0]:
            for c in ways[1]:
                batch = turns.batch_of([[a, b], [c]])
                adv = ebpo_core.advantages(
                    batch.rewards,
                    batch.prompts,
                    trajectories=batch.trajectories,
                    turns=batch.turns,
                    gamma=gamma,
                    leave_one_out="row",
                    normalize="none",
                )
                weight = a.probability * b.probability * c.probability
                share = np.where(batch.prompts == 0, 0.25, 0.5)  # of each prompt's trajectories one half, and all
                got += weight * (adv * share) @ batch.scores
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-14)
