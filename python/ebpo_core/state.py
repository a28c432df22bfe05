"""An estimator's state as a dict, and back: options, the root's prior, the prior of each key, the step.

::

    {"version": 3, "options": {...}, "step": 40, "idle_decay": 0.99, "updates": 40,
     "prior": {"rewards": {count, mean, m2}, "group_means": {...}, "ssw": ..., "dof": ..., "inv_n": ...},
     "keys": [{"key": ["algebra"], ...the same nine numbers, "idle": 0}, {"key": ["algebra", 3], ...}]}

The numbers of a key are those that its last update left, ``idle`` updates ago; since then each update has discounted
them by ``idle_decay``. (The root takes part in every update.) ``updates`` counts the updates that discount; only
differences of it matter. Parents come before their keys.

That is plain JSON. For many keys ``"keys"`` may be a dict of arrays instead, one entry per key::

    names       uint8     the last part of each key in UTF-8, one after another: "s" and a string, "i" and an integer,
                          or "j" and a JSON string (which has lone surrogates)
    lengths     uintp     (n,) bytes of each
    parents     intp      (n,) entry of the parent, -1 for the root
    statistics  float64   (n, 9) rewards.count, .mean, .m2, group_means.count, .mean, .m2, ssw, dof, inv_n
    idle        int64     (n,)

Version 2 had no option ``shrinkage``, version 1 besides neither ``idle``, ``idle_decay`` nor the option ``decay_by``;
both are read.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ebpo_core import _core
from ebpo_core.arguments import real, step_id
from ebpo_core.keys import Path, path_of
from ebpo_core.prior import check_version, parts_of, statistics_of

if TYPE_CHECKING:
    from ebpo_core._core import _KeyArrays as KeyArrays

logger = logging.getLogger(__name__)

VERSION = 3
"""Version of the state written here; newer ones are refused."""

ARRAYS: dict[str, tuple[Any, int]] = {
    "names": (np.uint8, 1),
    "lengths": (np.uintp, 1),
    "parents": (np.intp, 1),
    "statistics": (np.float64, 2),
    "idle": (np.int64, 1),
}
"""The arrays of keys: dtype and dimensions of each."""

# The stored sums do not depend on these, and `decay` acts from the next update on: a run may go on with other values.
_FREE = frozenset(
    {
        "normalize",
        "sigma2",
        "tau2",
        "score",
        "leave_one_out",
        "shrinkage",
        "decay",
        "decay_by",
        "eps",
        "ddof",
        "norm_ddof",
        "kappa",
        "max_keys",
    }
)


def write_state(options: Mapping[str, Any], state: _core.State, arrays: bool) -> dict[str, Any]:
    """The state of an estimator, exact to the bit."""
    collects = gc.isenabled()
    gc.disable()  # each of many entries would be walked by many collections, and none of them is in a cycle
    try:
        root, keys, (idle_decay, updates), step = state.stored(arrays)
    finally:
        if collects:
            gc.enable()
    return {
        "version": VERSION,
        "options": dict(options),
        "prior": statistics_of(root),
        "keys": keys,
        "idle_decay": idle_decay,
        "updates": updates,
        "step": step,
    }


def read_state(options: Mapping[str, Any], target: _core.State, state: Mapping[str, Any]) -> None:
    """Check ``state`` and put it into ``target``, which stays as it was where the check fails."""
    check_version(state, "an EBPO state", VERSION)
    if state["version"] < VERSION:
        state = _upgraded(state)
    stored, prior, keys = state.get("options"), state.get("prior"), state.get("keys")
    if not isinstance(stored, Mapping) or not isinstance(prior, Mapping):
        raise ValueError("state has no fields 'options' and 'prior': pass what EBPO.state_dict() returned")
    changed = check_options(options, stored, "state", _FREE)
    clock = real("state field idle_decay", state.get("idle_decay")), _updates(state.get("updates"), "updates")
    target.load(parts_of(prior, "prior."), _keys(keys), clock, step_id(state.get("step")), options["max_keys"])
    if changed:
        logger.warning(
            "the prior was saved under other options, and this estimator goes on with its own: %s",
            ", ".join(f"{name}={options[name]!r} (saved: {stored[name]!r})" for name in changed),
        )


def _upgraded(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state of an older version with what came later, as it was then."""
    options, keys = state.get("options"), state.get("keys")
    if isinstance(options, Mapping):
        options = {"shrinkage": None, **options}
    if state["version"] == 2:
        return {**state, "options": options}
    return {
        **state,
        "idle_decay": 1.0,
        "updates": 0,
        "options": {"decay_by": "update", **options} if isinstance(options, Mapping) else options,
        "keys": [{**entry, "idle": 0} if isinstance(entry, Mapping) else entry for entry in keys]
        if isinstance(keys, list)
        else keys,
    }


def check_options(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], what: str, free: frozenset[str] = frozenset({"max_keys"})
) -> list[str]:
    """Names of the options that differ, which must be in ``free``; ``max_keys`` alone changes no number of a merge."""
    for name, value in mine.items():
        if name not in theirs or (name not in free and theirs[name] != value):
            raise ValueError(
                f"{what} has option {name}={theirs.get(name, 'missing')!r}, this estimator {name}={value!r}: "
                "build the estimator with the options of the state"
            )
    unknown = sorted(set(theirs) - set(mine))
    if unknown:
        raise ValueError(f"{what} has the unknown option {unknown[0]!r}: it was not written by this release")
    changed = [name for name, value in mine.items() if theirs[name] != value]
    if changed:
        try:
            _core.Options(**theirs)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{what} has options that no estimator has ({error}): pass what state_dict() returned"
            ) from None
    return changed


def _keys(keys: Any) -> list[tuple[Path, list[float], int]] | KeyArrays:
    if isinstance(keys, Mapping):
        return _arrays(keys)
    if not isinstance(keys, list):
        raise ValueError(f"state field 'keys' is {keys!r}: expected a list; pass what EBPO.state_dict() returned")
    return [
        (_path(entry, index), parts_of(entry, f"keys[{index}]."), _updates(entry.get("idle"), f"keys[{index}].idle"))
        for index, entry in enumerate(keys)
    ]


def _path(entry: Any, index: int) -> Path:
    key = entry.get("key") if isinstance(entry, Mapping) else None
    if not isinstance(key, list) or not all(
        isinstance(part, (str, int)) and not isinstance(part, bool) for part in key
    ):
        raise ValueError(
            f"state field 'keys[{index}].key' is {key!r}: expected a list of strings and integers; "
            "pass what EBPO.state_dict() returned"
        )
    return path_of(tuple(key))


def _updates(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 2**62:
        raise ValueError(
            f"state field {name!r} is {value!r}: expected a number of updates; pass what EBPO.state_dict() returned"
        )
    return value


def _arrays(keys: Mapping[str, Any]) -> KeyArrays:
    """The arrays of keys as the core reads them; a file may hold narrower integers."""
    read = []
    for name, (dtype, dimensions) in ARRAYS.items():
        array = keys.get(name)
        if not isinstance(array, np.ndarray) or array.ndim != dimensions or not np.can_cast(array.dtype, dtype):
            what = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else repr(array)
            raise ValueError(
                f"state field 'keys.{name}' is {what}: expected {np.dtype(dtype).name} in {dimensions} dimensions; "
                "pass what EBPO.state_dict(arrays=True) returned"
            )
        read.append(np.ascontiguousarray(array, dtype=dtype))
    return tuple(read)  # type: ignore[return-value]
