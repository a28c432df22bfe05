"""One group at a time: against the twin, by hand, and while the prior knows nothing or one value alone."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ebpo_core
from ebpo_core import reference
from oracle import Case, assert_same_state, options, tolerance, values

KINDS = st.sampled_from([None, "a", ("a", 1), ("b", 2, 3)])


@st.composite
def groups(draw: st.DrawFn) -> Case:
    n = draw(st.integers(1, 9))
    kind = draw(st.sampled_from([st.sampled_from([0.0, 1.0]), values, st.just(draw(values)), st.just(float("nan"))]))
    rewards = np.array(draw(st.lists(kind, min_size=n, max_size=n)))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n).map(np.array))
    return Case(rewards, None, mask)


@settings(max_examples=300)
@given(
    opts=options(), stream=st.lists(st.tuples(groups(), KINDS, st.booleans()), min_size=1, max_size=8), data=st.data()
)
def test_sequences_equal_the_twin(opts: dict[str, Any], stream: list[Any], data: st.DataObject) -> None:
    """Groups one by one, now and then a batch between them, a frozen call, a replay, a pickle."""
    ours, twin = ebpo_core.EBPO(**opts), reference.EBPO(**opts)
    seen: list[np.ndarray] = []
    for i, (case, key, update) in enumerate(stream):
        step = data.draw(st.sampled_from([None, i, i - 1 if i else 0]), label="step")
        raw = reference.EBPO(**opts | {"normalize": "none"}, prior=twin.prior, keys=twin.keys).group(
            case.rewards, key, mask=case.mask, update=False
        )
        spread = float(np.sqrt((raw**2).mean()))
        expected = twin.group(case.rewards, key, mask=case.mask, update=update, step=step)
        got = ours.group(case.rewards, key, mask=case.mask, update=update, step=step)
        seen.append(case.counted)
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance(expected, seen, spread))
        assert np.isfinite(got).all()
        if data.draw(st.booleans(), label="batch between"):
            batch = np.array([[0.0, 1.0, 0.5], [1.0, 1.0, 1.0]])
            twin(batch, keys=["a", key])
            ours(batch, keys=["a", key])
            seen.append(batch.reshape(-1))
            ours = pickle.loads(pickle.dumps(ours))
        assert_same_state(ours.state_dict(), twin, seen)


def test_by_hand() -> None:
    ebpo = ebpo_core.EBPO()
    first = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    ebpo(first)
    mu, sigma2, tau2 = first.mean(), first.var(), first.mean(1).var()
    S = (sigma2 / 3) / (sigma2 / 3 + tau2)
    r = np.array([0.0, 0.0, 0.0])
    np.testing.assert_allclose(ebpo.group(r), (r - S * mu) / (np.sqrt(sigma2) + 1e-6), rtol=1e-13)  # failed: negative
    assert ebpo.prior.count == 11  # and only now is it in the prior
    diagnostics = ebpo.diagnostics
    assert diagnostics is not None
    assert diagnostics.mu_glob == mu
    assert diagnostics.shrinkage == pytest.approx([S])
    assert diagnostics.prior_sigma2 == pytest.approx([sigma2])
    assert diagnostics.keys == ((),)


def test_a_key_is_read_and_updated() -> None:
    ebpo = ebpo_core.EBPO(kappa=0.0)
    ebpo([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0]], keys=["hard", "hard", "easy", "easy"])
    hard, easy = ebpo.group([0.0, 0.0], "hard", update=False), ebpo.group([0.0, 0.0], ("easy",), update=False)
    assert easy[0] < hard[0] < 0
    ebpo.group([0.0, 0.0], ("easy", "new"))
    assert ebpo.priors["easy"].group_count == 3
    assert ebpo.priors["easy", "new"].group_count == 1


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("norm_ddof", [0, 1])
def test_an_empty_prior_and_one_of_a_single_value_use_the_groups_own_spread(eps: float, norm_ddof: int) -> None:
    r = np.array([0.0, 1.0, 1.0, 1.0])
    expected = (r - 0.75) / (r.std(ddof=norm_ddof) + eps)
    for before in ([], [[0.0, 0.0]], [[0.0, 0.0], [0.0]]):
        ebpo = ebpo_core.EBPO(eps=eps, norm_ddof=norm_ddof)
        for group in before:
            assert ebpo.group(group) == [0.0] * len(group)  # equal rewards, and nothing to compare them with
        np.testing.assert_allclose(ebpo.group(r), expected, rtol=1e-13)
    within = ebpo_core.EBPO(sigma2="within", eps=eps, norm_ddof=norm_ddof)
    within([[0.0, 0.0], [1.0, 1.0]])  # no variance within, some between
    np.testing.assert_allclose(within.group(r), expected, rtol=1e-13)
    assert ebpo_core.EBPO(eps=0.0).group([3.0]) == [0.0]


def test_once_the_prior_has_a_spread_no_group_is_silent() -> None:
    ebpo = ebpo_core.EBPO()
    ebpo.group([0.0, 1.0])
    assert all(a < 0 for a in ebpo.group([0.0, 0.0]))
    assert all(a > 0 for a in ebpo.group([1.0, 1.0]))


def test_normalize_and_the_options_that_make_no_difference() -> None:
    start, r = [[1.0, 0.0], [0.0, 0.0]], [1.0, 0.0]
    results = []
    for chosen in ({}, {"normalize": "scale"}, {"score": "before"}, {"leave_one_out": True}):
        ebpo = ebpo_core.EBPO(**chosen)  # type: ignore[arg-type]
        ebpo(start)
        results.append(ebpo.group(r))
    assert all(result == results[0] for result in results)
    raw = ebpo_core.EBPO(normalize="none")
    raw(start)
    np.testing.assert_allclose(raw.group(r), np.array(results[0]) * (np.std(start) + 1e-6), rtol=1e-13)


def test_containers_masks_and_steps() -> None:
    torch = pytest.importorskip("torch")
    ebpo = ebpo_core.EBPO()
    ebpo([[1.0, 0.0], [0.0, 0.0]])
    expected = ebpo.group([1.0, 0.0, 1.0], update=False)
    for form in (np.array([1.0, 0.0, 1.0], dtype=np.float32), torch.tensor([1.0, 0.0, 1.0], dtype=torch.bfloat16)):
        got = ebpo.group(form, update=False)
        assert type(got) is type(form)
        assert got.dtype == form.dtype
        np.testing.assert_allclose([float(x) for x in got], expected, rtol=1e-2)
    masked = ebpo.group([1.0, 5.0, 0.0, 1.0], mask=[True, False, True, True], update=False)
    assert masked == [expected[0], 0.0, expected[1], expected[2]]
    assert ebpo.group([float("nan"), float("nan")]) == [0.0, 0.0]
    assert ebpo.prior.count == 4
    ebpo.group([1.0, 0.0], step=3)
    ebpo.group([1.0, 0.0], step=3)
    assert ebpo.prior.count == 6
    assert ebpo.step == 3


def test_decay_counts_groups() -> None:
    ebpo = ebpo_core.EBPO(decay=0.5)
    for _ in range(3):
        ebpo.group([1.0, 0.0], "a")
    ebpo.group([1.0, 0.0])
    assert ebpo.prior.group_count == 1 + 0.5 + 0.25 + 0.125
    assert ebpo.priors["a"].group_count == 0.5 + 0.25 + 0.125


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda e: e.group([[1.0, 0.0]]), ValueError, r"rewards has shape \(1, 2\): expected the rewards of one group"),
        (lambda e: e.group([]), ValueError, "holds no reward"),
        (lambda e: e.group([1.0, np.inf]), ValueError, r"rewards\[1\].*inf"),
        (lambda e: e.group([1.0, 0.0], mask=[True]), ValueError, "mask has shape"),
        (lambda e: e.group([1.0, 0.0], 0.5), TypeError, "key is 0.5, which holds a float"),
        (lambda e: e.group([1.0, 0.0], ["a"]), TypeError, r"key is \['a'\]"),
        (lambda e: e.group([1.0, 0.0], update=1), TypeError, "update=1"),
    ],
)
def test_errors_leave_the_prior_alone(call: Any, error: type[Exception], message: str) -> None:
    ebpo = ebpo_core.EBPO()
    ebpo.group([1.0, 0.0], "a")
    before = ebpo.state_dict()
    with pytest.raises(error, match=message):
        call(ebpo)
    assert ebpo.state_dict() == before
