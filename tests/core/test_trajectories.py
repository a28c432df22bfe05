"""Trajectories that count once, and turns with their returns-to-go, against the twin's plain loops."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ebpo_core
from ebpo_core import reference
from ebpo_core.reference import by_trajectory, by_turn, returns_to_go
from ebpo_core.trajectories import returns_to_go as fast_returns
from oracle import assert_same_state, options, tolerance

rewards_of = st.sampled_from([0.0, 1.0, 0.5, -1.0, 0.1])


@dataclasses.dataclass
class Rows:
    """Rows of trajectories, in any order: prompt, trajectory (named within its prompt), turn, reward, mask."""

    groups: list[Any]
    trajectories: list[Any]
    turns: list[int]
    rewards: np.ndarray
    mask: np.ndarray

    def given(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}


@st.composite
def rows(draw: st.DrawFn, *, share: bool) -> Rows:
    """``share``: the rows of a trajectory have one reward (NaN for all, sometimes); else each has its own."""
    listed = []
    for prompt in range(draw(st.integers(1, 4))):
        for trajectory in range(draw(st.integers(1, 4))):
            outcome = draw(st.one_of(rewards_of, st.just(np.nan)))
            turns = draw(st.sets(st.integers(0, 5), min_size=1, max_size=4))
            for turn in turns:
                reward = outcome if share else draw(st.one_of(rewards_of, rewards_of, st.just(np.nan)))
                kept = draw(st.sampled_from([True, True, True, False]))
                # What a masked row holds is not looked at where an outcome is shared.
                listed.append((prompt, trajectory, turn, 7.0 if share and not kept else reward, kept))
    listed = draw(st.permutations(listed))
    groups, trajectories, turns, rewards, mask = (list(column) for column in zip(*listed, strict=True))
    return Rows([f"p{g}" for g in groups], trajectories, turns, np.array(rewards), np.array(mask))


def check(got: Any, expected: np.ndarray, seen: list[np.ndarray]) -> None:
    spread = float(np.sqrt((expected**2).mean())) if np.abs(expected).max() > 0 else 1.0
    np.testing.assert_allclose(got, expected, rtol=0, atol=10 * max(tolerance(expected, seen, spread), 1e-12))


def firsts(names: list[Any], mask: np.ndarray) -> dict[Any, int]:
    return {name: row for row, name in reversed(list(enumerate(names))) if mask[row]}


@settings(max_examples=200)
@given(batches=st.lists(rows(share=True), min_size=1, max_size=3), opts=options())
def test_a_trajectory_counts_once(batches: list[Rows], opts: dict[str, Any]) -> None:
    """The twin goes through the rows; so does a batch that holds one row for each trajectory."""
    ours, reduced, twin = ebpo_core.EBPO(**opts), ebpo_core.EBPO(**opts), reference.EBPO(**opts)
    seen = []
    for batch in batches:
        call = batch.given("groups", "trajectories", "mask")
        expected = by_trajectory(twin, batch.rewards, **call)
        got = ours(batch.rewards, **call)
        check(got, expected, [batch.rewards[batch.mask]])
        seen.append(batch.rewards[batch.mask])
        assert_same_state(ours.state_dict(), twin, [x[~np.isnan(x)] for x in seen])
        names = list(zip(batch.groups, batch.trajectories, strict=True))
        kept = list(dict.fromkeys(name for name, keep in zip(names, batch.mask, strict=True) if keep))
        if kept:
            outcomes = [batch.rewards[row] for row in (firsts(names, batch.mask)[name] for name in kept)]
            alone = dict(zip(kept, reduced(outcomes, [group for group, _ in kept]), strict=True))
            shared = [alone[name] if keep else 0.0 for name, keep in zip(names, batch.mask, strict=True)]
            check(got, np.array(shared), seen)


@settings(max_examples=200)
@given(
    batches=st.lists(rows(share=False), min_size=1, max_size=3),
    opts=options().filter(lambda opts: opts["normalize"] != "batch"),
    gamma=st.sampled_from([1.0, 0.9, 0.0]),
    keyed=st.booleans(),
)
def test_turns_equal_the_twin(batches: list[Rows], opts: dict[str, Any], gamma: float, keyed: bool) -> None:
    ours, twin = ebpo_core.EBPO(**opts), reference.EBPO(**opts)
    seen = []
    for batch in batches:
        call = batch.given("groups", "trajectories", "turns", "mask") | {"gamma": gamma}
        if keyed:
            call["keys"] = [{"p0": None, "p1": "a", "p2": ("a", 1), "p3": ("a", 2)}[group] for group in batch.groups]
        expected = by_turn(twin, batch.rewards, **call)
        got = ours(batch.rewards, **call)
        seen.append(np.abs(batch.rewards[~np.isnan(batch.rewards)]) * 6)
        check(got, expected, seen)
        assert_same_state(ours.state_dict(), twin, seen)


@given(batch=rows(share=False), gamma=st.sampled_from([1.0, 0.5, 0.0]))
def test_returns_equal_the_double_loop(batch: Rows, gamma: float) -> None:
    names = [hash(name) for name in zip(batch.groups, batch.trajectories, strict=True)]
    codes = np.unique(names, return_inverse=True)[1].astype(np.uint32)
    got = fast_returns(batch.rewards, codes, np.array(batch.turns), gamma)
    np.testing.assert_allclose(got, returns_to_go(batch.rewards, names, batch.turns, gamma), rtol=1e-13, atol=1e-15)


def test_turns_by_hand() -> None:
    """Two trajectories of one prompt, one of which takes a second turn; V of a cell of one is the prior's."""
    ebpo = ebpo_core.EBPO(normalize="none", leave_one_out="row", kappa=0.0)
    history = ebpo_core.EBPO(normalize="none", kappa=0.0)
    past = dict(groups=["z", "z", "z"], trajectories=[0, 1, 0], turns=[1, 1, 2])
    history([0.25, 0.25, 0.5], **past)
    state = history.state_dict()
    ebpo.load_state_dict({**state, "options": dict(ebpo.options)})
    got = ebpo([0.0, 1.0, 2.0], ["p", "p", "p"], trajectories=["a", "a", "b"], turns=[1, 2, 1], gamma=0.5)
    # Returns of "a": 0 + 0.5 * 1 and 1; of "b": 2. The prior of turn 1 is one cell, (0.75, 0.25): tau2 = 0, so S = 1.
    prior_1, prior_2 = 0.5, 0.5
    np.testing.assert_allclose(got, [0.5 - prior_1, 1.0 - prior_2, 2.0 - prior_1], atol=1e-15)
    assert ebpo.diagnostics is not None
    assert ebpo.diagnostics.keys == (1, 2)
    assert history.shrunken_prior(1).mean == pytest.approx(prior_1)


