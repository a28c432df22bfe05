"""Priors by key: against the twin, by hand, their bound, their forms, and their place in the state."""

from __future__ import annotations

import json
import pickle
from enum import Enum, IntEnum
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ebpo_core
from ebpo_core import reference
from oracle import assert_same_state, cases, keys, options, raw_spread, tolerance

R = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
KEYS = ["a", ("a", 3), None]


class Topic(str, Enum):
    """Members are equal to their strings, and print as something else."""

    THREE = "3"
    BATCH = "batch"
    GROUP = "group"


class Level(IntEnum):
    ONE = 1


@settings(max_examples=200)
@given(
    opts=options(),
    batches=st.lists(st.tuples(cases(scale=1.0, offset=0.0), st.booleans(), st.booleans()), min_size=1, max_size=5),
    data=st.data(),
)
def test_sequences_equal_the_twin(opts: dict[str, Any], batches: list[Any], data: st.DataObject) -> None:
    """Keys that come and go, batches without keys, frozen calls, replays, a pickle or a merge in the middle."""
    ours, twin = ebpo_core.EBPO(**opts), reference.EBPO(**opts)
    seen: list[np.ndarray] = []
    for i, (case, update, interrupt) in enumerate(batches):
        step = data.draw(st.sampled_from([None, i, i - 1 if i else 0]), label="step")
        call: dict[str, Any] = {"update": update, "step": step, "keys": data.draw(st.none() | keys(case), label="keys")}
        spread = raw_spread(twin, case, **call)
        expected = twin(*case.args, mask=case.mask, **call)
        got = ours(case.rewards, case.groups, mask=case.mask, **call)
        seen.append(case.counted)
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance(expected, seen, spread))
        if interrupt:
            ours = pickle.loads(pickle.dumps(ours))
            other, twin_other = ebpo_core.EBPO(**opts), reference.EBPO(**opts)
            other(case.rewards, case.groups, mask=case.mask, keys=call["keys"])
            twin_other(*case.args, mask=case.mask, keys=call["keys"])
            ours.merge(other)
            twin.merge(twin_other)
        assert_same_state(ours.state_dict(), twin, seen)


@settings(max_examples=100)
@given(case=cases(), opts=options(), data=st.data())
def test_the_root_alone_is_the_estimator_without_keys(case: Any, opts: dict[str, Any], data: st.DataObject) -> None:
    plain, rooted = ebpo_core.EBPO(**opts), ebpo_core.EBPO(**opts)
    root = [data.draw(st.sampled_from([None, ()]))] * len(case.rewards)
    # Without one, a plain matrix takes the core's call for it alone, which rounds in another order.
    mask = np.ones(case.rewards.shape, dtype=bool) if case.mask is None else case.mask
    for _ in range(2):
        expected = plain(case.rewards, case.groups, mask=mask)
        np.testing.assert_array_equal(rooted(case.rewards, case.groups, mask=mask, keys=root), expected)
    assert plain == rooted


def test_the_blend_by_hand() -> None:
    ebpo = ebpo_core.EBPO(normalize="none", kappa=3.0)
    got = np.asarray(ebpo(R, keys=KEYS))
    # under "a": the first two groups; under ("a", 3): the second; under the root: all three
    root = np.array([R.mean(), R.var(), R.mean(1).var()])
    a = R[:2]
    theta_a = np.array([a.mean(), a.var(), a.mean(1).var()])
    blend_a = (1 - 3 / 5) * theta_a + 3 / 5 * root
    blend_a3 = (1 - 3 / 4) * np.array([0.0, 0.0, 0.0]) + 3 / 4 * blend_a
    for row, (mu, sigma2, tau2) in enumerate((blend_a, blend_a3, root)):
        S = (sigma2 / 4) / (sigma2 / 4 + tau2)
        V = (1 - S) * R[row].mean() + S * mu
        np.testing.assert_allclose(got[row], R[row] - V, rtol=1e-13, atol=1e-15)
    assert ebpo.shrunken_prior("a") == pytest.approx(tuple(blend_a))
    assert ebpo.shrunken_prior(("a", 3)) == pytest.approx(tuple(blend_a3))
    assert ebpo.shrunken_prior() == pytest.approx(tuple(root))
    diagnostics = ebpo.diagnostics
    assert diagnostics is not None
    assert diagnostics.keys == ("a", ("a", 3), ())
    np.testing.assert_allclose(diagnostics.prior_mean, [blend_a[0], blend_a3[0], root[0]])
    np.testing.assert_allclose(diagnostics.prior_sigma2, [blend_a[1], blend_a3[1], root[1]])
    np.testing.assert_allclose(diagnostics.prior_tau2, [blend_a[2], blend_a3[2], root[2]])


