"""The running prior on its own: two Welford accumulators and the sums that EBPO's options need.

Its state is a plain dict of JSON numbers. Python writes floats so that they read back bit for bit, hence a round trip
through JSON is exact.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ebpo_core import _core
from ebpo_core.arguments import real, text, zero_or_one
from ebpo_core.inputs import read_batch

if TYPE_CHECKING:
    from ebpo_core._core import _Parts as Parts

VERSION = 1
"""Version of the state of a :class:`Prior`; newer ones are refused."""

_MOMENTS = ("count", "mean", "m2")
_SUMS = ("ssw", "dof", "inv_n")


class Prior:
    """Streaming statistics of rewards and of group means (paper §3.2), without options or scoring.

    ``merge`` is associative and order-independent up to rounding (1e-12) and equals having seen all the data, so
    priors of several ranks or runs can be put together. Copies, pickles and state dicts are exact to the bit.
    """

    __slots__ = ("_state",)

    def __init__(self) -> None:
        self._state = _core.State()

    def update(self, rewards: Any, groups: Any = None, *, mask: Any = None) -> None:
        """Take a batch in: rewards ``(M, G)``, or ``(N,)`` with ``groups``, as in :func:`ebpo_core.advantages`."""
        batch = read_batch(rewards, groups, mask)
        self._state.observe(batch.rewards, batch.groups, batch.mask)

    def merge(self, other: Prior) -> None:
        """Add everything ``other`` has seen."""
        if not isinstance(other, Prior):
            raise TypeError(f"other is of type {type(other).__name__}: expected ebpo_core.Prior")
        self._state.merge(other._state, 0)

    def decay(self, rho: float) -> None:
        """Multiply every count and sum by ``rho`` in (0, 1]; means and variances stay."""
        rho = real("rho", rho)
        if not 0 < rho <= 1:
            raise ValueError(f"rho={rho!r}: expected a number in (0, 1]; 1 forgets nothing")
        self._state.decay(rho)

    def reset(self) -> None:
        """Forget everything."""
        self._state = _core.State()

    @property
    def count(self) -> float:
        """Rewards seen, less what was forgotten."""
        return self._state.parts()[0][0]

    @property
    def group_count(self) -> float:
        """Groups seen, less what was forgotten."""
        return self._state.parts()[0][3]

    @property
    def mean(self) -> float:
        """``mu_glob``, the mean of all rewards seen; NaN while there is none."""
        parts = self._state.parts()[0]
        return parts[1] if parts[0] > 0 else math.nan

    def sigma2(self, kind: str = "total", ddof: int = 0) -> float:
        """Noise variance of a reward: ``"total"`` of all rewards, or pooled ``"within"`` groups; NaN while empty."""
        value = self._state.sigma2(text("kind", kind), zero_or_one("ddof", ddof))
        return value if self.count > 0 else math.nan

    def tau2(self, kind: str = "raw", ddof: int = 0) -> float:
        """Variance of group means: ``"raw"``, or ``"debiased"`` of their sampling noise; NaN while empty."""
        value = self._state.tau2(text("kind", kind), zero_or_one("ddof", ddof))
        return value if self.count > 0 else math.nan

    def state_dict(self) -> dict[str, Any]:
        """The state as a JSON-safe dict."""
        return {"version": VERSION, **statistics_of(self._state.parts()[0])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state. Raises ValueError on anything that :meth:`state_dict` cannot have written."""
        check_version(state, "a Prior state", VERSION)
        self._state.load(parts_of(state), [], (1.0, 0), self._state.parts()[1], 0)

    def __getstate__(self) -> dict[str, Any]:
        return self.state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._state = _core.State()
        self.load_state_dict(state)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Prior):
            return NotImplemented
        return self._state.parts() == other._state.parts()

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        if self.count == 0:
            return "Prior(empty)"
        return (
            f"Prior(count={self.count:g}, group_count={self.group_count:g}, mean={self.mean:.6g}, "
            f"sigma2={self.sigma2():.6g}, tau2={self.tau2():.6g})"
        )


def prior_of(parts: Parts) -> Prior:
    """A prior of nine numbers that the core gave."""
    prior = Prior()
    prior._state.load(parts, [], (1.0, 0), None, 0)
    return prior


def statistics_of(parts: Parts) -> dict[str, Any]:
    """The nine numbers of a prior, named."""
    return {
        "rewards": dict(zip(_MOMENTS, parts[0:3], strict=True)),
        "group_means": dict(zip(_MOMENTS, parts[3:6], strict=True)),
        **dict(zip(_SUMS, parts[6:9], strict=True)),
    }


def parts_of(state: Mapping[str, Any], where: str = "") -> Parts:
    """The nine numbers that ``state`` names, for the core to check; ``where`` leads to it in errors."""
    parts = [_number(state, where, "rewards", name) for name in _MOMENTS]
    parts += [_number(state, where, "group_means", name) for name in _MOMENTS]
    parts += [_number(state, where, name) for name in _SUMS]
    return parts


def check_version(state: Mapping[str, Any], what: str, newest: int) -> None:
    """Refuse anything but a state of this kind, and states written by a newer release."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state is of type {type(state).__name__}: expected the dict that state_dict() returned")
    version = state.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"state has version={version!r}, so it is not {what}: pass what state_dict() returned")
    if version > newest:
        raise ValueError(f"state has version={version}, this release reads up to {newest}: upgrade ebpo-core")


def _number(state: Mapping[str, Any], where: str, *path: str) -> float:
    value: Any = state
    for name in path:
        if not isinstance(value, Mapping) or name not in value:
            raise ValueError(f"state has no field {where + '.'.join(path)!r}: pass what state_dict() returned")
        value = value[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > sys.float_info.max:
        raise ValueError(f"state field {where + '.'.join(path)!r} is {value!r}: expected a finite number")
    return float(value)
