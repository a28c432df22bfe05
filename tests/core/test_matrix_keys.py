"""A plain matrix with keys, which the core takes in one call: against the twin, and as any other input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ebpo_core
from ebpo_core import reference
from oracle import Case, assert_same_state, options, raw_spread, tolerance


def copied(name: str) -> str:
    """An equal string that is another object."""
    return "".join(list(name))


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[Case, list[str]]]:
    """Matrices with a string for each row: one for all, one of its own for each, or a few; some seen before."""
    made = []
    for batch in range(draw(st.integers(1, 4))):
        rows, size = draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 3, 4, 8, 16, 17]))
        value = draw(st.sampled_from([st.sampled_from([0.0, 1.0]), st.floats(-10, 10, width=32), st.just(0.1)]))
        rewards = np.array(draw(st.lists(value, min_size=rows * size, max_size=rows * size)))
        if draw(st.integers(0, 4)) == 0:
            rewards[draw(st.integers(0, rewards.size - 1))] = np.nan
        kind = draw(st.sampled_from(["one", "distinct", "few"]))
        few = st.sampled_from(["a", "b", "ä", "\ud800", ""])
        names = {
            "one": ["a"] * rows,
            "distinct": [f"{batch if draw(st.booleans()) else 0}-{row}" for row in range(rows)],
            "few": [draw(few) for _ in range(rows)],
        }[kind]
        made.append(
            (Case(rewards.reshape(rows, size)), [copied(name) if draw(st.booleans()) else name for name in names])
        )
    return made


@settings(max_examples=300)
@given(opts=options(), made=batches(), data=st.data())
def test_sequences_equal_the_twin_and_the_general_way(
    opts: dict[str, Any], made: list[tuple[Case, list[str]]], data: st.DataObject
) -> None:
    ours, general, twin = ebpo_core.EBPO(**opts), ebpo_core.EBPO(**opts), reference.EBPO(**opts)
    seen: list[np.ndarray] = []
    for i, (case, keys) in enumerate(made):
        call: dict[str, Any] = {
            "update": data.draw(st.booleans(), label="update"),
            "step": data.draw(st.sampled_from([None, i, 0]), label="step"),
        }
        spread = raw_spread(twin, case, keys=keys, **call)
        expected = twin(*case.args, keys=keys, **call)
        got = ours(case.rewards, keys=keys, **call)
        everything = np.ones(case.rewards.shape, dtype=bool)
        seen.append(case.counted)
        bound = tolerance(expected, seen, spread)
        np.testing.assert_allclose(got, expected, rtol=0, atol=bound)
        np.testing.assert_allclose(
            general(case.rewards, mask=everything, keys=keys, **call), got, rtol=0, atol=2 * bound
        )
        assert_same_state(ours.state_dict(), twin, seen)
        mine, other = ours.diagnostics, general.diagnostics
        assert mine is not None
        assert other is not None
        assert mine.keys == other.keys
        for name in ("shrinkage", "baseline", "count"):
            np.testing.assert_allclose(getattr(mine, name), getattr(other, name), rtol=1e-9, atol=1e-9)
        assert mine.blended is not None
        assert other.blended is not None
        np.testing.assert_allclose(mine.blended, other.blended, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_many_rows_in_every_size(dtype: Any) -> None:
    rng = np.random.default_rng(5)
    for size in (1, 3, 4, 16, 40):
        ours, twin = ebpo_core.EBPO(decay=0.9), reference.EBPO(decay=0.9)
        for _ in range(2):
            rewards = (rng.random((1500, size)) < 0.3).astype(dtype)
            keys = [f"topic {topic}" for topic in rng.integers(40, size=1500)]
            expected = twin(rewards.astype(np.float64), None, keys=keys)
            got = ours(rewards, keys=keys)
            assert got.dtype == dtype
            np.testing.assert_allclose(got, expected, atol=1e-5 if dtype is np.float32 else 1e-11)
            assert ours.diagnostics is not None
            assert ours.diagnostics.keys == tuple(keys)


def test_what_a_call_kept_is_its_own() -> None:
    ebpo, rewards, keys = ebpo_core.EBPO(), np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]), ["a", "b", "a"]
    ebpo(rewards[::-1].copy(), keys=keys)
    ebpo(rewards, keys=keys)
    first = ebpo.diagnostics
    assert first is not None
    rewards[:], keys[0] = 7.0, "changed"
    again = ebpo.diagnostics
    assert again is not None
    assert again.keys == ("a", "b", "a")
    assert again.outlier == pytest.approx(1.0)
    np.testing.assert_array_equal(again.baseline, first.baseline)


def test_a_list_that_changes_while_it_is_read_is_read_as_it_was() -> None:
    """A key's hash may run any code."""
    keys: list[Any] = ["a", "b", "c"]

    class Key(str):
        def __hash__(self) -> int:
            keys.clear()
            return super().__hash__()

    keys[0] = Key("a")
    ebpo = ebpo_core.EBPO()
    try:
        ebpo(np.eye(3), keys=keys)
    except (TypeError, ValueError):
        assert ebpo == ebpo_core.EBPO()  # the general way, which a subclass of str takes, reads the list again
    else:
        assert set(ebpo.priors) == {(), "a", "b", "c"}


@pytest.mark.parametrize("number", [0, 1, 2, 4])
def test_another_number_of_keys_is_refused(number: int) -> None:
    ebpo = ebpo_core.EBPO()
    with pytest.raises(ValueError, match=f"keys has length {number}, expected 3"):
        ebpo(np.eye(3), keys=["a"] * number)
    assert ebpo == ebpo_core.EBPO()


def test_no_rows_are_refused() -> None:
    ebpo = ebpo_core.EBPO()
    for shape in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match=r"holds no reward"):
            ebpo(np.zeros(shape), keys=["a"] * shape[0])
    assert ebpo == ebpo_core.EBPO()


def test_failures_change_nothing() -> None:
    ebpo = ebpo_core.EBPO(max_keys=2, decay=0.5)
    ebpo(np.eye(2), keys=["a", "b"], step=1)
    kept, before = ebpo.state_dict(), ebpo.before_update()
    with pytest.raises(ValueError, match=r"keys would make 3 priors.*max_keys=2"):
        ebpo(np.eye(2), keys=["a", "c"], step=2)
    with pytest.raises(ValueError, match="reward"):
        ebpo(np.array([[0.0, np.inf], [0.0, 1.0]]), keys=["a", "b"], step=2)
    with pytest.raises(TypeError, match=r"keys\[1\] is 1.5"):
        ebpo(np.eye(2), keys=["a", 1.5], step=2)
    assert ebpo.state_dict() == kept
    assert ebpo.before_update() == before
    ebpo(np.eye(2), keys=["a", "c"], update=False)
    assert ebpo.state_dict() == kept


def test_one_matrix_in_any_container_gives_the_same_bits() -> None:
    rng = np.random.default_rng(6)
    rewards, keys = rng.random((50, 5)), [f"topic {topic}" for topic in rng.integers(6, size=50)]
    one, listed, typed, split = (ebpo_core.EBPO() for _ in range(4))
    for _ in range(2):
        expected = one(rewards, keys=keys)
        np.testing.assert_array_equal(np.array(listed(rewards.tolist(), keys=keys)), expected)
        np.testing.assert_array_equal(typed(rewards, keys=np.array(keys)), expected)
        np.testing.assert_array_equal(split(rewards, keys=[(key,) for key in keys]), expected)
    assert one == listed == typed == split