def test_a_prompt_is_left_out_with_all_its_turns() -> None:
    """The root's prior holds the trajectory's other turns, which hold the reward that the row is scored on."""
    ebpo = ebpo_core.EBPO(normalize="none", leave_one_out="row")
    call: dict[str, Any] = dict(trajectories=[0, 0, 1, 1], turns=[1, 2, 1, 2])
    low = ebpo_core.EBPO(**ebpo.options)([0.0, 0.0, 0.3, 0.7], ["p", "p", "q", "q"], **call)
    high = ebpo_core.EBPO(**ebpo.options)([0.0, 9.0, 0.3, 0.7], ["p", "p", "q", "q"], **call)
    assert high[0] - low[0] == 9.0  # the baseline of turn 1 has not moved
    assert high[1] - low[1] == 9.0


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_narrow_dtypes_are_rounded_once(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    r, ids = rng.random(60).astype(dtype), np.arange(60)
    call: dict[str, Any] = dict(groups=ids // 20, trajectories=ids // 5, turns=ids % 5, gamma=0.9, normalize="scale")
    got = ebpo_core.advantages(r, **call)
    assert got.dtype == dtype
    wide = ebpo_core.advantages(r.astype(np.float64), **call)
    np.testing.assert_array_equal(got, wide.astype(dtype))


def test_containers() -> None:
    torch = pytest.importorskip("torch")
    call: dict[str, Any] = dict(normalize="none", gamma=0.5)
    r, groups, names, turns = [1.0, 0.0, 0.5], ["p", "p", "p"], [3, 3, 4], [0, 1, 0]
    listed = ebpo_core.advantages(r, groups, trajectories=names, turns=turns, **call)
    assert isinstance(listed, list)
    tensor = torch.tensor(r, dtype=torch.bfloat16)
    got = ebpo_core.advantages(
        tensor, groups, trajectories=torch.tensor(names), turns=torch.tensor(turns, dtype=torch.int32), **call
    )
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, torch.tensor(listed, dtype=torch.bfloat16))


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "rloo", "maxrl", "constant", "batch_mean", "james_stein"])
def test_other_methods_count_a_trajectory_once(method: Any) -> None:
    once = ebpo_core.advantages([1.0, 0.0, 0.25, 0.0], [0, 0, 1, 1], method=method)
    cut = ebpo_core.advantages(
        [1.0, 0.0, 1.0, 0.25, 0.0, 1.0], [0, 0, 0, 1, 1, 0], trajectories=[7, 8, 7, 1, 2, 7], method=method
    )
    np.testing.assert_array_equal(cut, np.array(once)[[0, 1, 0, 2, 3, 0]])


