"""Advantage rules under comparison: each is made afresh for a run and maps rewards and groups to advantages.

Every number comes out of ``ebpo_core``; a fixed mix of two baselines is the mix of the two rules' advantages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ebpo_core

Array = NDArray[np.float64]
Rule = Callable[..., Array]
"""``rule(rewards (N,), groups (N,), topics (N,) or None) -> advantages (N,)``; it may keep state between calls."""

OPTIONS: dict[str, Any] = {
    "sigma2": "within",
    "tau2": "debiased",
    "leave_one_out": True,
    "decay": 0.95,
    "normalize": "scale",
}
"""What the guide recommends to try."""

TRACKER: dict[str, Any] = {
    "decay": 0.9,
    "decay_by": "visit",
    "sigma2": "within",
    "tau2": "debiased",
    "normalize": "scale",
    "max_keys": 1 << 20,
}
"""A discounted prior for each prompt."""


def _method(name: str) -> Callable[[], Rule]:
    def make() -> Rule:
        return lambda rewards, groups, _topics=None: ebpo_core.advantages(rewards, groups, method=name)

    return make


def _mix(share: float) -> Callable[[], Rule]:
    """``r - (1 - s) mu_group - s mu_batch`` over its own std: the published EBPO with equal groups and S fixed to s."""

    def rule(rewards: Array, groups: Array, _topics: Any = None) -> Array:
        own = ebpo_core.advantages(rewards, groups, method="dr_grpo")
        batch = ebpo_core.advantages(rewards, groups, method="batch_mean")
        raw = (1.0 - share) * own + share * batch
        # The whole batch as one group: GRPO's formula is then the centring and scaling of EBPO's last step.
        return ebpo_core.advantages(raw, np.zeros(raw.size, dtype=int), method="grpo")

    return lambda: rule


def _tracker() -> Rule:
    """A prior for each prompt (the id of its group), discounted when the prompt comes again."""
    ebpo = ebpo_core.EBPO(**TRACKER)
    return lambda rewards, groups, _topics=None: ebpo(rewards, groups, keys=groups.tolist())


def _ebpo(topics: bool = False, **options: Any) -> Callable[[], Rule]:
    def make() -> Rule:
        ebpo = ebpo_core.EBPO(**options)
        return lambda rewards, groups, keys=None: ebpo(rewards, groups, keys=list(keys) if topics else None)

    return make


RULES: dict[str, Callable[[], Rule]] = {
    **{name: _method(name) for name in ("grpo", "dr_grpo", "rloo", "reinforce_pp", "batch_mean", "constant", "maxrl")},
    "james_stein": _method("james_stein"),
    "grpo_again": _method("grpo"),
    "dapo": _method("grpo"),  # the runner averages the loss over the groups that are left
    **{f"mix_{round(100 * share)}": _mix(share) for share in (0.0, 0.25, 0.5, 0.75)},
    "ebpo": _ebpo(),
    "ebpo_options": _ebpo(**OPTIONS),
    "ebpo_topic": _ebpo(topics=True),
    "ebpo_row": _ebpo(normalize="none", leave_one_out="row"),
    "tracker": _tracker,
}

UNSCALED: dict[str, Callable[[], Rule]] = {
    **{name: _method(name) for name in ("dr_grpo", "rloo", "batch_mean", "constant", "james_stein")},
    "ebpo": _ebpo(normalize="none"),
    "ebpo_options": _ebpo(**{**OPTIONS, "normalize": "none"}),
    "ebpo_within": _ebpo(normalize="none", sigma2="within", tau2="debiased"),
    "ebpo_decay": _ebpo(normalize="none", decay=0.95),
    "ebpo_topic": _ebpo(topics=True, normalize="none"),
    "ebpo_row": _ebpo(normalize="none", leave_one_out="row"),
}
"""Rules whose advantage is reward less baseline, so that ``r - A`` is the baseline."""
