"""Every path of the core against the NumPy twin, over shapes, dtypes, masks, scales, options and sequences of calls."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import ebpo_core
from ebpo_core import reference
from oracle import Case, assert_same_state, cases, options, raw_spread, tolerance


def as_array(case: Case) -> dict[str, Any]:
    return {"rewards": case.rewards, "groups": case.groups, "mask": case.mask}


def as_list(case: Case) -> dict[str, Any]:
    groups = None if case.groups is None else [f"prompt-{g}" for g in case.groups]
    mask = None if case.mask is None else case.mask.tolist()
    return {"rewards": case.rewards.tolist(), "groups": groups, "mask": mask}


def as_strided(case: Case) -> dict[str, Any]:
    wide = np.zeros((*case.rewards.shape, 3))
    wide[..., 1] = case.rewards
    swapped = wide.astype(wide.dtype.newbyteorder())[..., 1]
    return {"rewards": swapped, "groups": case.groups, "mask": case.mask}


def as_tensor(case: Case) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    tensors = {"rewards": torch.from_numpy(case.rewards), "groups": None, "mask": None}
    if case.groups is not None:
        tensors["groups"] = torch.from_numpy(case.groups)
    if case.mask is not None:
        tensors["mask"] = torch.from_numpy(case.mask)
    return tensors


CONTAINERS = {"array": as_array, "list": as_list, "strided": as_strided, "tensor": as_tensor}


@pytest.mark.parametrize("container", CONTAINERS)
@settings(max_examples=150)
@given(case=cases(), opts=options())
def test_one_call_equals_the_twin(container: str, case: Case, opts: dict[str, Any]) -> None:
    twin = reference.EBPO(**opts)
    spread = raw_spread(twin, case)
    expected = twin(*case.args, mask=case.mask)
    got = np.asarray(ebpo_core.advantages(**CONTAINERS[container](case), **opts))
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance(expected, [case.counted], spread))
    assert np.isfinite(got).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@settings(max_examples=100)
@given(case=cases(scale=1.0, offset=0.0), opts=options())
def test_narrow_dtypes_are_the_twin_rounded_once(dtype: Any, case: Case, opts: dict[str, Any]) -> None:
    """The twin sees the same narrow rewards in float64; the result is the nearest narrow value, or the next."""
    narrow = Case(case.rewards.astype(dtype), case.groups, case.mask)
    wide = Case(narrow.rewards.astype(np.float64), case.groups, case.mask)
    twin = reference.EBPO(**opts)
    spread = raw_spread(twin, wide)
    expected = twin(*wide.args, mask=case.mask)
    got = ebpo_core.advantages(narrow.rewards, case.groups, mask=case.mask, **opts)
    assert got.dtype == dtype
    bound = tolerance(expected, [wide.counted], spread) + np.spacing(np.abs(expected).astype(dtype)).astype(np.float64)
    assert (np.abs(got.astype(np.float64) - expected) <= bound).all()


@settings(max_examples=300)
@given(case=cases())
def test_default_options_meet_the_documented_tolerance(case: Case) -> None:
    """1e-12 * max(1, largest magnitude / std(r)), relative to the largest advantage."""
    counted = case.counted
    assume(counted.size and counted.std() > 0)
    expected = reference.EBPO()(*case.args, mask=case.mask)
    bound = 1e-12 * max(1.0, float(np.abs(counted).max() / counted.std()))
    got = ebpo_core.advantages(case.rewards, case.groups, mask=case.mask)
    np.testing.assert_allclose(got, expected, rtol=0, atol=bound * max(1.0, float(np.abs(expected).max())))


@settings(max_examples=200)
@given(
    opts=options(),
    # No offset of 1e8 here: a prior that has only seen rewards of 1e8 +- 1 knows its own variances to 1e-8 at best.
    batches=st.lists(st.tuples(cases(scale=1.0, offset=0.0), st.booleans(), st.booleans()), min_size=1, max_size=5),
    data=st.data(),
)
def test_sequences_equal_the_twin(opts: dict[str, Any], batches: list[Any], data: st.DataObject) -> None:
    """Updates, frozen calls, replayed steps, a pickle or a merge in the middle: the state follows the twin's."""
    ours, twin = ebpo_core.EBPO(**opts), reference.EBPO(**opts)
    seen: list[np.ndarray] = []
    for i, (case, update, interrupt) in enumerate(batches):
        step = data.draw(st.sampled_from([None, i, i - 1 if i else 0]), label="step")
        spread = raw_spread(twin, case, update=update, step=step)
        expected = twin(*case.args, mask=case.mask, update=update, step=step)
        got = ours(case.rewards, case.groups, mask=case.mask, update=update, step=step)
        seen.append(case.counted)
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance(expected, seen, spread))
        if interrupt:
            ours = pickle.loads(pickle.dumps(ours))
            other, twin_other = ebpo_core.EBPO(**opts), reference.EBPO(**opts)
            other(case.rewards, case.groups, mask=case.mask)
            twin_other(*case.args, mask=case.mask)
            ours.merge(other)
            twin.prior = twin.prior.merge(twin_other.prior)
        assert_same_state(ours.state_dict(), twin, seen)


