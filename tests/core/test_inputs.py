"""Containers, dtypes and ids in; the same container out; bad input refused by name with the prior untouched."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ebpo_core
from ebpo_core import reference
from ebpo_core.inputs import tensor_of

LARGE = [1e300, -1e39, 70000.0, 1.0 + 2.0**-11 + 2.0**-40]

R = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
EXPECTED = reference.algorithm_1(R)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", ">f8", np.longdouble])
def test_float_arrays_keep_their_dtype(dtype: Any) -> None:
    r = np.array(R, dtype=dtype)
    got = ebpo_core.advantages(r)
    assert got.dtype == r.dtype
    assert got.shape == r.shape
    np.testing.assert_array_equal(got.astype("f8"), ebpo_core.advantages(np.array(R)).astype(dtype).astype("f8"))


@pytest.mark.parametrize("dtype", ["i1", "u2", "i4", "i8", "u8", "?"])
def test_ints_and_bools_give_the_default_float(dtype: str) -> None:
    got = ebpo_core.advantages(np.array(R, dtype=dtype))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, EXPECTED, atol=1e-15)


def test_lists_and_tuples_give_lists() -> None:
    got = ebpo_core.advantages(R)
    assert isinstance(got, list)
    assert isinstance(got[0][0], float)
    np.testing.assert_allclose(got, EXPECTED, atol=1e-15)
    flat = ebpo_core.advantages((1, 0, 0, 0), ["a", "a", "b", "b"])
    assert isinstance(flat, list)
    assert len(flat) == 4


def test_strides_order_and_read_only() -> None:
    wide = np.zeros((4, 12))
    wide[::2, ::3] = R
    views = [wide[::2, ::3], np.asfortranarray(R), np.array(R)[:, ::-1][:, ::-1]]
    frozen = np.array(R)
    frozen.flags.writeable = False
    unaligned = np.frombuffer(b"\0" + np.array(R).tobytes(), dtype=np.uint8)[1:].view("f8").reshape(2, 4)
    for view in [*views, frozen, unaligned]:
        np.testing.assert_allclose(ebpo_core.advantages(view), EXPECTED, atol=1e-15)
    np.testing.assert_array_equal(frozen, R)  # the input is never written


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"])
def test_tensors_keep_their_dtype_and_are_rounded_once(name: str) -> None:
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, name)
    r = torch.tensor(R, dtype=torch.float64)
    got = ebpo_core.advantages(r.to(dtype))
    assert got.dtype == dtype
    assert got.shape == r.shape
    wide = ebpo_core.advantages(r)
    # Of the two neighbours in this dtype, the result is the nearer one.
    error = (got.double() - wide).abs()
    assert bool((error <= torch.finfo(dtype).eps / 2 * wide.abs() * (1 + 1e-12)).all())


def test_double_rounding_is_avoided() -> None:
    """A value just above half-way between two bfloat16 numbers; by way of float32 it would round to even, down."""
    torch = pytest.importorskip("torch")
    from ebpo_core.inputs import _round_to_torch

    x = np.array([1 + 2**-8 + 2**-40, -(1 + 2**-8 + 2**-40), 0.0, 1e-42, 1e300])
    got = torch.from_numpy(_round_to_torch(x, torch.bfloat16)).to(torch.bfloat16).double().numpy()
    assert got[0] == 1 + 2**-7
    assert got[1] == -(1 + 2**-7)
    assert got[2] == 0.0
    assert got[3] == pytest.approx(1e-42, rel=0.1)
    assert got[4] == torch.finfo(torch.bfloat16).max
    assert float(torch.tensor(x[0]).to(torch.bfloat16)) == 1.0  # what torch itself does


def test_tensor_details() -> None:
    torch = pytest.importorskip("torch")
    r = torch.tensor(R, requires_grad=True)
    got = ebpo_core.advantages(r)
    assert not got.requires_grad
    assert ebpo_core.advantages(torch.tensor([[1, 0], [0, 0]])).dtype == torch.get_default_dtype()
    assert ebpo_core.advantages(torch.tensor([[True, False]])).dtype == torch.get_default_dtype()
    np.testing.assert_allclose(ebpo_core.advantages(torch.tensor(R).T.contiguous().T).numpy(), EXPECTED, atol=1e-6)
    with pytest.raises(TypeError, match="complex"):
        ebpo_core.advantages(torch.tensor([[1j]]))
    for unreadable in (torch.tensor(R).to_sparse(), torch.empty(2, 4, device="meta")):
        with pytest.raises(TypeError, match="dense tensor with data"):
            ebpo_core.advantages(unreadable)
    with pytest.raises(TypeError, match="float8_e8m0fnu.*no negative"):
        ebpo_core.advantages(torch.ones(2, 2).to(torch.float8_e8m0fnu))
    lazily_negative = torch.complex(torch.zeros(2, 4), torch.tensor(R)).conj().imag
    assert lazily_negative.is_neg()
    np.testing.assert_allclose(ebpo_core.advantages(lazily_negative).numpy(), -EXPECTED, atol=1e-6)
    ids = torch.tensor([5, 5, -1, -1])
    np.testing.assert_allclose(
        ebpo_core.advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), ids).numpy(),
        np.ravel(ebpo_core.advantages([[1.0, 0.0], [0.0, 0.0]])),
        atol=1e-6,
    )


UUIDS = [uuid.uuid5(uuid.NAMESPACE_DNS, str(i)) for i in range(3)]


@pytest.mark.parametrize(
    "ids",
    [
        np.array([7, -3, 10**12]),
        np.array([1, 2, 2**64 - 1], dtype=np.uint64),
        np.array([1, 2, 3], dtype=np.int8),
        np.array(["a", "b", "a-long-one"]),
        np.array([b"a", b"b", b"c"]),
        np.array([str(u) for u in UUIDS], dtype=object),
        np.array(UUIDS, dtype=object),
        [("math", 1), ("math", 2), 3],
        ["ä", "\ud800", "日本"],
        [1.5, "1.5", True],
    ],
    ids=repr,
)
def test_group_ids_of_any_kind(ids: Any) -> None:
    """Nine rows in scrambled order: the ids only say which rows belong together."""
    order = [0, 1, 2, 1, 0, 2, 2, 1, 0]
    r = np.array([1.0, 0, 0, 1, 0, 0, 1, 1, 0.5])
    groups: Any = [ids[i] for i in order] if isinstance(ids, list) else ids[order]
    np.testing.assert_allclose(ebpo_core.advantages(r, groups), reference.EBPO()(r, np.array(order)), atol=1e-14)


def test_tensors_as_single_ids_are_compared_by_value() -> None:
    """`[row["id"] for row in batch]` gives such a list; tensors hash by identity."""
    torch = pytest.importorskip("torch")
    r = [1.0, 0.0, 0.5, 0.0]
    assert ebpo_core.advantages(r, list(torch.tensor([0, 0, 1, 1]))) == ebpo_core.advantages(r, [0, 0, 1, 1])


def test_equal_ids_need_not_be_the_same_object() -> None:
    a, b = "".join(["prompt", "-1"]), "".join(["prompt", "-1"])
    assert a is not b
    got = ebpo_core.advantages([1.0, 0.0, 1.0, 0.0], [a, "x", "x", b])
    np.testing.assert_allclose(got, ebpo_core.advantages([1.0, 0.0, 1.0, 0.0], [0, 1, 1, 0]))


def test_masks() -> None:
    r = np.array([[1.0, 0.0, 99.0], [np.nan, 1.0, 0.0]])
    mask = np.array([[True, True, False], [True, True, True]])
    expected = reference.EBPO()(r, mask=mask)
    for same in (mask, mask.astype(int), mask.astype("f4"), mask.tolist()):
        got = ebpo_core.advantages(r, mask=same)
        np.testing.assert_allclose(got, expected, atol=1e-15)
    assert got[0, 2] == 0.0
    assert got[1, 0] == 0.0


def test_masks_of_other_bytes_and_other_dtypes() -> None:
    torch = pytest.importorskip("torch")
    r = np.array([[1.0, 0.0, 9.0], [0.0, 1.0, 0.0]])
    wanted = np.array([[True, True, False], [True, True, True]])
    odd_bytes = np.array([[2, 3, 0], [255, 1, 1]], dtype=np.uint8).view(bool)  # NumPy calls all of these True
    expected = ebpo_core.advantages(r, mask=wanted)
    np.testing.assert_array_equal(ebpo_core.advantages(r, mask=odd_bytes), expected)
    np.testing.assert_array_equal(ebpo_core.advantages(r, mask=torch.tensor(wanted).bfloat16()), expected)


def test_masked_rows_may_hold_anything() -> None:
    r = np.array([[1.0, 0.0, np.inf], [1e200, 1.0, np.nan]])
    mask = np.array([[True, True, False], [False, True, True]])
    np.testing.assert_allclose(ebpo_core.advantages(r, mask=mask), reference.EBPO()(np.where(mask, r, 0), mask=mask))


@pytest.mark.parametrize("rewards", [[[np.nan, np.nan]], np.full((3, 2), np.nan, dtype="f4")])
def test_nothing_to_score_is_legal(rewards: Any) -> None:
    ebpo = ebpo_core.EBPO()
    assert not np.any(ebpo(rewards))
    assert ebpo.prior == ebpo_core.Prior()


BAD = [
    (dict(rewards=[[1.0, np.inf]]), ValueError, r"rewards\[1\].*inf.*NaN or mask=False"),
    (dict(rewards=np.array([[1.0, -np.inf]], dtype="f4")), ValueError, r"rewards\[1\].*-inf"),
    (dict(rewards=[[1.0, 1e141]]), ValueError, r"rewards\[1\].*1e140"),
    (dict(rewards=[[1.0, np.longdouble("1e400")]]), ValueError, r"rewards\[1\]"),
    (dict(rewards=[[1.0, 1j]]), TypeError, "complex"),
    (dict(rewards=[[1.0, None]]), TypeError, "object.*NaN, not None"),
    (dict(rewards=[["1"]]), TypeError, "dtype"),
    (dict(rewards=[[1.0], [1.0, 2.0]]), ValueError, "not rectangular.*groups="),
    (dict(rewards=[]), ValueError, r"\(0,\).*groups"),
    (dict(rewards=np.zeros((0, 4))), ValueError, "holds no reward"),
    (dict(rewards=np.zeros((4, 0))), ValueError, "holds no reward"),
    (dict(rewards=1.0), ValueError, r"\(M, G\)"),
    (dict(rewards=np.zeros((2, 2, 2))), ValueError, r"\(2, 2, 2\)"),
    (dict(rewards=[1.0, 0.0]), ValueError, "groups is None"),
    (dict(rewards=[[1.0, 0.0]], groups=[0, 0]), ValueError, "rows of a 2-D array are groups already"),
    (dict(rewards=[1.0, 0.0], groups=[0]), ValueError, r"groups has shape \(1,\)"),
    (dict(rewards=[1.0, 0.0], groups=[[0, 0]]), ValueError, "groups has shape"),
    (dict(rewards=[1.0, 0.0], groups=[0, None]), ValueError, r"groups\[1\] is None"),
    (dict(rewards=[1.0, 0.0], groups=np.array([0.0, np.nan])), ValueError, r"groups\[1\] is nan"),
    (dict(rewards=[1.0, 0.0], groups=[0, np.float32("nan")]), ValueError, r"groups\[1\] is nan"),
    (dict(rewards=[1.0, 0.0], groups=[0, pd.NA]), ValueError, r"groups\[1\] is <NA>"),
    (dict(rewards=[1.0, 0.0], groups=[pd.NaT, 0]), ValueError, r"groups\[0\] is NaT"),
    (dict(rewards=[[1.0, 0.0]], mask=[[True], [True, True]]), ValueError, "mask is not rectangular"),
    (dict(rewards=[1.0, 0.0], groups=[[0], [1]]), TypeError, r"groups\[0\].*list.*not hashable"),
    (dict(rewards=[[1.0, 0.0]], mask=[True, True]), ValueError, r"mask has shape \(2,\)"),
    (dict(rewards=[[1.0, 0.0]], mask=[[2, 1]]), TypeError, "mask has dtype int"),
    (dict(rewards=np.ma.masked_invalid([[1.0, np.nan]])), TypeError, "masked array.*mask=~"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input_is_named_and_the_prior_untouched(call: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        ebpo_core.advantages(**call)
    with pytest.raises(error, match=message):
        ebpo_core.advantages(**call, method="grpo")
    ebpo, prior = ebpo_core.EBPO(), ebpo_core.Prior()
    ebpo(R, step=1)
    prior.update(R)
    before = ebpo.state_dict(), prior.state_dict(), ebpo.diagnostics
    with pytest.raises(error, match=message):
        ebpo(**call, step=2)
    with pytest.raises(error, match=message):
        prior.update(**call)
    assert (ebpo.state_dict(), prior.state_dict()) == before[:2]
    assert ebpo.diagnostics is not None
    assert before[2] is not None
    assert np.array_equal(ebpo.diagnostics.shrinkage, before[2].shrinkage)


BAD_OPTIONS = [
    (dict(normalize="std"), ValueError, 'normalize="std".*"batch", "scale" or "none"'),
    (dict(sigma2="pooled"), ValueError, 'sigma2="pooled"'),
    (dict(tau2=1.0), TypeError, "tau2=1.0.*string"),
    (dict(score="now"), ValueError, 'score="now"'),
    (dict(leave_one_out=1), TypeError, "leave_one_out=1"),
    (dict(leave_one_out="rows"), ValueError, 'leave_one_out="rows".*"row"'),
    (dict(leave_one_out="row"), ValueError, 'leave_one_out="row".*normalize="none"'),
    (dict(leave_one_out="row", normalize="scale"), ValueError, 'leave_one_out="row".*normalize="none"'),
    (dict(leave_one_out=True, score="before"), ValueError, 'leave_one_out=True.*score="before"'),
    (dict(decay=0.0), ValueError, r"decay=0.*\(0, 1\]"),
    (dict(decay=1.5), ValueError, "decay=1.5"),
    (dict(decay=float("nan")), ValueError, "decay=NaN"),
    (dict(eps=-1.0), ValueError, "eps=-1"),
    (dict(eps=float("inf")), ValueError, "eps=inf"),
    (dict(eps="1"), TypeError, "eps='1'"),
    (dict(eps=10**400), ValueError, "eps=1000"),
    (dict(decay=True), TypeError, "decay=True"),
    (dict(ddof=np.array([0, 1])), ValueError, "ddof=array"),
    (dict(ddof=2), ValueError, "ddof=2"),
    (dict(norm_ddof=True), ValueError, "norm_ddof=True"),
    (dict(beta=1), TypeError, "beta"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS, ids=[m for _, _, m in BAD_OPTIONS])
def test_bad_options_are_named(options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        ebpo_core.EBPO(**options)
    with pytest.raises(error, match=message):
        ebpo_core.advantages(R, **options)


def test_methods_refuse_what_they_do_not_take() -> None:
    with pytest.raises(ValueError, match='method="magic".*"ebpo"'):
        ebpo_core.advantages(R, method="magic", tau2="raw")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tau2='raw'.*grpo.*only eps"):
        ebpo_core.advantages(R, method="grpo", tau2="raw")
    with pytest.raises(ValueError, match="eps=1.0.*rloo.*no options"):
        ebpo_core.advantages(R, method="rloo", eps=1.0)
    with pytest.raises(ValueError, match="eps=-1"):
        ebpo_core.advantages(R, method="grpo", eps=-1)


def test_narrow_dtypes_saturate_instead_of_overflowing() -> None:
    top16, top32 = float(np.finfo("f2").max), float(np.finfo("f4").max)
    for top, dtype in ((top16, "f2"), (top32, "f4"), (top32, ">f4")):
        r = np.array([[top, top, top, -top]], dtype=dtype)
        for got in (
            ebpo_core.advantages(r, normalize="none"),
            ebpo_core.advantages(r, method="rloo"),
            ebpo_core.advantages(r),
        ):
            assert np.isfinite(got).all()
        assert ebpo_core.advantages(r, method="rloo")[0, 3] == -top
        assert ebpo_core.advantages(r)[0, 3] < -1.0


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=12))
def test_any_floats_give_finite_advantages_or_an_error(values: list[float]) -> None:
    valid = [v for v in values if not np.isnan(v)]
    if all(abs(v) <= 1e140 for v in valid):
        assert np.isfinite(ebpo_core.advantages([values])).all()
    else:
        with pytest.raises(ValueError, match="1e140"):
            ebpo_core.advantages([values])


@pytest.mark.parametrize("normalize", ["batch", "scale", "none"])
def test_a_matrix_gives_the_same_bits_in_any_container(normalize: Any) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for rewards in [rng.random((int(rng.integers(1, 40)), int(rng.integers(1, 20)))) for _ in range(50)]:
        expected = ebpo_core.EBPO(normalize=normalize)
        expected(rewards)
        for form in (rewards.tolist(), torch.tensor(rewards), np.asfortranarray(rewards), rewards.astype(">f8")):
            ebpo = ebpo_core.EBPO(normalize=normalize)
            got = ebpo(form)
            assert ebpo == expected
            np.testing.assert_array_equal(got, ebpo_core.EBPO(normalize=normalize)(rewards))
            np.testing.assert_array_equal(ebpo_core.advantages(form), ebpo_core.advantages(rewards))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float64", LARGE),
        ("float32", [3.4028234663852886e38, -3.4028234663852886e38, 70000.0, 1.0 + 2.0**-11]),
        ("float16", [65504.0, -65504.0, 65504.0, 1.0 + 2.0**-10]),  # by way of float32 the last would be 1
    ],
)
def test_a_tensor_of_advantages_saturates_and_is_rounded_once(dtype: str, expected: list[float]) -> None:
    torch = pytest.importorskip("torch")
    got = tensor_of(np.array(LARGE), getattr(torch, dtype))
    assert str(got.dtype) == f"torch.{dtype}"
    assert got.tolist() == expected
