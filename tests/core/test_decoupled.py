"""Several rewards of each completion with a scale each: against the twin, NaN in one of them, uneven groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ebpo_core
from ebpo_core.reference import decoupled_advantages

METHODS = ("ebpo", "grpo", "dr_grpo", "rloo", "reinforce_pp", "james_stein", "constant", "batch_mean", "maxrl", "gdpo")


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    """Rewards of up to three kinds on scales far apart, with holes in each, in equal or uneven groups."""
    kinds = draw(st.integers(1, 3))
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    equal = draw(st.booleans())
    rows = len(sizes) * sizes[0] if equal else sum(sizes)
    scales = np.array([1.0, 1e-6, 1e6])[:kinds]
    value = st.one_of(st.sampled_from([0.0, 1.0, 0.25]), st.just(np.nan))
    rewards = (
        np.array(draw(st.lists(value, min_size=rows * kinds, max_size=rows * kinds))).reshape(rows, kinds) * scales
    )
    batch: dict[str, Any] = {
        "weights": draw(st.lists(st.sampled_from([1.0, -0.5, 0.0, 3.0]), min_size=kinds, max_size=kinds))
    }
    mask = np.array(draw(st.lists(st.booleans(), min_size=rows, max_size=rows))) if draw(st.booleans()) else None
    if equal:
        shape = (len(sizes), sizes[0])
        batch |= {"rewards": rewards.reshape(*shape, kinds), "mask": None if mask is None else mask.reshape(shape)}
    else:
        groups = np.array(draw(st.permutations(np.repeat(np.arange(len(sizes)), sizes).tolist())))
        batch |= {"rewards": rewards, "groups": groups, "mask": mask}
    return batch


@given(batch=batches(), method=st.sampled_from(METHODS), eps=st.sampled_from([1e-6, 1e-2]))
def test_the_twin(batch: dict[str, Any], method: str, eps: float) -> None:
    takes_eps = method in ("ebpo", "grpo", "reinforce_pp", "maxrl", "gdpo")
    batch |= {"eps": eps} if takes_eps else {}
    got = ebpo_core.advantages(**batch, method=method)
    expected = decoupled_advantages(method, **batch)
    largest = np.abs(expected).max(initial=1.0)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-10 * largest)
    counted = ~np.isnan(batch["rewards"]).all(axis=-1) & (True if batch["mask"] is None else batch["mask"])
    assert not np.any(np.asarray(got)[~counted])


def test_by_hand() -> None:
    """Two rewards, the second a thousand times the first and missing in the second group: neither drowns the other."""
    rewards = np.array([[1.0, 0.0], [0.0, 1000.0], [1.0, np.nan], [0.0, np.nan], [0.0, np.nan]])
    groups = ["a", "a", "b", "b", "b"]
    pair = 0.5 / np.sqrt(0.5)  # (r - mu) / s of one right and one wrong
    first = np.array([pair, -pair, 2 / 3 / np.sqrt(1 / 3), -1 / 3 / np.sqrt(1 / 3), -1 / 3 / np.sqrt(1 / 3)])
    total = 2 * first + [-pair, pair, 0, 0, 0]
    got = ebpo_core.advantages(rewards, groups, method="grpo", weights=[2, 1], eps=0.0)
    np.testing.assert_allclose(got, total, rtol=1e-12)
    got = ebpo_core.advantages(rewards, groups, method="gdpo", weights=[2, 1], eps=0.0)
    np.testing.assert_allclose(got, (total - total.mean()) / total.std(ddof=1), rtol=1e-12)


def test_a_sum_cannot_tell_apart_what_the_decoupled_form_does() -> None:
    """The collapse that the form is for: a sum's standard deviation makes one point of two and two of two the same."""
    one, two = [[[0.0, 0.0], [1.0, 0.0]]], [[[0.0, 0.0], [1.0, 1.0]]]
    summed = [ebpo_core.advantages(np.sum(r, axis=-1), method="grpo", eps=0.0) for r in (one, two)]
    np.testing.assert_allclose(summed[0], summed[1])
    decoupled = [ebpo_core.advantages(r, method="grpo", weights=[1.0, 1.0], eps=0.0) for r in (one, two)]
    np.testing.assert_allclose(2 * np.array(decoupled[0]), decoupled[1])


def test_a_reward_of_each_prior_by_itself() -> None:
    """With "ebpo" the sum is over estimators; over steps, one of them is kept for each reward."""
    rng = np.random.default_rng(0)
    rewards, groups = rng.random((7, 2)) * [1.0, 100.0], [0, 0, 0, 1, 1, 2, 2]
    weights, options = [1.0, 0.25], {"normalize": "scale", "leave_one_out": True}
    got = ebpo_core.advantages(rewards, groups, weights=weights, keys=["x"] * 7, **options)
    ebpos = [ebpo_core.EBPO(**options) for _ in weights]
    expected = sum(w * ebpo(r, groups, keys=["x"] * 7) for w, ebpo, r in zip(weights, ebpos, rewards.T, strict=True))
    np.testing.assert_allclose(got, expected, rtol=1e-14)
    scaled = ebpo_core.advantages(rewards * [1e3, 1e-3], groups, weights=weights, normalize="scale", eps=0.0)
    np.testing.assert_allclose(
        scaled, ebpo_core.advantages(rewards, groups, weights=weights, normalize="scale", eps=0.0)
    )