def test_diagnostics_without_keys_name_the_one_prior() -> None:
    ebpo = ebpo_core.EBPO()
    ebpo(R)
    diagnostics = ebpo.diagnostics
    assert diagnostics is not None
    assert diagnostics.keys is None
    assert diagnostics.prior_mean.tolist() == [diagnostics.mu_glob] * 3
    empty = ebpo_core.EBPO()
    empty(R, keys=KEYS, update=False)
    assert empty.diagnostics is not None
    assert np.isnan(empty.diagnostics.prior_mean).all()


def test_an_unseen_key_scores_as_its_parent_and_opens_nothing() -> None:
    ebpo = ebpo_core.EBPO()
    ebpo(R, keys=["a", "a", "b"])
    before = ebpo.state_dict()
    as_parent = ebpo(R, keys=["a", "a", "b"], update=False)
    unseen = ebpo(R, keys=[("a", "new"), ("a", 7), ("b", "x", 1)], update=False)
    np.testing.assert_array_equal(unseen, as_parent)
    assert ebpo.shrunken_prior(("a", "new")) == ebpo.shrunken_prior("a")
    assert ebpo.shrunken_prior("nowhere") == ebpo.shrunken_prior()
    assert ebpo.state_dict() == before


def test_a_key_comes_of_age_and_an_idle_one_falls_back() -> None:
    rng = np.random.default_rng(0)
    ebpo = ebpo_core.EBPO(decay=0.9)
    distance = []
    for _ in range(30):
        r = (rng.random((8, 4)) < np.repeat([0.1, 0.9], 4)[:, None]).astype(float)
        ebpo(r, keys=["hard"] * 4 + ["easy"] * 4)
        distance.append(abs(ebpo.shrunken_prior("hard").mean - 0.1))
    assert distance[-1] < 0.15 < distance[0]
    for _ in range(60):  # only easy ones from now on
        ebpo((rng.random((4, 4)) < 0.9).astype(float), keys=["easy"] * 4)
    assert ebpo.priors["hard"].group_count == pytest.approx(ebpo.priors["hard"].count / 4)
    assert ebpo.priors["hard"].group_count < 0.1  # it still exists, and hardly counts
    assert ebpo.shrunken_prior("hard").mean == pytest.approx(ebpo.prior.mean, abs=0.01)


def test_topics_that_differ_in_difficulty_lower_the_error_of_the_baseline() -> None:
    """Paper: Var_q(theta) = E_k Var(theta | k) + Var_k(E(theta | k)), and a prior per topic removes the second term."""
    rng = np.random.default_rng(1)
    one, many = ebpo_core.EBPO(sigma2="within", tau2="debiased"), ebpo_core.EBPO(sigma2="within", tau2="debiased")
    topics = [f"topic {k}" for k in range(9)]
    errors = np.zeros(2)
    for step in range(60):
        p = np.clip(np.repeat(np.linspace(0.1, 0.9, 9), 4) + rng.normal(0, 0.05, 36), 0.01, 0.99)
        r = (rng.random((36, 4)) < p[:, None]).astype(float)
        one(r)
        many(r, keys=np.repeat(topics, 4))
        if step >= 20:
            errors += [np.mean((e.diagnostics.baseline - p) ** 2) for e in (one, many)]  # type: ignore[union-attr]
    assert errors[1] < 0.6 * errors[0]


def test_the_prior_mean_survives_batch_centring_where_keys_differ() -> None:
    """With one prior, centring cancels it; with keys the contrast between them stays."""
    start = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    batch = np.array([[0.0, 0.0], [0.0, 0.0]])
    one, keyed = ebpo_core.EBPO(), ebpo_core.EBPO(kappa=0.0)
    one(start)
    keyed(start, keys=["hard", "hard", "easy", "easy"])
    assert not np.any(one(batch))
    hard, easy = np.asarray(keyed(batch, keys=["hard", "easy"]))[:, 0]
    assert easy < 0 < hard  # to fail where one usually succeeds costs more