def test_rloo_by_turn_is_the_mean_of_the_others_in_the_cell() -> None:
    got = ebpo_core.advantages(
        [1.0, 2.0, 0.0, 4.0], [0] * 4, trajectories=[0, 0, 1, 2], turns=[1, 2, 1, 1], method="rloo"
    )
    np.testing.assert_allclose(got, [3 - 2.0, 0.0, 0 - 3.5, 4 - 1.5])


ROWS: dict[str, Any] = dict(rewards=[1.0, 0.0, 1.0], groups=[0, 0, 1], trajectories=[0, 1, 0])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (dict(rewards=[[1.0, 0.0]], groups=None, trajectories=[0, 1]), ValueError, "trajectories.*matrix.*groups="),
        (dict(trajectories=[0, 1]), ValueError, r"trajectories has shape \(2,\), rewards \(3,\): pass one id per"),
        (dict(trajectories=[0, None, 1]), ValueError, r"trajectories\[1\] is None"),
        (dict(trajectories=[[0], [1], [2]]), TypeError, r"trajectories\[0\].*list.*not hashable"),
        (dict(trajectories=[0, 0, 0]), ValueError, r"rewards\[1\] is 0.0 and rewards\[0\] is 1.0.*mask=.*turns="),
        (dict(rewards=[np.nan, 0.0, 1.0], trajectories=[0, 0, 0]), ValueError, r"rewards\[1\] is 0.0 and .*nan"),
        (dict(trajectories=None, turns=[1, 1, 1]), ValueError, "turns.*without trajectories"),
        (dict(gamma=0.5), ValueError, "gamma=0.5.*without turns"),
        (dict(trajectories=None, gamma=0.5), ValueError, "gamma=0.5.*without turns"),
        (dict(turns=[1, 1, 1], gamma=1.5), ValueError, r"gamma=1.5.*\[0, 1\]"),
        (dict(turns=[1, 1, 1], gamma="1"), TypeError, "gamma='1'"),
        (dict(turns=[1, 1, 1], gamma=True), TypeError, "gamma=True"),
        (dict(rewards=[[1.0, 0.0]], groups=None, trajectories=None, gamma=True), TypeError, "gamma=True"),
        (dict(trajectories=None, gamma=np.ones(2)), TypeError, r"gamma=array\(\[1., 1.\]\)"),
        (dict(turns=[1, 1]), ValueError, r"turns has shape \(2,\)"),
        (dict(turns=[1, 1.0, 1]), TypeError, "turns has dtype float64"),
        (dict(turns=[1, -1, 1]), ValueError, r"turns\[1\] is -1"),
        (dict(trajectories=[0, 0, 0], turns=[2, 2, 1]), ValueError, "rows 0 and 1 are both turn 2"),
        (dict(rewards=[1.0, np.inf, 1.0], turns=[1, 1, 1]), ValueError, r"rewards\[1\] is inf"),
        (dict(rewards=[1e140, 1e140, 1.0], trajectories=[0, 0, 0], turns=[1, 2, 1]), ValueError, r"rewards\[0\] on is"),
    ],
)
def test_bad_arguments_name_the_remedy_and_change_nothing(call: dict[str, Any], error: Any, match: str) -> None:
    ebpo = ebpo_core.EBPO(normalize="none")
    before = ebpo.state_dict()
    with pytest.raises(error, match=match):
        ebpo(**(ROWS | call))
    assert ebpo.state_dict() == before


def test_centring_over_turns_is_refused() -> None:
    ebpo = ebpo_core.EBPO()
    with pytest.raises(ValueError, match=re.escape('normalize="scale" or "none"')):
        ebpo(**ROWS, turns=[1, 1, 1])
    assert ebpo == ebpo_core.EBPO()
    for method in ("reinforce_pp", "batch_mean", "james_stein"):
        with pytest.raises(ValueError, match=f'method=.{method}.*"rloo"'):
            ebpo_core.advantages(**ROWS, turns=[1, 1, 1], method=method)