@settings(max_examples=200)
@given(
    case=cases(),
    method=st.sampled_from(["grpo", "dr_grpo", "rloo", "reinforce_pp", "james_stein", "constant", "batch_mean"]),
)
def test_the_other_methods_equal_the_twin(case: Case, method: Any) -> None:
    expected = reference.baseline_advantages(method, case.rewards, case.groups, mask=case.mask)
    got = ebpo_core.advantages(case.rewards, case.groups, mask=case.mask, method=method)
    spread = float(case.counted.std()) if case.counted.size else 0.0
    if method == "grpo":  # each group is divided by its own std
        r, index, valid = reference.arrange(case.rewards, case.groups, case.mask)
        groups = [r[valid & (index == m)] for m in range(index.max() + 1)]
        spread = min((float(g.std()) for g in groups if g.size > 1 and g.std() > 0), default=0.0)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance(expected, [case.counted], spread))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("groups", "size"), [(1, 1), (3, 2), (513, 4), (700, 7), (1024, 8), (5000, 16), (1025, 32), (9, 1000)]
)
def test_the_fast_path_equals_the_general_one(groups: int, size: int, dtype: Any) -> None:
    """Equal groups without a mask take kernels of their own; an explicit mask of all True takes the general ones."""
    rng = np.random.default_rng(groups * size)
    for rewards in (rng.normal(3, 2, (groups, size)), rng.random((groups, size)) < 0.3):
        r = rewards.astype(dtype)
        fast = ebpo_core.advantages(r)
        general = ebpo_core.advantages(r, mask=np.ones(r.shape, dtype=bool))
        coded = ebpo_core.advantages(r.reshape(-1), np.repeat(np.arange(groups), size)).reshape(r.shape)
        stateful = ebpo_core.EBPO()(r)
        assert fast.dtype == dtype
        rounding = 1e-12 if dtype == np.float64 else 2e-6
        for other in (general, coded, stateful, reference.algorithm_1(r)):
            np.testing.assert_allclose(fast, other, rtol=0, atol=rounding * np.abs(fast).max())


def test_large_batches_equal_the_twin_and_repeat_exactly() -> None:
    """Large enough for several threads; that their number changes no bit is tested in Rust, where it can be set."""
    rng = np.random.default_rng(0)
    r = rng.random((1 << 18, 8)).astype(np.float32)
    np.testing.assert_allclose(ebpo_core.advantages(r), reference.algorithm_1(r), rtol=0, atol=2e-6)
    assert np.array_equal(ebpo_core.advantages(r), ebpo_core.advantages(r.copy()))


@given(case=cases(scale=1.0), data=st.data())
def test_row_order_does_not_matter(case: Case, data: st.DataObject) -> None:
    index = np.repeat(np.arange(len(case.rewards)), case.rewards.shape[1]) if case.groups is None else case.groups
    r = case.rewards.reshape(-1)
    mask = None if case.mask is None else case.mask.reshape(-1)
    p = np.array(data.draw(st.permutations(range(r.size))))
    straight = ebpo_core.advantages(r, index, mask=mask)
    shuffled = ebpo_core.advantages(r[p], index[p], mask=None if mask is None else mask[p])
    spread = raw_spread(reference.EBPO(), Case(r, index, mask))
    np.testing.assert_allclose(shuffled, straight[p], rtol=0, atol=tolerance(straight, [case.counted], spread))


@given(history=st.lists(st.floats(-10, 10), min_size=1, max_size=6), value=st.floats(-10, 10), groups=st.integers(2, 9))
def test_equal_groups_without_themselves_get_exactly_nothing(history: list[float], value: float, groups: int) -> None:
    """By algebra every baseline is the same; rounding must not show through the division by a spread of nothing."""
    ebpo = ebpo_core.EBPO(leave_one_out=True)
    ebpo([[reward, reward + 1.0] for reward in history])
    assert np.all(np.asarray(ebpo([[value]] * groups)) == 0.0)
