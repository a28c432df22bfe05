"""Size and sign of the advantages that each rule would give to the dead groups of a file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, get_args

import numpy as np

from ebpo_core.estimator import EBPO
from ebpo_core.signal.cells import Codes, Vector
from ebpo_core.signal.groups import Groups, Mask
from ebpo_core.signal.rollouts import Rollouts
from ebpo_core.stateless import Method, advantages

# Of an advantage that is 0 but for rounding, beside the largest of its step.
_ROUNDING = 1e-9


class Push(NamedTuple):
    """Advantages of the dead groups on one side: their mean, lowest and highest over completions."""

    mean: float
    lowest: float
    highest: float


class Rule(NamedTuple):
    """Effect of one rule.

    Attributes:
        name: The rule.
        failed: Advantages of the groups that failed as a whole; None where there are none.
        passed: Of those that passed as a whole.
        relative: Mean ``|A|`` of dead groups over that of the others; None without dead groups, or others that get more
            than 0.
    """

    name: str
    failed: Push | None
    passed: Push | None
    relative: float | None


def compare_rules(rollouts: Rollouts, groups: Groups) -> tuple[Rule, ...]:
    """EBPO as published and with ``normalize="scale"``, and every other method of :func:`ebpo_core.advantages`.

    The rules see the file step by step, as in training; EBPO's prior runs through the steps. Methods without
    defaults are left out.
    """
    scored = np.flatnonzero(~np.isnan(rollouts.rewards))
    rewards, group_of = rollouts.rewards[scored], rollouts.groups[scored]
    # (rows,): whether a row's group is dead, and failed
    place = np.unique(group_of, return_inverse=True)[1].reshape(-1)
    dead, failed = groups.dead[place], groups.failed[place]
    step_of = groups.steps[place]
    order = np.argsort(step_of, kind="stable")
    steps = np.split(order, np.flatnonzero(np.diff(step_of[order])) + 1)

    published = EBPO()
    published._watch_prompts = False  # a file with one group in a step has a warning of the report's own
    rules: dict[str, Callable[[Vector, Codes], Any]] = {
        "ebpo": published,
        'ebpo, normalize="scale"': EBPO(normalize="scale"),
    }
    for method in get_args(Method):
        if method != "ebpo":
            rules[method] = partial(advantages, method=method)
    found = []
    for name, rule in rules.items():
        scores = np.zeros(len(rewards))
        try:
            for rows in steps:
                step = np.asarray(rule(rewards[rows], group_of[rows]))
                step[np.abs(step) < _ROUNDING * np.abs(step).max(initial=0.0)] = 0.0
                scores[rows] = step
        except (TypeError, ValueError):
            continue
        found.append(_describe(name, scores, dead, failed))
    return tuple(found)


def _describe(name: str, scores: Vector, dead: Mask, failed: Mask) -> Rule:
    def push(rows: Mask) -> Push | None:
        own = scores[rows]
        return Push(float(own.mean()), float(own.min()), float(own.max())) if own.size else None

    alive = float(np.abs(scores[~dead]).mean()) if (~dead).any() else 0.0
    relative = float(np.abs(scores[dead]).mean()) / alive if dead.any() and alive > 0 else None
    return Rule(name, push(dead & failed), push(dead & ~failed), relative)