def test_too_many_keys_are_refused_and_nothing_changes() -> None:
    ebpo = ebpo_core.EBPO(max_keys=3)
    ebpo(R, keys=["a", ("a", 1), None])
    before = ebpo.state_dict()
    with pytest.raises(ValueError, match=r"keys would make 4 priors.*more than max_keys=3.*larger max_keys"):
        ebpo(R, keys=[("b", 1), "a", "a"])  # "b" and ("b", 1)
    with pytest.raises(ValueError, match="max_keys=3"):
        ebpo.group([1.0, 0.0], ("b", 1))
    assert ebpo.state_dict() == before
    ebpo(R, keys=["c", "d", "e"], update=False)
    ebpo(R, keys=["c", "d", "e"], mask=np.zeros(R.shape, dtype=bool))  # a group without a valid row opens none
    assert ebpo.state_dict()["keys"] == before["keys"]
    ebpo(R, keys=["a", "b", ("a", 1)])
    assert list(ebpo.priors) == [(), "a", ("a", 1), "b"]

    larger = ebpo_core.EBPO(max_keys=4)
    larger.load_state_dict(ebpo.state_dict())
    larger(R, keys=["new", "a", "a"])
    with pytest.raises(ValueError, match="4 priors.*max_keys=3"):
        ebpo.load_state_dict(larger.state_dict())
    with pytest.raises(ValueError, match="max_keys=3"):
        ebpo.merge(larger)
    assert len(ebpo.priors) == 4


def test_forms_of_one_key() -> None:
    torch = pytest.importorskip("torch")
    expected = ebpo_core.EBPO()
    expected(R, keys=[1, "3", 1])
    for form in (
        [True, "3", (1,)],
        [np.int64(1), np.str_("3"), np.bool_(True)],
        [Level.ONE, Topic.THREE, (Level.ONE,)],
        [1, (Topic.THREE,), Level.ONE],
        [torch.tensor(1), "3", torch.tensor(1)],
        np.array([1, "3", 1], dtype=object),
        ((1,), ("3",), 1),
    ):
        ebpo = ebpo_core.EBPO()
        ebpo(R, keys=form)
        assert ebpo == expected
    assert set(expected.priors) == {(), 1, "3"}
    assert expected.shrunken_prior(Topic.THREE) == expected.shrunken_prior("3")
    for either in (["3", Topic.THREE, None], [Topic.THREE, "3", None]):  # whichever comes first
        ebpo = ebpo_core.EBPO()
        ebpo(R, keys=either)
        assert [(type(key), key) for key in ebpo.priors] == [(tuple, ()), (str, "3")]
    named = ebpo_core.EBPO(normalize=Topic.BATCH, leave_one_out=Topic.GROUP)  # type: ignore[arg-type]
    assert named.options == ebpo_core.EBPO(leave_one_out=True).options
    assert "Topic" not in repr(named)
    for numbers in (np.array([5, 5, 7]), torch.tensor([5, 5, 7]), np.array([5, 5, 7], dtype=np.uint8)):
        ebpo = ebpo_core.EBPO()
        ebpo(R, keys=numbers)
        assert list(ebpo.priors) == [(), 5, 7]


def test_rows_of_a_group_in_any_order() -> None:
    by_group, by_row = ebpo_core.EBPO(), ebpo_core.EBPO()
    expected = np.asarray(by_group(R, keys=KEYS))
    index = np.array([2, 0, 1, 0, 1, 2, 0, 1, 2, 2, 0, 1])
    seen = [0, 0, 0]
    rows = []
    for m in index:
        rows.append((m, seen[m]))
        seen[m] += 1
    flat = np.array([R[m, i] for m, i in rows])
    got = by_row(flat, index, keys=[KEYS[m] for m in index])
    np.testing.assert_allclose(got, [expected[m, i] for m, i in rows], rtol=1e-12)
    np.testing.assert_array_equal(
        ebpo_core.advantages(R, keys=KEYS, sigma2="within"), ebpo_core.EBPO(sigma2="within")(R, keys=KEYS)
    )


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ([1.5, "a", "a"], TypeError, r"keys\[0\] is 1.5, which holds a float.*str\(\)"),
        (["a", ("a", None), "a"], TypeError, r"keys\[1\] is \('a', None\), which holds a NoneType"),
        (["a", "a", ["a", 1]], TypeError, r"keys\[2\] is \['a', 1\].*not hashable: pass.*a tuple"),
        (["a", "a"], ValueError, "keys has length 2, expected 3: pass one per group"),
        ("abc", TypeError, "keys='abc': expected one key per reward"),
        ({"a": 1}, TypeError, "expected one key per reward"),
        (np.array([["a", "b"]] * 3), ValueError, r"keys has shape \(3, 2\).*list of tuples"),
    ],
)
def test_what_is_no_key_is_refused(wrong: Any, error: type[Exception], message: str) -> None:
    ebpo = ebpo_core.EBPO()
    with pytest.raises(error, match=message):
        ebpo(R, keys=wrong)
    assert ebpo == ebpo_core.EBPO()


