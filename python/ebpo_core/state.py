"""An estimator's state as a JSON-safe dict, and back: options, the root's prior, the prior of each key, the step.

::

    {"version": 1, "options": {...}, "step": 40,
     "prior": {"rewards": {count, mean, m2}, "group_means": {...}, "ssw": ..., "dof": ..., "inv_n": ...},
     "keys": [{"key": ["algebra"], ...the same nine numbers}, {"key": ["algebra", 3], ...}]}
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ebpo_core import _core
from ebpo_core.arguments import step_id
from ebpo_core.keys import key_of, path_of
from ebpo_core.prior import check_version, parts_of, statistics_of

logger = logging.getLogger(__name__)

VERSION = 1
"""Version of the state written here; newer ones are refused."""

# The stored sums do not depend on these, and `decay` acts from the next update on: a run may go on with other values.
_FREE = frozenset(
    {
        "normalize",
        "sigma2",
        "tau2",
        "score",
        "leave_one_out",
        "decay",
        "eps",
        "ddof",
        "norm_ddof",
        "kappa",
        "max_keys",
    }
)


def write_state(options: Mapping[str, Any], state: _core.State) -> dict[str, Any]:
    """The state of an estimator, exact to the bit."""
    (root, keys), step = state.tree()  # at once: a step newer than its prior would lose a batch on resume
    return {
        "version": VERSION,
        "options": dict(options),
        "prior": statistics_of(root),
        "keys": [{"key": _listed(path), **statistics_of(parts)} for path, parts in keys],
        "step": step,
    }


def read_state(options: Mapping[str, Any], target: _core.State, state: Mapping[str, Any]) -> None:
    """Check ``state`` and put it into ``target``, which stays as it was where the check fails."""
    check_version(state, "an EBPO state", VERSION)
    stored, prior, keys = state.get("options"), state.get("prior"), state.get("keys")
    if not isinstance(stored, Mapping) or not isinstance(prior, Mapping):
        raise ValueError("state has no fields 'options' and 'prior': pass what EBPO.state_dict() returned")
    if not isinstance(keys, list):
        raise ValueError(f"state field 'keys' is {keys!r}: expected a list; pass what EBPO.state_dict() returned")
    changed = check_options(options, stored, "state", _FREE)
    listed = [(_path(entry, index), parts_of(entry, f"keys[{index}].")) for index, entry in enumerate(keys)]
    target.load(parts_of(prior, "prior."), listed, step_id(state.get("step")), options["max_keys"])
    if changed:
        logger.warning(
            "the prior was saved under other options, and this estimator goes on with its own: %s",
            ", ".join(f"{name}={options[name]!r} (saved: {stored[name]!r})" for name in changed),
        )


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


def _listed(path: list[str]) -> list[str | int]:
    key = key_of(path)
    return list(key) if isinstance(key, tuple) else [key]


def _path(entry: Any, index: int) -> list[str]:
    key = entry.get("key") if isinstance(entry, Mapping) else None
    if not isinstance(key, list) or not all(
        isinstance(part, (str, int)) and not isinstance(part, bool) for part in key
    ):
        raise ValueError(
            f"state field 'keys[{index}].key' is {key!r}: expected a list of strings and integers; "
            "pass what EBPO.state_dict() returned"
        )
    return path_of(tuple(key))
