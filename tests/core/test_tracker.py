"""A prior per prompt: discounts at its own visits, states in the middle of a run, and the Beta-Bernoulli posterior."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ebpo_core
from ebpo_core import reference
from oracle import assert_same_state, cases, keys, options


@settings(max_examples=100)
@given(
    opts=options(),
    batches=st.lists(st.tuples(cases(scale=1.0, offset=0.0), st.booleans()), min_size=1, max_size=6),
    data=st.data(),
)
def test_a_run_goes_on_from_its_state_bit_for_bit(
    opts: dict[str, Any], batches: list[Any], data: st.DataObject
) -> None:
    """Saved at any step, in any form, and loaded: the same advantages and priors; and an update can be taken back."""
    whole, resumed = ebpo_core.EBPO(**opts), ebpo_core.EBPO(**opts)
    for case, update in batches:
        call = {"update": update, "keys": data.draw(st.none() | keys(case), label="keys")}
        form = data.draw(st.sampled_from(["json", "arrays", "pickle", "copy"]), label="form")
        if form == "pickle":
            resumed = pickle.loads(pickle.dumps(resumed))
        elif form == "copy":
            resumed = copy.deepcopy(resumed)
        else:
            state = resumed.state_dict(arrays=form == "arrays")
            resumed = ebpo_core.EBPO(**opts)
            resumed.load_state_dict(json.loads(json.dumps(state)) if form == "json" else state)
        before = copy.deepcopy(whole)
        expected = whole(case.rewards, case.groups, mask=case.mask, **call)
        np.testing.assert_array_equal(resumed(case.rewards, case.groups, mask=case.mask, **call), expected)
        assert resumed == whole
        assert resumed.state_dict() == whole.state_dict()
        assert resumed._state.digest() == whole._state.digest()
        if update:
            taken_back = whole.before_update()
            assert taken_back == before
            assert taken_back.state_dict() == before.state_dict()
            np.testing.assert_array_equal(taken_back(case.rewards, case.groups, mask=case.mask, **call), expected)
            assert taken_back == whole


@pytest.mark.parametrize("matrix", [True, False])
def test_the_first_update_by_another_rate_is_taken_back_to_the_bit(matrix: bool) -> None:
    first = ebpo_core.EBPO(decay=0.9)
    for keys_of_batch in (["a", ("a", 1)], ["b", "b"], ["b", "c"]):
        first(np.array([[1.0, 0.3], [0.2, 0.1]]), keys=keys_of_batch)
    later = ebpo_core.EBPO(decay=0.7)
    later.load_state_dict(first.state_dict())
    before = copy.deepcopy(later)
    later(np.array([[0.0, 0.7], [0.5, 0.5]]), keys=None if matrix else ["b", "d"])
    taken_back = later.before_update()
    assert taken_back == before
    assert taken_back.state_dict() == before.state_dict()
    assert taken_back._state.digest() == before._state.digest()


@settings(max_examples=50)
@given(
    opts=options(),
    ranks=st.lists(st.lists(cases(scale=1.0, offset=0.0), max_size=3), min_size=2, max_size=3),
    data=st.data(),
)
def test_merging_adds_what_each_remembers_now(opts: dict[str, Any], ranks: list[Any], data: st.DataObject) -> None:
    merged, twin = ebpo_core.EBPO(**opts), reference.EBPO(**opts)
    seen = []
    for batches in ranks:
        part, twin_part = ebpo_core.EBPO(**opts), reference.EBPO(**opts)
        for case in batches:
            keyed = data.draw(keys(case), label="keys")
            part(case.rewards, case.groups, mask=case.mask, keys=keyed)
            twin_part(*case.args, mask=case.mask, keys=keyed)
            seen.append(case.counted)
        merged.merge(part)
        twin.merge(twin_part)
    assert_same_state(merged.state_dict(), twin, seen)
    for key, prior in twin.keys.items():
        of_key = merged.priors[key[0] if len(key) == 1 else key]
        assert of_key.count == pytest.approx(prior.rewards.count, rel=1e-12)


def test_a_visit_discounts_the_prompt_its_parents_and_nothing_else() -> None:
    ebpo = ebpo_core.EBPO(decay=0.5, decay_by="visit")
    ebpo([[1.0, 0.0], [1.0, 1.0]], keys=[("a", 1), ("b", 1)])
    ebpo([[1.0, 0.0]], keys=[("a", 2)])
    ebpo([[0.0, 0.0]], keys=[("a", 1)])
    counts = {key: prior.count for key, prior in ebpo.priors.items()}
    assert counts == {(): 4.0, "a": 3.5, ("a", 1): 3.0, "b": 2.0, ("b", 1): 2.0, ("a", 2): 2.0}
    assert ebpo.priors[("a", 1)].mean == pytest.approx((0.5 * 1) / 3)
    by_update = ebpo_core.EBPO(decay=0.5)
    by_update([[1.0, 0.0], [1.0, 1.0]], keys=[("a", 1), ("b", 1)])
    by_update([[1.0, 0.0]], keys=[("a", 2)])
    assert by_update.priors["b"].count == 1.0


def test_a_prompt_may_have_seen_more_than_its_parent() -> None:
    ebpo = ebpo_core.EBPO(decay=0.5, decay_by="visit")
    ebpo([[1.0, 0.0] * 8], keys=["long"])
    for _ in range(5):
        ebpo([[1.0]], keys=["short"])
    assert ebpo.priors["long"].count > ebpo.prior.count
    other = ebpo_core.EBPO(decay=0.5, decay_by="visit")
    other.load_state_dict(ebpo.state_dict())
    assert other == ebpo
    with pytest.raises(ValueError, match='decay_by="visits": expected "update" or "visit"'):
        ebpo_core.EBPO(decay_by="visits")  # type: ignore[arg-type]


RHO, KAPPA, ROUNDS = 0.8, 6.0, 40
"""Discount and prior strength of the posteriors below, and visits of each prompt."""


@pytest.mark.parametrize("G", [1, 2, 4])
def test_it_is_a_discounted_beta_bernoulli_posterior(G: int) -> None:
    """arXiv 2603.18444: a = rho a + successes, b = rho b + failures, at the prompt's visits; the parent is the prior.

    Of a key, theta~ has the posterior mean under Beta(kappa G m, kappa G (1 - m)), m the parent's mean. The group then
    is G more observations under a prior of that mean and of strength sigma2 / tau2: a Beta-Binomial posterior mean.
    With G = 1 and ddof=1, tau2 is 0 exactly, S is 1, and V is the posterior mean from the visits before.
    """
    rng = np.random.default_rng(G)
    ebpo = ebpo_core.EBPO(
        decay=RHO, decay_by="visit", kappa=KAPPA, normalize="none", score="before", sigma2="within", tau2="debiased",
        ddof=1,
    )  # fmt: skip
    p = rng.random(12)
    a, b = np.zeros(12), np.zeros(12)
    for _ in range(ROUNDS):
        prompts = rng.choice(12, 5, replace=False)
        m = ebpo.prior.mean
        r = (rng.random((5, G)) < p[prompts, None]).astype(float)
        V = r - ebpo(r, keys=[int(i) for i in prompts])
        if not np.isnan(m):
            posterior = (a[prompts] + KAPPA * G * m) / (a[prompts] + b[prompts] + KAPPA * G)
            diagnostics = ebpo.diagnostics
            assert diagnostics is not None
            np.testing.assert_allclose(diagnostics.prior_mean, posterior, rtol=1e-12)
            if G == 1:
                assert (diagnostics.shrinkage == 1).all()
                np.testing.assert_allclose(V[:, 0], posterior, rtol=1e-12)
            else:
                strength = diagnostics.prior_sigma2 / np.maximum(diagnostics.prior_tau2, 1e-300)
                binomial = (strength * posterior + r.sum(1)) / (strength + G)
                np.testing.assert_allclose(V, np.repeat(binomial[:, None], G, 1), rtol=1e-9)
        a[prompts] = RHO * a[prompts] + r.sum(1)
        b[prompts] = RHO * b[prompts] + G - r.sum(1)
    state = {entry["key"][0]: entry["rewards"] for entry in ebpo.state_dict()["keys"]}
    np.testing.assert_allclose([state[i]["count"] for i in range(12)], a + b, rtol=1e-12)
    np.testing.assert_allclose([state[i]["count"] * state[i]["mean"] for i in range(12)], a, rtol=1e-12)


def test_one_completion_a_prompt_learns_the_prompts() -> None:
    """G = 1: after some rounds the advantages are against each prompt's own pass rate, not against the batch's mean."""
    rng = np.random.default_rng(0)
    p = np.array([0.05, 0.95, 0.5, 0.1] * 16)
    tracker = ebpo_core.EBPO(
        decay=0.95, decay_by="visit", kappa=1.0, normalize="none", score="before", sigma2="within", tau2="debiased",
        ddof=1,
    )  # fmt: skip
    plain = ebpo_core.EBPO(normalize="none", score="before")
    squares = np.zeros(2)
    for step in range(60):
        r = (rng.random((64, 1)) < p[:, None]).astype(float)
        advantages = [tracker(r, keys=range(64)), plain(r)]
        if step >= 30:
            squares += [float(np.mean(A**2)) for A in advantages]
    best = np.mean(p * (1 - p)) * 30
    assert best < squares[0] < 1.1 * best  # the variance that no baseline removes
    assert not np.isnan(squares).any()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("names", lambda a: a.astype(np.int64), "keys.names' is int64.*uint8 in 1 dimensions"),
        ("names", lambda a: a[:-1], "keys.names=|keys.lengths="),
        ("names", lambda a: np.full_like(a, 0xFF), "no UTF-8"),
        ("names", lambda a: np.full_like(a, ord("x")), "stands for no string or int"),
        ("lengths", lambda a: a[:-1], r"keys\.(parents|names)|keys.lengths"),
        ("lengths", lambda a: np.zeros_like(a), "keys.lengths=0|stands for no"),
        ("parents", lambda a: np.arange(len(a)), "keys.parents=0"),
        ("parents", lambda a: a - 5, "keys.parents="),
        ("statistics", lambda a: a[:, :8], r"keys.statistics' has shape \[4, 8\]"),
        ("statistics", lambda a: a[0], "float64 of shape"),
        ("statistics", lambda a: a * np.nan, "count=NaN"),
        ("idle", lambda a: a - 1, "keys.idle=-1"),
        ("idle", lambda _: None, "keys.idle' is None"),
    ],
)
def test_damaged_arrays_are_refused_and_nothing_changes(name: str, change: Any, message: str) -> None:
    ebpo = ebpo_core.EBPO(decay=0.9)
    ebpo([[1.0, 0.0]] * 4, keys=[("a", 1), "a", "\ud800 \n é", 2**70])
    before = ebpo.state_dict()
    state = ebpo.state_dict(arrays=True)
    assert ebpo_core.EBPO(decay=0.9) != ebpo
    state["keys"][name] = change(state["keys"][name])
    with pytest.raises(ValueError, match=message):
        ebpo.load_state_dict(state)
    assert ebpo.state_dict() == before
