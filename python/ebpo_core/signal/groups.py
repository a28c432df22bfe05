"""Groups of a file of rollouts as numbers: sizes, means, which are dead, and how often each value of reward occurs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ebpo_core.signal.cells import Codes, Vector
from ebpo_core.signal.rollouts import Rollouts

Mask = NDArray[np.bool_]

# Values of a graded reward that are followed one by one; the others are followed together.
_SEPARATE = 8


class Level(NamedTuple):
    """A value of the reward at which a group can be dead, and how often each group has it.

    Attributes:
        value: The value; None stands for the rarer values on one side of the mean, of which each group's most frequent
            one is counted.
        failed: True where a group dead at this value has failed, as in :attr:`ebpo_core.Diagnostics.saturated_fail`.
        hits: (M,) int64.
    """

    value: float | None
    failed: bool
    hits: Codes


@dataclass(frozen=True, eq=False)
class Groups:
    """The M groups with at least one scored completion.

    A group is *dead* where it has at least two scored completions and all its rewards are equal: r - mean is then 0 for
    all. Dead groups below the mean reward of the file have *failed*, the others *passed* (at the mean: by the sign).

    Attributes:
        sizes: (M,) int64 scored completions.
        means: (M,) float64.
        squares: (M,) float64, the sum of squared deviations from the group's mean.
        dead: (M,) bool.
        failed: (M,) bool, of the dead ones.
        prompts: (M,) int64 codes; the group's own where the file has no prompts.
        steps: (M,) int64 codes.
        mean: Mean of all rewards.
        lowest, highest: Of all rewards.
        distinct: Number of different rewards.
        levels: See :class:`Level`. Empty if no two completions of a group have the same reward.
    """

    sizes: Codes
    means: Vector
    squares: Vector
    dead: Mask
    failed: Mask
    prompts: Codes
    steps: Codes
    mean: float
    lowest: float
    highest: float
    distinct: int
    levels: tuple[Level, ...]

    @property
    def paired(self) -> Mask:
        """(M,) True for the groups of at least two, which alone can have a signal."""
        return self.sizes >= 2


def group_rewards(rollouts: Rollouts) -> Groups:
    """Sum up the groups of a file.

    Raises:
        ValueError: No completion has a reward.
    """
    scored = ~np.isnan(rollouts.rewards)
    if not scored.any():
        raise ValueError("every reward is missing (NaN or null): the reward function scores nothing; mend it first")
    rewards = rollouts.rewards[scored]
    group_of = np.unique(rollouts.groups[scored], return_inverse=True)[1].reshape(-1)
    count = int(group_of.max()) + 1
    first = np.zeros(count, dtype=np.int64)  # a row of each group
    first[group_of[::-1]] = np.flatnonzero(scored)[::-1]

    values, value_of = np.unique(rewards, return_inverse=True)
    value_of = value_of.reshape(-1)
    sizes = np.bincount(group_of, minlength=count)
    # Around one reward of the group itself, so that equal rewards have exactly no spread.
    shifted = rewards - rollouts.rewards[first][group_of]
    shift = np.bincount(group_of, shifted, count) / sizes
    squares = np.bincount(group_of, weights=(shifted - shift[group_of]) ** 2, minlength=count).astype(np.float64)
    means = rollouts.rewards[first] + shift
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(low, group_of, rewards)
    np.maximum.at(high, group_of, rewards)
    dead = (sizes >= 2) & (low == high)
    mean = float(rewards.mean())
    return Groups(
        sizes=sizes,
        means=means,
        squares=squares,
        dead=dead,
        failed=dead & _fails(low, mean),
        prompts=(rollouts.groups if rollouts.prompts is None else rollouts.prompts)[first],
        steps=rollouts.steps[first],
        mean=mean,
        lowest=float(values[0]),
        highest=float(values[-1]),
        distinct=len(values),
        levels=_levels(group_of, value_of, values, count, mean),
    )


def _fails(values: Vector, mean: float) -> Mask:
    return np.asarray((values < mean) | ((values == mean) & (values <= 0)))


def _levels(group_of: Codes, value_of: Codes, values: Vector, count: int, mean: float) -> tuple[Level, ...]:
    """The values that some group has twice, the most frequent apart, the rest in two."""
    # A cell for each pair of group and value that occurs, with its number of completions.
    cells, hits = np.unique(group_of * len(values) + value_of, return_counts=True)
    cell_group, cell_value = np.divmod(cells, len(values))
    pairs = np.bincount(cell_value, hits * (hits - 1) / 2, len(values))
    # Two values in all are one rate seen from both sides, whether or not either has come twice.
    tied = np.arange(len(values)) if len(values) <= 2 else np.flatnonzero(pairs)
    separate = tied[np.argsort(-pairs[tied], kind="stable")[:_SEPARATE]]
    failed = _fails(values, mean)

    levels = []
    for value in np.sort(separate):
        mine = cell_value == value
        of_group = np.zeros(count, dtype=np.int64)
        of_group[cell_group[mine]] = hits[mine]
        levels.append(Level(float(values[value]), bool(failed[value]), of_group))
    rest = np.isin(cell_value, np.setdiff1d(tied, separate)) & (hits >= 2)
    for side in (True, False):
        mine = rest & (failed[cell_value] == side)
        if mine.any():
            of_group = np.zeros(count, dtype=np.int64)
            np.maximum.at(of_group, cell_group[mine], hits[mine])
            levels.append(Level(None, side, of_group))
    return tuple(levels)