def test_containers_and_dtypes() -> None:
    torch = pytest.importorskip("torch")
    rewards = [[[1.0, 3.0], [0.0, 2.0]], [[0.0, 4.0], [0.0, 9.0]]]
    expected = np.array(ebpo_core.advantages(rewards, weights=[1, 2], method="gdpo"))
    assert isinstance(ebpo_core.advantages(rewards, weights=(1, 2), method="gdpo"), list)
    for dtype in (np.float16, np.float32, np.float64, np.int64, np.dtype(">f8")):
        got = ebpo_core.advantages(np.array(rewards).astype(dtype), weights=np.array([1, 2]), method="gdpo")
        assert got.dtype == (dtype if np.dtype(dtype).kind == "f" else np.float64)
        np.testing.assert_allclose(got, expected, rtol=1e-3 if dtype == np.float16 else 1e-6)
    for kind in (torch.bfloat16, torch.float32, torch.float64):
        got = ebpo_core.advantages(torch.tensor(rewards, dtype=kind), weights=torch.tensor([1.0, 2.0]), method="gdpo")
        assert got.dtype == kind
        np.testing.assert_array_equal(got.double(), torch.tensor(expected).to(kind).double())  # rounded once
    huge = ebpo_core.advantages(np.float32([[[1.0], [0.0]]]), weights=[1e100], method="dr_grpo")
    np.testing.assert_array_equal(huge, np.finfo(np.float32).max * np.array([[1, -1]], np.float32))
    huge = ebpo_core.advantages(torch.tensor([[[1.0], [0.0]]]), weights=[1e100], method="dr_grpo")
    assert torch.isfinite(huge).all()
    huge = ebpo_core.advantages(torch.tensor([[[1], [0]]]), weights=[1e100], method="dr_grpo")
    assert huge.tolist() == [[torch.finfo(torch.float32).max, torch.finfo(torch.float32).min]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"rewards": [[1.0, 0.0]], "method": "gdpo"}, ValueError, 'method="gdpo" needs weights'),
        ({"rewards": [[1.0, 0.0]], "weights": [1.0, 1.0]}, ValueError, r"shape \(1, 2\).*weights \(2,\).*\(M, G, K\)"),
        ({"rewards": [[1.0, 0.0]], "groups": [0], "weights": [1.0]}, ValueError, r"\(N, K\) with groups"),
        ({"rewards": [[1.0]], "groups": [0, 0], "weights": [1.0]}, ValueError, "groups has shape"),
        ({"rewards": [[[1.0]]], "mask": [[True, True]], "weights": [1.0]}, ValueError, "mask has shape"),
        ({"rewards": [[[1.0]]], "weights": []}, TypeError, "one real number for each reward"),
        ({"rewards": [[[1.0]]], "weights": 1.0}, TypeError, "one real number for each reward"),
        ({"rewards": [[[1.0]]], "weights": ["1"]}, TypeError, "one real number for each reward"),
        ({"rewards": [[[1.0]]], "weights": [np.nan]}, ValueError, r"weights\[0\] is nan"),
        ({"rewards": [[[1.0, 1.0]]], "weights": [1.0, -np.inf]}, ValueError, r"weights\[1\] is -inf"),
        ({"rewards": [[[1.0, np.inf]]], "weights": [1.0, 1.0]}, ValueError, "inf"),
        ({"rewards": [[[1.0]]], "weights": [1.0], "method": "gdpo", "c": 1.0}, ValueError, "c=1.0 .*method=.gdpo."),
        ({"rewards": [[[1.0]]], "weights": [1.0], "decay": 0.0}, ValueError, "^decay=0: .* forgets$"),
        (
            {"rewards": [[1.0], [0.0]], "groups": [0, 0], "weights": [1.0], "method": "gdpo"}
            | {"trajectories": [0, 1], "turns": [0, 0]},
            ValueError,
            "turns was given with method='gdpo'",
        ),
        (
            {"rewards": [[[1.0, 1.0], [0.0, 0.0]]], "weights": [1e140, 1e140], "method": "gdpo"},
            ValueError,
            r"weights=\[1e\+140, 1e\+140\] make a sum .* divide all weights",
        ),
        ({"rewards": [[[1.0]]], "weights": [1.0], "method": "gdpo", "keys": ["a"]}, ValueError, "keys"),
        ({"rewards": [[[None]]], "weights": [1.0]}, TypeError, "dtype object"),
        ({"rewards": [[[1.0], []]], "weights": [1.0]}, ValueError, "not rectangular"),
    ],
)
def test_wrong_arguments_are_named(call: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ebpo_core.advantages(**call)


def test_an_error_names_the_reward() -> None:
    with pytest.raises(ValueError, match=r"rewards\[2\]") as caught:
        ebpo_core.advantages([[[0.0, 1.0], [0.0, 0.0], [0.0, np.inf]]], weights=[1.0, 1.0])
    assert str(caught.value).endswith("; these rewards are those of kind 1, rewards[..., 1]")


def test_an_error_of_the_method_names_no_reward() -> None:
    with pytest.raises(ValueError, match='method="nope"') as caught:
        ebpo_core.advantages([[[0.0, 1.0], [0.0, 0.0]]], weights=[1.0, 1.0], method="nope")
    assert "kind" not in str(caught.value)
