"""What the paper proves or claims (arXiv 2602.05165, §3), each statement as a test, and two findings of ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import ebpo_core
from ebpo_core import reference

binary = st.integers(2, 8).flatmap(
    lambda G: st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=G, max_size=G), min_size=2, max_size=8)
)


def test_algorithm_1_by_hand() -> None:
    """Two groups of two, worked out on paper: mu = (1/2, 0), mu_glob = 1/4, sigma2 = 3/16, tau2 = 1/16."""
    ebpo = ebpo_core.EBPO()
    got = np.array(ebpo([[1.0, 0.0], [0.0, 0.0]]))
    d = ebpo.diagnostics
    assert d is not None
    assert (d.mu_glob, d.sigma2, d.tau2) == (0.25, 0.1875, 0.0625)
    S = (0.1875 / 2) / (0.1875 / 2 + 0.0625)
    np.testing.assert_allclose(d.shrinkage, [S, S], rtol=1e-15)
    V = np.array([(1 - S) * 0.5 + S * 0.25, S * 0.25])
    np.testing.assert_allclose(d.baseline, V, rtol=1e-15)
    raw = np.array([[1.0, 0.0], [0.0, 0.0]]) - V[:, None]
    np.testing.assert_allclose(got, (raw - raw.mean()) / (raw.std(ddof=1) + 1e-6), rtol=1e-14)


@pytest.mark.parametrize("normalize", ["none", "scale"])
@given(batch=binary, history=binary)
def test_a_failed_group_is_never_silent(normalize: Any, batch: Any, history: Any) -> None:
    """§3a: in an all-zero group raw = -S mu_glob < 0 once the policy has succeeded; all-one groups by symmetry."""
    ebpo = ebpo_core.EBPO(normalize=normalize)
    ebpo(history)
    failed, passed = np.zeros_like(batch), np.ones_like(batch)
    a_fail = np.array(ebpo(failed, update=False))
    d = ebpo.diagnostics
    assert d is not None
    a_pass = np.array(ebpo(passed, update=False))
    assume(0 < d.mu_glob < 1)
    assert (d.shrinkage > 0).all()
    assert (a_fail < 0).all()
    assert (a_pass > 0).all()
    if normalize == "none":
        np.testing.assert_allclose(a_fail, np.broadcast_to(-d.shrinkage[:, None] * d.mu_glob, failed.shape), atol=1e-15)
        np.testing.assert_allclose(
            a_pass, np.broadcast_to(d.shrinkage[:, None] * (1 - d.mu_glob), failed.shape), atol=1e-15
        )
    assert not np.any(ebpo_core.advantages(failed, method="grpo"))  # plain GRPO learns nothing from it


@given(batch=binary, history=binary)
def test_batch_centring_can_silence_a_failed_group_of_equal_size(batch: Any, history: Any) -> None:
    """Step 6 leaves -S mean(mu): never positive, but 0 where the whole batch fails."""
    ebpo = ebpo_core.EBPO()
    ebpo(history)
    failed = np.array(batch) * 0
    assert not np.any(ebpo(failed, update=False))
    mixed = np.array(batch)
    mixed[0] = 0
    assert (np.array(ebpo(mixed, update=False))[0] <= 1e-9).all()


def test_batch_centring_can_flip_the_sign_of_a_larger_failed_group() -> None:
    """Why `normalize="scale"` exists: groups that failed alike differ in S, and the centre lies between them."""
    r, groups = np.zeros(46), np.repeat(np.arange(4), [15, 10, 10, 11])
    results = {}
    for normalize in ("batch", "scale"):
        ebpo = ebpo_core.EBPO(normalize=normalize)  # type: ignore[arg-type]
        ebpo([[1.0] * 8, [1.0] * 8, [1.0] * 5 + [0.0] * 3])
        results[normalize] = ebpo(r, groups, update=False)
    assert (results["batch"][:15] > 1).all()
    assert (results["scale"] < 0).all()


@pytest.mark.parametrize("G", [2, 4, 8])
def test_shrinkage_lowers_the_error_of_the_baseline(G: int) -> None:
    """§3b: MSE(V) = (1 - S) sigma2 / G < sigma2 / G, Gaussian model with known variances; 99.9% interval."""
    rng = np.random.default_rng(G)
    M, n, tau2, sigma2, mu_glob = 100_000, 1e6, 0.04, 0.2, 0.3
    ebpo = ebpo_core.EBPO()
    means = {"count": n, "mean": mu_glob, "m2": tau2 * n}
    rewards = {"count": n * G, "mean": mu_glob, "m2": sigma2 * n * G}
    prior = {"rewards": rewards, "group_means": means, "ssw": 0.0, "dof": n * (G - 1), "inv_n": n / G}
    ebpo.load_state_dict({**ebpo.state_dict(), "prior": prior})
    theta = rng.normal(mu_glob, np.sqrt(tau2), M)
    ebpo(rng.normal(theta[:, None], np.sqrt(sigma2), (M, G)), update=False)
    d = ebpo.diagnostics
    assert d is not None
    S = (sigma2 / G) / (sigma2 / G + tau2)
    errors = (d.baseline - theta) ** 2
    half_width = 3.3 * errors.std() / np.sqrt(M)
    assert abs(errors.mean() - (1 - S) * sigma2 / G) < half_width
    assert errors.mean() + half_width < sigma2 / G


@pytest.mark.parametrize("options", [{}, dict(sigma2="within", tau2="debiased"), dict(leave_one_out=True)])
@pytest.mark.parametrize("G", [2, 4, 8])
def test_the_estimated_baseline_beats_the_group_mean_on_binary_rewards(G: int, options: dict[str, Any]) -> None:
    """§3b with estimated variances: pass rates ~ Beta(1.2, 2.2), 0/1 rewards; paired differences over seeds."""
    differences = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        ebpo = ebpo_core.EBPO(**options)
        errors = []
        for _ in range(20):
            p = rng.beta(1.2, 2.2, 64)
            r = (rng.random((64, G)) < p[:, None]).astype(float)
            ebpo(r)
            d = ebpo.diagnostics
            assert d is not None
            errors.append(np.mean((d.baseline - p) ** 2) - np.mean((r.mean(1) - p) ** 2))
        differences.append(np.mean(errors))
    mean, half_width = np.mean(differences), 3.7 * np.std(differences, ddof=1) / np.sqrt(30)  # 99.9%, t with 29 df
    assert mean + half_width < 0


@given(low=st.floats(0.05, 0.9), high=st.floats(0.05, 0.9))
def test_failing_costs_more_where_the_policy_usually_succeeds(low: float, high: float) -> None:
    """§3c: |raw| of a failed group grows with mu_glob, the variances being equal."""
    assume(high - low > 1e-3)

    def penalty(mu_glob: float) -> float:
        ebpo = ebpo_core.EBPO(normalize="none")
        ebpo.load_state_dict(
            {
                "version": 1,
                "options": dict(ebpo.options),
                "prior": {
                    "rewards": {"count": 400.0, "mean": mu_glob, "m2": 80.0},
                    "group_means": {"count": 100.0, "mean": mu_glob, "m2": 5.0},
                    "ssw": 60.0,
                    "dof": 300.0,
                    "inv_n": 25.0,
                },
                "keys": [],
                "step": None,
            }
        )
        return float(ebpo([[0.0, 0.0, 0.0, 0.0]], update=False)[0][0])

    assert penalty(high) < penalty(low) < 0


def test_the_batch_in_its_own_prior_matters_less_and_less() -> None:
    """§3f: the bias of a batch being in its own prior decays as O(1/T): T times the distance stays bounded."""
    rng = np.random.default_rng(0)
    after, before = (ebpo_core.EBPO(normalize="none", score=s) for s in ("after", "before"))
    distances = []
    for _ in range(400):
        r = (rng.random((8, 4)) < rng.beta(2, 3, (8, 1))).astype(float)
        distances.append(np.abs(np.subtract(after(r), before(r))).max())
    steps = np.arange(1, 401)
    assert (distances * steps)[20:].max() < 5 * (distances * steps)[5:20].max()
    assert max(distances[200:]) < 0.05 * max(distances[1:5])


@given(batch=binary, history=binary)
def test_finding_batch_centring_cancels_the_global_mean(batch: Any, history: Any) -> None:
    """With one prior and equal groups, mu_glob shifts every raw advantage alike, and step 6 removes the shift."""
    ebpo = ebpo_core.EBPO()
    ebpo(history)
    got = np.array(ebpo(batch))
    d = ebpo.diagnostics
    assert d is not None
    S = d.shrinkage[0]
    r = np.array(batch)
    raw = r - ((1 - S) * r.mean(1, keepdims=True) + S * r.mean())  # the batch's mean in place of mu_glob
    np.testing.assert_allclose(got, raw / (raw.std(ddof=1) + 1e-6), atol=1e-12 * max(1.0, np.abs(got).max()))


def test_finding_expected_shrinkage_is_at_most_one_half() -> None:
    """sigma2 = w + t and tau2 = t + w / n in expectation, so S <= 1/2 once many groups have been seen, even where all
    prompts are equally hard."""
    rng = np.random.default_rng(0)
    for G in (2, 4, 8, 16):
        ebpo = ebpo_core.EBPO()
        ebpo((rng.random((100_000, G)) < 0.5).astype(float))  # equally hard: the best S would be 1
        d = ebpo.diagnostics
        assert d is not None
        assert d.shrinkage[0] == pytest.approx(0.5, abs=0.01)
        debiased = ebpo_core.EBPO(sigma2="within", tau2="debiased")
        debiased((rng.random((100_000, G)) < 0.5).astype(float))
        assert debiased.diagnostics is not None
        assert debiased.diagnostics.shrinkage[0] > 0.9
    single = ebpo_core.EBPO()
    single([[0.0, 1.0], [0.0, 1.0]])  # one batch may exceed it
    assert single.diagnostics is not None
    assert single.diagnostics.shrinkage.tolist() == [1.0, 1.0]


@given(batch=binary)
def test_within_and_debiased_are_the_beta_binomial_posterior(batch: Any) -> None:
    """For 0/1 rewards S = (a + b) / (a + b + n), where w / tau2 = a + b: the Beta prior with these moments."""
    ebpo = ebpo_core.EBPO(sigma2="within", tau2="debiased")
    ebpo(batch)
    prior, d, n = ebpo.prior, ebpo.diagnostics, len(batch[0])
    assert d is not None
    w, tau2, m = prior.sigma2("within"), prior.tau2("debiased"), prior.mean
    assume(tau2 > 1e-9)
    a, b = m * w / tau2, (1 - m) * w / tau2
    posterior = (a + np.sum(batch, axis=1)) / (a + b + n)
    np.testing.assert_allclose(d.baseline, posterior, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3.3, 1 / 3, 1e140, 1e-140, np.pi * 1e8])
@pytest.mark.parametrize("options", [{}, dict(eps=0.0), dict(normalize="scale"), dict(leave_one_out=True, eps=0.0)])
def test_one_single_value_gives_exactly_zero(value: float, options: dict[str, Any]) -> None:
    ebpo = ebpo_core.EBPO(**options)
    for shape in ((3, 7), (1, 1), (100, 3), (4, 13), (5, 19), (2, 25), (11, 49), (1, 999), (5, 16), (6, 8)):
        assert not np.any(ebpo_core.advantages(np.full(shape, value), **options))
        assert not np.any(ebpo(np.full(shape, value)))
        assert not np.any(ebpo(np.full(shape, value), update=False))
    uneven = np.full(6, value)
    assert not np.any(ebpo(uneven, [0, 0, 0, 1, 1, 2]))
    for method in ("grpo", "dr_grpo", "rloo", "reinforce_pp", "james_stein"):
        assert not np.any(ebpo_core.advantages(np.full((4, 3), value), method=method))


def test_diagnostics() -> None:
    ebpo = ebpo_core.EBPO()
    assert ebpo.diagnostics is None
    ebpo([1.0, 1.0, 0.0, 0.0, 1.0, 0.0, np.nan], ["a", "a", "b", "b", "c", "c", "d"])
    d = ebpo.diagnostics
    assert d is not None
    assert d.count.tolist() == [2.0, 2.0, 2.0, 0.0]
    assert np.isnan(d.shrinkage[3])
    assert np.isnan(d.baseline[3])
    assert (d.saturated_fail, d.saturated_pass) == (1 / 3, 1 / 3)
    assert d.saturated == 2 / 3
    assert np.isnan(d.outlier)  # no prior before the first batch
    ebpo([[1.0, 100.0]])
    assert ebpo.diagnostics is not None
    assert ebpo.diagnostics.outlier == pytest.approx((100 - 0.5) / 0.5)  # against the prior before the batch
    ebpo([[0.5, 1000.0, np.nan]], mask=[[True, False, True]])
    assert ebpo.diagnostics.outlier < 1  # what does not count is no outlier
    ebpo([0.5, 1000.0, np.nan], [0, 0, 0], mask=[True, False, True])
    assert ebpo.diagnostics.outlier < 1
    empty = ebpo_core.EBPO(score="before")
    empty([[0.0, 0.0]])
    assert empty.diagnostics is not None
    assert np.isnan([empty.diagnostics.mu_glob, empty.diagnostics.sigma2, empty.diagnostics.tau2]).all()
    assert (empty.diagnostics.saturated_fail, empty.diagnostics.saturated_pass) == (1.0, 0.0)


def test_saturated_groups_fail_or_pass_by_the_prior_mean() -> None:
    """Rewards need not be 0 and 1: what counts is the side of mu_glob; at it, the sign of the reward."""

    def shares(history: Any, batch: Any, **call: Any) -> tuple[float, float]:
        ebpo = ebpo_core.EBPO()
        if history is not None:
            ebpo(history)
        ebpo(batch, **call)
        assert ebpo.diagnostics is not None
        return ebpo.diagnostics.saturated_fail, ebpo.diagnostics.saturated_pass

    history = [[0.0, 1.0]]  # mean 0.5
    batch = [[0.2, 0.2], [0.8, 0.8], [0.9, 0.9], [0.2, 0.8]]
    assert shares(history, batch, update=False) == (0.25, 0.5)
    assert shares(history, [[0.5, 0.5]], update=False) == (0.0, 1.0)
    assert shares([[-1.0, 1.0]], [[0.0, 0.0]], update=False) == (1.0, 0.0)
    assert shares([[-9.0, -3.0]], [[-1.0, -1.0]], update=False) == (0.0, 1.0)
    assert shares(None, [[1.0, 1.0]]) == (0.0, 1.0)  # the first batch is its own prior
    assert shares(None, [[0.0, 0.0]]) == (1.0, 0.0)
    assert shares(None, [[2.0, 2.0], [-1.0, -1.0]], update=False) == (0.5, 0.5)  # an empty prior: against 0


def test_update_false_scores_against_the_stored_prior_alone() -> None:
    """Also with leave-one-out and decay, which belong to an update: the batch is not in that prior anyway."""
    for options in ({}, {"leave_one_out": True}, {"decay": 0.5}, {"score": "before"}):
        ebpo = ebpo_core.EBPO(normalize="none", ddof=1, **options)  # ddof makes a decayed count visible
        ebpo([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
        prior = ebpo.prior
        S = (prior.sigma2(ddof=1) / 2) / (prior.sigma2(ddof=1) / 2 + prior.tau2(ddof=1))
        V = (1 - S) * 0.25 + S * prior.mean
        np.testing.assert_allclose(ebpo([[0.5, 0.0], [9.0, 8.0]], update=False)[0], [0.5 - V, -V], rtol=1e-14)


def test_leave_one_out_ignores_the_group_itself() -> None:
    """Changing a group's rewards moves its own mean, and nothing else of its baseline."""
    rng = np.random.default_rng(0)
    history, batch = rng.random((20, 4)), rng.random((5, 4))
    baselines = []
    for value in (batch[2], batch[2] + 1000):
        ebpo = ebpo_core.EBPO(leave_one_out=True)
        ebpo(history)
        ebpo(np.vstack([batch[:2], value[None], batch[3:]]))
        d = ebpo.diagnostics
        assert d is not None
        baselines.append((d.shrinkage[2], (d.baseline[2] - (1 - d.shrinkage[2]) * value.mean()) / d.shrinkage[2]))
    np.testing.assert_allclose(baselines[0], baselines[1], rtol=1e-9)


def test_james_stein_by_hand() -> None:
    """Leave-one-out at both levels, for one reward of the first of three groups."""
    r = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    inner = r[0, 1:].mean()
    outer = r[1:].mean(1).mean()
    v = np.mean(r[1:].var(1, ddof=1) / 3)
    s = r[1:].mean(1).var()
    lam = 2 / 3 * v / (v + s)
    expected = r[0, 0] - ((1 - lam) * inner + lam * outer)
    assert ebpo_core.advantages(r, method="james_stein")[0, 0] == pytest.approx(expected, rel=1e-14)
    assert ebpo_core.advantages([[1.0, 0.0]], method="james_stein") == [[1.0, -1.0]]  # one group: plain RLOO
    assert ebpo_core.advantages([[1.0]], method="james_stein") == [[0.0]]
    assert ebpo_core.advantages([1.0, 0.0, 0.5], [0, 0, 1], method="james_stein")[2] == 0.0  # singleton: 0.5 - 0.5


def test_reference_twins_agree_with_each_other() -> None:
    r = np.random.default_rng(1).random((7, 5))
    np.testing.assert_allclose(reference.algorithm_1(r), reference.EBPO()(r), atol=1e-13)
