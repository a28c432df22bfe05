"""The methods beside EBPO that have a parameter, or a promise of their own: values, errors, and what is unbiased."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ebpo_core
from ebpo_core import reference


@given(
    rewards=st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=1, max_size=8),
    k=st.integers(1, 8),
    offset=st.sampled_from([0.0, -5.0, 1e6]),
    seed=st.integers(0, 3),
)
def test_pass_at_k_equals_going_through_every_subset(rewards: list[float], k: int, offset: float, seed: int) -> None:
    r = np.array(rewards) + offset
    if k > r.size:
        with pytest.raises(ValueError, match=f"k={k}: expected at most the counted rewards of the smallest group"):
            ebpo_core.advantages([r], method="pass_at_k", k=k)
        return
    expected = reference.baseline_advantages("pass_at_k", [r], k=k)
    got = ebpo_core.advantages([r], method="pass_at_k", k=k)
    tolerance = 1e-12 * k * max(1.0, abs(offset))
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)
    order = np.random.default_rng(seed).permutation(r.size)
    assert np.array_equal(
        np.asarray(got)[0][order], np.asarray(ebpo_core.advantages([r[order]], method="pass_at_k", k=k))[0]
    )


@given(rewards=st.lists(st.floats(0, 10), min_size=1, max_size=9), zero=st.booleans())
def test_maxrl_equals_the_twin(rewards: list[float], zero: bool) -> None:
    r = np.zeros((1, len(rewards))) if zero else np.array([rewards])
    expected = reference.baseline_advantages("maxrl", r)
    np.testing.assert_allclose(ebpo_core.advantages(r, method="maxrl"), expected, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "k", "n"),
    [("rloo", 1, 3), ("pass_at_k", 1, 3), ("pass_at_k", 2, 3), ("pass_at_k", 2, 4), ("pass_at_k", 3, 3)],
)
def test_the_gradient_is_that_of_the_objective(method: str, k: int, n: int) -> None:
    """Exact: every outcome of a group is gone through. d/d theta of E max of k rewards, by the score function."""
    policy = np.array([0.5, 0.2, 0.3])
    reward = np.array([0.0, 1.0, 0.4])
    score = np.eye(3) - policy  # gradient of log softmax, one row an arm
    options: dict[str, Any] = {} if method == "rloo" else {"k": k}
    estimated = np.zeros(3)
    for arms in product(range(3), repeat=n):
        advantages = ebpo_core.advantages([reward[list(arms)]], method=method, **options)[0]
        estimated += policy[list(arms)].prod() * np.mean(
            [a * score[i] for a, i in zip(advantages, arms, strict=True)], 0
        )
    exact = np.zeros(3)
    for arms in product(range(3), repeat=k):
        exact += policy[list(arms)].prod() * reward[list(arms)].max() * score[list(arms)].sum(0)
    np.testing.assert_allclose(estimated, exact, rtol=0, atol=1e-14)


def test_values() -> None:
    assert ebpo_core.advantages([[1.0, 0.0]], method="constant") == [[0.5, -0.5]]
    assert ebpo_core.advantages([[1.0, 0.0]], method="constant", c=0.25) == [[0.75, -0.25]]
    assert ebpo_core.advantages([[1.0, 0.0], [0.0, 0.0]], method="batch_mean") == [[0.75, -0.25], [-0.25, -0.25]]
    assert ebpo_core.advantages([[0.0, 0.0], [1.0, 3.0]], method="maxrl", eps=0.0) == [[0.0, 0.0], [-0.5, 0.5]]
    # Four draws, one of them right: k = 2 weighs it by the chance that its partner fails.
    np.testing.assert_allclose(
        ebpo_core.advantages([[1.0, 0.0, 0.0, 0.0]], method="pass_at_k", k=2),
        [[2.0, -2 / 3, -2 / 3, -2 / 3]],
        atol=1e-15,
    )


def test_rows_that_do_not_count_get_nothing_and_change_nothing() -> None:
    r = np.array([1.0, np.nan, 0.0, 0.0, 5.0])
    mask = np.array([True, True, True, True, False])
    got = ebpo_core.advantages(r, [0] * 5, mask=mask, method="pass_at_k", k=2)
    assert got[1] == got[4] == 0.0
    assert np.array_equal(
        got[[0, 2, 3]], np.asarray(ebpo_core.advantages([[1.0, 0.0, 0.0]], method="pass_at_k", k=2))[0]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "pass_at_k"}, "needs k"),
        ({"method": "pass_at_k", "k": 0}, "k=0: expected a whole number, at least 1"),
        ({"method": "pass_at_k", "k": 3}, "k=3: expected at most the counted rewards"),
        ({"method": "pass_at_k", "k": 2, "eps": 0.1}, "takes only k"),
        ({"method": "constant", "c": float("nan")}, "c="),
        ({"method": "batch_mean", "eps": 0.1}, "takes no options"),
        ({"method": "maxrl", "eps": -1.0}, "eps=-1"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ebpo_core.advantages([[1.0, 0.0]], **options)


def test_maxrl_refuses_negative_rewards() -> None:
    with pytest.raises(ValueError, match='rewards holds -1, and method="maxrl" needs rewards of at least 0'):
        ebpo_core.advantages([[1.0, -1.0]], method="maxrl")
    ebpo_core.advantages([[1.0, -1.0]], method="maxrl", mask=[[True, False]])


@pytest.mark.parametrize("eps", [5e-324, 1e-320, 1e-309])
def test_an_eps_without_a_finite_reciprocal_makes_no_nan(eps: float) -> None:
    for rewards in ([[1.0, 1.0], [1.0, 1.0]], np.ones((2, 2)), np.ones((2, 2), np.float32)):
        for normalize in ("batch", "scale"):
            ebpo = ebpo_core.EBPO(normalize=normalize, eps=eps)
            np.testing.assert_array_equal(ebpo(rewards), np.zeros((2, 2)))
        np.testing.assert_array_equal(ebpo_core.advantages(rewards, eps=eps), np.zeros((2, 2)))
        np.testing.assert_array_equal(ebpo_core.advantages(rewards, method="reinforce_pp", eps=eps), np.zeros((2, 2)))
    assert ebpo_core.EBPO(eps=eps).group([1.0, 1.0]) == [0.0, 0.0]
    tiny = [[1e-320, 0.0], [5e-324, 0.0]]
    assert ebpo_core.advantages(tiny, method="maxrl", eps=min(eps, 1e-320)) == [[0.0, 0.0], [0.0, 0.0]]
    np.testing.assert_array_equal(reference.baseline_advantages("maxrl", tiny, eps=min(eps, 1e-320)), np.zeros((2, 2)))


@pytest.mark.parametrize("method", ["rloo", "dr_grpo", "batch_mean", "james_stein", "pass_at_k"])
def test_what_float32_cannot_hold_saturates(method: Any) -> None:
    top = float(np.finfo(np.float32).max)
    rewards = np.float32([[top, -top, -top], [-top, -top, -top]])
    options = {"k": 2} if method == "pass_at_k" else {}
    got = ebpo_core.advantages(rewards, method=method, **options)
    wide = ebpo_core.advantages(rewards.astype(np.float64), method=method, **options)
    np.testing.assert_array_equal(got, np.clip(wide, -top, top).astype(np.float32))
    assert np.abs(wide).max() > 1.3 * top
