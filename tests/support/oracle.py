"""Batches for the property tests, and how closely two implementations must agree."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from ebpo_core import reference


@dataclass
class Case:
    """One call: float64 rewards with their groups and mask."""

    rewards: np.ndarray
    groups: Any = None
    mask: np.ndarray | None = None

    @property
    def args(self) -> tuple[np.ndarray, Any]:
        return self.rewards, self.groups

    @property
    def counted(self) -> np.ndarray:
        valid = ~np.isnan(self.rewards)
        return self.rewards[valid if self.mask is None else valid & self.mask]


values = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 0.5, 0.1, 0.25]),
    st.floats(-10, 10, allow_nan=False, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6),
)
scales = st.sampled_from([1.0, 1.0, 1.0, 1e-140, 1e-30, 1e30, 1e138])
offsets = st.sampled_from([0.0, 0.0, 0.0, 1e8, -3.0])


@st.composite
def cases(draw: st.DrawFn, scale: float | None = None, offset: float | None = None) -> Case:
    """Equal or uneven groups, in any row order, with masked and unscorable rows."""
    scale = draw(scales) if scale is None else scale
    offset = draw(offsets) if offset is None else offset
    equal = draw(st.booleans())
    if equal:
        shape = (draw(st.integers(1, 7)), draw(st.sampled_from([1, 2, 3, 4, 8, 9, 16, 17])))
        n = shape[0] * shape[1]
        groups = None
    else:
        sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=7))
        n, shape = sum(sizes), (sum(sizes),)
        groups = np.array(draw(st.permutations(np.repeat(np.arange(len(sizes)), sizes).tolist())))
    kind = draw(st.sampled_from(["mixed", "binary", "constant"]))
    if kind == "mixed":
        r = draw(st.lists(values, min_size=n, max_size=n))
    elif kind == "binary":
        r = draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n))
    else:
        r = [draw(values)] * n
    rewards = np.array(r) * scale + offset * min(scale, 1.0)
    if draw(st.booleans()):
        holes = draw(st.lists(st.booleans(), min_size=n, max_size=n))
        rewards = np.where(holes, np.nan, rewards)
    mask = None
    if draw(st.booleans()):
        mask = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n))).reshape(shape)
    return Case(rewards.reshape(shape), groups, mask)


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        "normalize": draw(st.sampled_from(["batch", "scale", "none"])),
        "sigma2": draw(st.sampled_from(["total", "within"])),
        "tau2": draw(st.sampled_from(["raw", "debiased"])),
        "score": draw(st.sampled_from(["after", "before"])),
        "leave_one_out": draw(st.sampled_from([False, True, "row"])),
        "shrinkage": draw(st.sampled_from([None, None, 0.0, 0.3, 1.0])),
        "decay": draw(st.sampled_from([1.0, 0.95, 0.5])),
        "decay_by": draw(st.sampled_from(["update", "visit"])),
        "eps": draw(st.sampled_from([1e-6, 1e-4, 1.0])),
        "ddof": draw(st.integers(0, 1)),
        "norm_ddof": draw(st.integers(0, 1)),
        "kappa": draw(st.sampled_from([10.0, 1.0, 0.0])),
    }
    if chosen["shrinkage"] is not None:
        chosen["sigma2"], chosen["tau2"] = "total", "raw"
    if chosen["leave_one_out"] == "row":
        chosen["normalize"] = "none"
    elif chosen["score"] == "before":
        chosen["leave_one_out"] = False
    return chosen


@st.composite
def keys(draw: st.DrawFn, case: Case) -> list[Any]:
    """Keys of a case: one per group of a matrix, one per row otherwise; three levels deep, and None."""
    kinds = st.sampled_from([None, "a", ("a", 1), ("a", 2), ("a", 1, "x"), ("b", "x"), 3])
    if case.groups is None:
        return [draw(kinds) for _ in range(len(case.rewards))]
    of_group = [draw(kinds) for _ in range(int(case.groups.max()) + 1)]
    return [of_group[group] for group in case.groups]


def assert_same_statistics(got: dict[str, Any], twin: reference.Prior, seen: list[np.ndarray]) -> None:
    """The nine numbers of a state against the twin's, given the rewards that were seen."""
    largest = max((float(np.abs(x).max()) for x in seen if x.size), default=0.0)
    for name, moments in (("rewards", twin.rewards), ("group_means", twin.means)):
        part = got[name]
        assert part["count"] == pytest.approx(moments.count, rel=1e-12)
        assert part["mean"] == pytest.approx(moments.mean, rel=1e-12, abs=1e-12 * largest)
        # M2 is a sum of count squares, each of which rounds like the largest reward.
        assert part["m2"] == pytest.approx(
            moments.m2, rel=1e-11, abs=1e-12 * (largest * 1e-4) ** 2 * max(1, moments.count)
        )
    assert got["ssw"] == pytest.approx(twin.ssw, rel=1e-11, abs=1e-12 * (largest * 1e-4) ** 2 * 100)
    assert got["dof"] == pytest.approx(twin.dof, rel=1e-12)
    assert got["inv_n"] == pytest.approx(twin.inv_n, rel=1e-12)


def assert_same_state(state: dict[str, Any], twin: reference.EBPO, seen: list[np.ndarray]) -> None:
    """Root, keys and step of ``EBPO.state_dict()`` against the twin's."""
    assert_same_statistics(state["prior"], twin.prior, seen)
    keyed = {tuple(entry["key"]): entry for entry in state["keys"]}
    assert keyed.keys() == twin.keys.keys()
    for key, entry in keyed.items():
        assert_same_statistics(as_of_now(entry, state["idle_decay"]), twin.keys[key], seen)
    assert state["step"] == twin.step


def as_of_now(entry: dict[str, Any], idle_decay: float) -> dict[str, Any]:
    """The numbers of a key, which are stored as its last update left them, discounted by the updates since then."""
    weight = idle_decay ** entry["idle"]
    moments = {name: {**entry[name]} for name in ("rewards", "group_means")}
    for part in moments.values():
        part["count"] *= weight
        part["m2"] *= weight
    return {**moments, **{name: entry[name] * weight for name in ("ssw", "dof", "inv_n")}}


def tolerance(expected: np.ndarray, seen: list[np.ndarray], spread: float) -> float:
    """1e-12, relative to the largest advantage, times how much larger the rewards are than what is left of them.

    ``spread`` is the root mean square of what the rewards left: rounding of a reward is as large as its last digit,
    whatever remains of it after the baseline has been subtracted. Where nothing remains, neither may the result.
    """
    largest = max((float(np.abs(x).max()) for x in seen if x.size), default=0.0)
    top = float(np.abs(expected).max()) if expected.size else 0.0
    if spread == 0 or largest == 0:
        return 1e-12 * top
    return 1e-12 * max(1.0, largest / spread) * top


def raw_spread(estimator: reference.EBPO, case: Case, **call: Any) -> float:
    """What is left of the rewards: the root mean square of r - V, about its mean where that is taken out."""
    twin = dataclasses.replace(estimator, normalize="none")
    raw = twin(*case.args, mask=case.mask, **call)
    valid = ~np.isnan(case.rewards) if case.mask is None else case.mask & ~np.isnan(case.rewards)
    left = raw[valid]
    if not left.size:
        return 0.0
    return float(left.std() if estimator.normalize == "batch" else np.sqrt((left**2).mean()))