def test_more_that_is_refused() -> None:
    ebpo = ebpo_core.EBPO()
    with pytest.raises(ValueError, match=r"keys\[2\] is 'b' and keys\[0\] is 'a', but both rows are of one group"):
        ebpo([1.0, 0.0, 1.0], ["p", "q", "p"], keys=["a", "a", "b"])
    with pytest.raises(ValueError, match="keys has length 2, expected 3: pass one per reward"):
        ebpo([1.0, 0.0, 1.0], ["p", "q", "p"], keys=["a", "a"])
    with pytest.raises(ValueError, match=r"keys=.* was passed with method='grpo'"):
        ebpo_core.advantages(R, keys=KEYS, method="grpo")
    with pytest.raises(ValueError, match="kappa=-1.*at least 0"):
        ebpo_core.EBPO(kappa=-1)
    with pytest.raises(ValueError, match="max_keys=-1"):
        ebpo_core.EBPO(max_keys=-1)
    with pytest.raises(TypeError, match="max_keys=1.5"):
        ebpo_core.EBPO(max_keys=1.5)  # type: ignore[arg-type]


def trained() -> ebpo_core.EBPO:
    ebpo = ebpo_core.EBPO(decay=0.9)
    rng = np.random.default_rng(0)
    for step in range(3):
        ebpo(rng.random((4, 3)), keys=[("a", 1), "a", "\ud800 \n é", 2**70], step=step)
    return ebpo


def test_round_trips_are_exact() -> None:
    ebpo = trained()
    other = ebpo_core.EBPO(decay=0.9)
    other.load_state_dict(json.loads(json.dumps(ebpo.state_dict(), allow_nan=False)))
    assert other == ebpo == pickle.loads(pickle.dumps(ebpo))
    assert set(other.priors) == {(), "a", ("a", 1), "\ud800 \n é", 2**70}
    assert other.priors == ebpo.priors
    assert other.prior == other.priors[()]
    np.testing.assert_array_equal(other(R, keys=KEYS), ebpo(R, keys=KEYS))
    assert ebpo != trained()
    assert repr(trained()).endswith(" and 4 keys")
    ebpo.reset()
    assert ebpo == ebpo_core.EBPO(decay=0.9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("keys"), "'keys' is None: expected a list"),
        (lambda s: s["options"].pop("kappa"), "kappa='missing'"),
        (lambda s: s["options"].update(kappa=-1.0), "options that no estimator has.*kappa=-1"),
        (lambda s: s["keys"][0].pop("key"), r"'keys\[0\].key' is None"),
        (lambda s: s["keys"][0].update(key="a"), r"'keys\[0\].key' is 'a': expected a list"),
        (lambda s: s["keys"][0].update(key=[1.5]), r"'keys\[0\].key' is \[1.5\]"),
        (lambda s: s["keys"][0].update(key=[]), "has no parts"),
        (lambda s: s["keys"].append(s["keys"][0]), "twice"),
        (lambda s: s["keys"].append({**s["keys"][0], "key": ["lost", 1]}), "but not its parent"),
        (lambda s: s["keys"][1].pop("ssw"), r"no field 'keys\[1\].ssw'"),
        (lambda s: s["keys"][1].update(dof=-1.0), "dof=-1"),
        (lambda s: s["keys"][1].pop("idle"), r"'keys\[1\].idle' is None: expected a number of updates"),
        (lambda s: s["keys"][1].update(idle=-1), r"'keys\[1\].idle' is -1"),
        (lambda s: s["keys"][1].update(idle=1.0), r"'keys\[1\].idle' is 1.0"),
        (lambda s: s.update(idle_decay=1.5), r"idle_decay=1.5.*\(0, 1\]"),
        (lambda s: s.update(idle_decay=float("nan")), "idle_decay=NaN"),
        (lambda s: s.update(updates=-1), "updates. is -1"),
        (lambda s: (s.update(idle_decay=1.0), s["keys"][1].update(idle=3)), "keys.idle=3.*0 where idle_decay is 1"),
    ],
)
def test_garbage_is_refused_and_nothing_changes(change: Any, message: str) -> None:
    ebpo = trained()
    before = ebpo.state_dict()
    state = json.loads(json.dumps(before))
    change(state)
    with pytest.raises((ValueError, TypeError), match=message):
        ebpo.load_state_dict(state)
    assert ebpo.state_dict() == before
