"""Diagnostics of a call: the same on every path, computed when asked for, and of that call whatever comes after."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ebpo_core
from ebpo_core import Diagnostics
from oracle import options


def fields(ebpo: ebpo_core.EBPO) -> dict[str, Any]:
    assert ebpo.diagnostics is not None
    return dataclasses.asdict(ebpo.diagnostics)


def assert_equal(got: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@given(data=st.data(), chosen=options(), dtype=st.sampled_from([np.float32, np.float64]))
def test_a_plain_matrix_is_scored_as_every_other_batch_is(
    data: st.DataObject, chosen: dict[str, Any], dtype: Any
) -> None:
    """The core has a call for it alone; a mask of ones takes the same rewards through the general one."""
    plain, general = ebpo_core.EBPO(**chosen), ebpo_core.EBPO(**chosen)
    for _ in range(data.draw(st.integers(1, 4))):
        shape = data.draw(st.tuples(st.integers(1, 9), st.sampled_from([1, 2, 3, 4, 8, 16, 17])))
        n = shape[0] * shape[1]
        rewards = st.sampled_from([0.0, 0.0, 1.0, 0.1, -2.5, 7.0])
        kind = data.draw(st.sampled_from([rewards, st.just(data.draw(rewards))]))
        r = np.array(data.draw(st.lists(kind, min_size=n, max_size=n)), dtype=dtype).reshape(shape)
        call = {"update": data.draw(st.booleans()), "step": data.draw(st.sampled_from([None, 1, 2, 3]))}
        got, expected = plain(r, **call), general(r, mask=np.ones(shape, dtype=bool), **call)
        assert got.dtype == dtype
        rounding = 1e-9 if dtype == np.float64 else 1e-6
        np.testing.assert_allclose(got, expected, rtol=rounding, atol=rounding)
        assert plain.step == general.step
        for name, value in fields(general).items():
            if value is not None:
                np.testing.assert_allclose(fields(plain)[name], value, rtol=1e-9, atol=1e-9, err_msg=name)
        for a, b in zip(plain._state.parts()[0], general._state.parts()[0], strict=True):
            assert a == pytest.approx(b, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("normalize", ["batch", "scale", "none"])
def test_float32_rewards_far_from_the_prior_stay_in_range(normalize: Any) -> None:
    """A difference of two float32 numbers may be none: such a batch is left to the general call, which saturates."""
    plain, general = ebpo_core.EBPO(normalize=normalize), ebpo_core.EBPO(normalize=normalize)
    alike = np.array([[3e38, 2e38], [2e38, 3e38]], dtype=np.float32)  # equal means: S is 1
    for r, update in ((alike, True), (-alike, False), (np.ones((2, 2), dtype=np.float32), False)):
        got = plain(r, update=update)
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, general(r, mask=np.ones(r.shape, dtype=bool), update=update), rtol=1e-5)


CALLS: dict[str, Any] = {
    "matrix": lambda ebpo, r: ebpo(r),
    "mask": lambda ebpo, r: ebpo(r, mask=np.ones(r.shape, dtype=bool)),
    "NaN": lambda ebpo, r: ebpo(np.where(r == 0.25, np.nan, r)),
    "ids": lambda ebpo, r: ebpo(r.reshape(-1), np.arange(r.size) % 3),
    "keys": lambda ebpo, r: ebpo(r, keys=["a", "b", "a"]),
    "group": lambda ebpo, r: ebpo.group(r[0], "a"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_diagnostics_are_of_their_call_whatever_comes_after(call: Any) -> None:
    r = np.array([[1.0, 0.0, 0.25, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]], dtype=np.float32)
    ebpo, twin = ebpo_core.EBPO(decay=0.9), ebpo_core.EBPO(decay=0.9)
    for one in (ebpo, twin):
        one(np.array([[0.5, 0.0], [2.0, 1.0]]), keys=["a", "b"])
    call(ebpo, r.copy())
    call(twin, r)
    expected = fields(twin)
    assert expected["count"].size
    r[:] = 100.0  # the caller's array is not what diagnostics are read from
    twin.merge(ebpo_core.Prior())
    other = ebpo_core.EBPO(decay=0.9)
    other(np.full((5, 2), 50.0))
    twin.merge(other)  # and neither is the prior as it is now
    assert_equal(fields(twin), expected)
    kept = twin.diagnostics
    twin(np.zeros((2, 2)))
    assert isinstance(kept, Diagnostics)
    assert_equal(dataclasses.asdict(kept), fields(ebpo))
    assert not np.array_equal(fields(twin)["count"], expected["count"])


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_diagnostics_are_computed_when_asked_for(call: Any) -> None:
    """Nothing that a call computed ahead is handed out: each access makes its arrays anew."""
    ebpo = ebpo_core.EBPO()
    call(ebpo, np.array([[1.0, 0.0, 0.25, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    first, again = ebpo.diagnostics, ebpo.diagnostics
    assert first is not None
    assert again is not None
    for name in ("shrinkage", "baseline", "count"):
        assert not np.shares_memory(getattr(first, name), getattr(again, name))
    first.shrinkage[:] = 7.0
    assert_equal(fields(ebpo), dataclasses.asdict(again))
