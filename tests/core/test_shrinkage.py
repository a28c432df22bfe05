"""A fixed S in the place of the estimated one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ebpo_core

shares = st.floats(0.0, 1.0)
batches = st.integers(2, 5).flatmap(
    lambda G: st.lists(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=G, max_size=G), min_size=2, max_size=6)
)


@given(history=batches, batch=batches, share=shares)
def test_equal_groups_get_a_fixed_mix_of_the_groups_and_the_batchs_mean(
    history: list[list[float]], batch: list[list[float]], share: float
) -> None:
    ebpo = ebpo_core.EBPO(shrinkage=share)
    ebpo(history)  # its mean shifts every baseline alike, and the last step takes that out again
    got = np.array(ebpo(batch))
    r = np.array(batch)
    seen = np.concatenate([np.ravel(history), r.ravel()])
    raw = r - (1 - share) * r.mean(1, keepdims=True) - share * r.mean() if np.ptp(seen) else np.zeros_like(r)
    np.testing.assert_allclose(got, raw / (raw.std(ddof=1) + 1e-6), atol=1e-9 * max(1.0, np.abs(got).max()))


def test_none_is_the_estimate_and_the_ends_are_known_rules() -> None:
    r = np.random.default_rng(0).random((6, 4))
    np.testing.assert_array_equal(ebpo_core.EBPO(shrinkage=None)(r), ebpo_core.EBPO()(r))
    batch_mean = ebpo_core.advantages(r, method="batch_mean")
    np.testing.assert_allclose(ebpo_core.EBPO(shrinkage=1.0, normalize="none")(r), batch_mean, atol=1e-15)
    dr_grpo = ebpo_core.advantages(r, method="dr_grpo")
    np.testing.assert_allclose(ebpo_core.EBPO(shrinkage=0, normalize="none")(r), dr_grpo, atol=1e-15)


def test_groups_of_every_size_and_key_have_it() -> None:
    ebpo = ebpo_core.EBPO(shrinkage=0.25, normalize="none")
    rewards, groups = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0], [0, 0, 0, 1, 1, 2]
    for _ in range(2):
        got = ebpo(rewards, groups, keys=["a", "a", "a", "b", "b", None])
        d = ebpo.diagnostics
        assert d is not None
        np.testing.assert_array_equal(d.shrinkage, [0.25, 0.25, 0.25])
    mu = [ebpo.shrunken_prior(key).mean for key in ("a", "b", None)]
    means = [1 / 3, 1.0, 0.0]
    wanted = [r - 0.75 * means[g] - 0.25 * mu[g] for r, g in zip(rewards, groups, strict=True)]
    np.testing.assert_allclose(got, wanted, atol=1e-15)


def test_it_is_0_until_rewards_that_differ_have_been_seen() -> None:
    ebpo = ebpo_core.EBPO(shrinkage=0.5, score="before", normalize="none")
    np.testing.assert_array_equal(ebpo([[0.0, 0.0]]), [[0.0, 0.0]])
    np.testing.assert_array_equal(ebpo([[1.0, 1.0], [1.0, 0.0]]), [[0.0, 0.0], [0.5, -0.5]])  # it has seen zeros alone
    np.testing.assert_allclose(ebpo([[1.0, 1.0]]), [[0.25, 0.25]])  # half of the distance to the mean, 1/2


def test_groups_one_by_one_are_divided_by_a_spread_that_is_never_0() -> None:
    ebpo = ebpo_core.EBPO(shrinkage=0.5)
    assert np.abs(ebpo.group([0.0, 0.0])).max() == 0.0
    assert np.abs(ebpo.group([1.0, 1.0])).max() == 0.0  # the prior has seen zeros alone
    np.testing.assert_allclose(ebpo.group([1.0, 1.0]), 0.25 / (0.5 + 1e-6))  # prior of mean 1/2 and variance 1/4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shrinkage": 1.5}, ValueError, r"shrinkage=1.5: expected None, .* or a number in \[0, 1\]"),
        ({"shrinkage": -0.1}, ValueError, r"shrinkage=-0.1: .*\[0, 1\]"),
        ({"shrinkage": float("nan")}, ValueError, r"shrinkage=NaN: .*\[0, 1\]"),
        ({"shrinkage": True}, TypeError, "shrinkage=True is of type bool"),
        ({"shrinkage": "half"}, TypeError, "shrinkage='half' is of type str"),
        ({"shrinkage": 0.5, "tau2": "debiased"}, ValueError, 'shrinkage=0.5: .*tau2="debiased".*leave it or them out'),
        ({"shrinkage": 0.5, "sigma2": "within"}, ValueError, 'shrinkage=0.5: .*sigma2="within"'),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ebpo_core.EBPO(**options)
    with pytest.raises(error, match=message):
        ebpo_core.advantages([[0.0, 1.0]], **options)


@pytest.mark.parametrize("version", [1, 2])
def test_a_state_that_was_written_before_it_is_read(version: int) -> None:
    ebpo = ebpo_core.EBPO()
    ebpo([[0.0, 1.0], [1.0, 1.0]], keys=["a", "b"], step=3)
    state = ebpo.state_dict()
    later = ["shrinkage", "decay_by"] if version == 1 else ["shrinkage"]
    state["options"] = {name: value for name, value in state["options"].items() if name not in later}
    state["version"] = version
    if version == 1:
        del state["idle_decay"], state["updates"]
        state["keys"] = [{name: value for name, value in entry.items() if name != "idle"} for entry in state["keys"]]
    other = ebpo_core.EBPO()
    other.load_state_dict(state)
    assert other == ebpo
    with pytest.raises(ValueError, match="shrinkage='missing'"):
        other.load_state_dict({**state, "version": 3})
