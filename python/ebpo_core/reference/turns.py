"""NumPy twin of trajectories and turns: plain loops over :class:`ebpo_core.reference.EBPO`, the oracle of the tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .estimator import EBPO, key_tuple
from .prior import Array


def by_trajectory(
    twin: EBPO, rewards: Array, groups: list[Any], trajectories: list[Any], mask: NDArray[np.bool_], **call: Any
) -> Array:
    """Advantages ``(N,)`` where the rows of a trajectory of a group count once and share what they get."""
    seen: dict[Any, int] = {}
    once = np.zeros(len(rewards), dtype=bool)
    for row, name in enumerate(zip(groups, trajectories, strict=True)):
        if mask[row] and name not in seen:
            seen[name], once[row] = row, True
    scored = twin(rewards, np.asarray(groups), mask=once, **call)
    names = zip(groups, trajectories, mask, strict=True)
    return np.array([scored[seen[group, name]] if kept else 0.0 for group, name, kept in names])


def returns_to_go(rewards: Array, names: list[Any], turns: list[int], gamma: float) -> Array:
    """``R_ik = sum over l >= k of gamma ** (l - k) * r_il``; ``0 ** 0`` is 1, and what is weighted 0 is not added."""
    returns = np.zeros(len(rewards))
    for row, (name, k) in enumerate(zip(names, turns, strict=True)):
        for later, (other, turn) in enumerate(zip(names, turns, strict=True)):
            if other == name and turn >= k and (turn == k or gamma > 0):
                returns[row] += gamma ** (turn - k) * rewards[later]
    return returns


def by_turn(
    twin: EBPO,
    rewards: Array,
    groups: list[Any],
    trajectories: list[Any],
    turns: list[int],
    mask: NDArray[np.bool_],
    *,
    gamma: float = 1.0,
    keys: list[Any] | None = None,
    **call: Any,
) -> Array:
    """Advantages ``(N,)`` of returns-to-go, whose groups are the cells (prompt, turn) and whose keys end in the turn.

    What the prior leaves out is a prompt with all its cells: a trajectory's other turns hold the same rewards.
    """
    returns = returns_to_go(rewards, list(zip(groups, trajectories, strict=True)), turns, gamma)
    cells = sorted(set(zip(groups, turns, strict=True)))
    index = np.array([cells.index(cell) for cell in zip(groups, turns, strict=True)])
    of_row = [()] * len(rewards) if keys is None else [key_tuple(key) for key in keys]
    by_row = [(*key, turn) for key, turn in zip(of_row, turns, strict=True)]
    return twin(returns, index, mask=mask, keys=by_row, prompts=[prompt for prompt, _ in cells], **call)
