"""Rows of trajectories: one outcome that counts once, or a reward at each turn and its return-to-go.

A trajectory is one completion of a prompt, and may be several rows of a batch. Without ``turns`` its rows share one
outcome: the first that counts stands for all, and what it gets is given to each. With ``turns`` row (i, k) is turn k of
trajectory i, and::

    R_ik = sum over l >= k of gamma ** (l - k) * r_il      return-to-go
    A_ik = R_ik - V                                        V from the cell (prompt, k) and the prior of k

so the rows handed to the core are the returns, their groups the cells, and their keys end in k.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebpo_core import _core
from ebpo_core.arguments import real
from ebpo_core.inputs import MAX_REWARD, Batch, group_codes, integers, read_batch, round_to
from ebpo_core.keys import Keys, Path, read_keys


def read_rows(
    rewards: Any, groups: Any, mask: Any, keys: Any, trajectories: Any = None, turns: Any = None, gamma: Any = 1.0
) -> tuple[Batch, Keys | None]:
    """A call's rows and keys as the core reads them; the arguments are those of :meth:`ebpo_core.EBPO.__call__`.

    Raises:
        TypeError, ValueError: names the argument, the rows and the remedy.
    """
    batch = read_batch(rewards, groups, mask)
    read = read_keys(keys, batch.groups, batch.rewards.size)
    gamma = real("gamma", gamma)
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma={gamma!r}: expected a number in [0, 1]")
    if turns is None and gamma != 1.0:
        raise ValueError(f"gamma={gamma!r} was given without turns, whose rewards it discounts: pass turns=")
    if trajectories is None:
        if turns is not None:
            raise ValueError("turns was given without trajectories: name the trajectory of each row, too")
        return batch, read
    if isinstance(batch.groups, int):
        raise ValueError(
            "trajectories was given with a matrix of rewards, in which every row is a group: pass 1-D rewards, and "
            "name each reward's prompt with groups="
        )
    prompts, _ = batch.groups
    named, count = group_codes(trajectories, batch.rewards.size, "trajectories")
    # An id names a trajectory of its prompt: 0, 1, ... may be used again in the next.
    codes, units = _core.codes_of_ints(prompts.astype(np.int64) * count + named)
    if turns is None:
        return _counted_once(batch, codes, units), read
    return _by_turn(batch, prompts, read, codes, integers("turns", turns, batch.rewards.size), gamma)


def _counted_once(batch: Batch, codes: NDArray[np.uint32], units: int) -> Batch:
    """The batch in which the first row of each trajectory that the mask keeps stands for all of them."""
    rows = np.arange(codes.size)
    kept = np.ones(codes.size, dtype=bool) if batch.mask is None else batch.mask
    first = np.zeros(units, dtype=np.int64)
    first[codes[kept][::-1]] = rows[kept][::-1]  # of several the one assigned last stays
    stands = first[codes]
    own, outcome = batch.rewards, batch.rewards[stands]
    same = (own == outcome) | (np.isnan(own) & np.isnan(outcome))
    odd = np.flatnonzero(kept & ~same)
    if odd.size:
        row, other = int(odd[0]), int(stands[odd[0]])
        raise ValueError(
            f"rewards[{row}] is {own[row]} and rewards[{other}] is {own[other]}, but both rows are of one trajectory: "
            "give each of its rows the outcome, or leave rows out with mask=; a reward at each turn needs turns="
        )

    def restore(flat: NDArray[Any]) -> Any:
        return batch.restore(np.where(kept, flat[stands], flat.dtype.type(0)))

    return Batch(own, batch.groups, kept & (stands == rows), restore)


def _by_turn(
    batch: Batch,
    prompts: NDArray[np.uint32],
    keys: Keys | None,
    codes: NDArray[np.uint32],
    turns: NDArray[np.int64],
    gamma: float,
) -> tuple[Batch, Keys]:
    """Returns-to-go in the place of rewards, cells (prompt, turn) in that of groups, and keys that end in the turn."""
    infinite = np.flatnonzero(np.isinf(batch.rewards))
    if infinite.size:  # a row that the mask leaves out is still in the returns of the turns before it
        row = int(infinite[0])
        raise ValueError(
            f"rewards[{row}] is {batch.rewards[row]}: the reward of a turn must be finite, or NaN where it is unknown"
        )
    returns = returns_to_go(batch.rewards, codes, turns, gamma)
    large = np.flatnonzero(np.abs(returns) > MAX_REWARD)
    if large.size:
        row = int(large[0])
        raise ValueError(f"the return from rewards[{row}] on is {returns[row]}: its magnitude must be at most 1e140")
    kinds, kind = np.unique(turns, return_inverse=True)
    cells, count = _core.codes_of_ints(prompts.astype(np.int64) * kinds.size + kind.reshape(-1))
    first = np.zeros(count, dtype=np.int64)
    first[cells[::-1]] = np.arange(cells.size)[::-1]
    prompt, turn = prompts[first], kind.reshape(-1)[first]
    of_prompt = np.zeros(prompt.size, dtype=np.int64) if keys is None else keys.of_group[prompt].astype(np.int64)
    above: list[Path] = [()] if keys is None else keys.paths
    pairs, of_cell = np.unique(of_prompt * kinds.size + turn, return_inverse=True)
    paths = [(*above[pair // kinds.size], int(kinds[pair % kinds.size])) for pair in pairs]
    work = batch.rewards.dtype

    def restore(flat: NDArray[Any]) -> Any:
        return batch.restore(round_to(flat, work))

    read = Keys(paths, of_cell.reshape(-1).astype(np.uint32), np.ascontiguousarray(prompt))
    return Batch(returns, (cells, count), batch.mask, restore), read


def returns_to_go(
    rewards: NDArray[Any], trajectories: NDArray[np.uint32], turns: NDArray[np.int64], gamma: float
) -> NDArray[np.float64]:
    """``sum over l >= k of gamma ** (l - k) * r_l`` of each row, float64 ``(N,)``.

    A turn without a row has no reward; NaN makes its own return unknown, NaN, and those of the turns before it.

    Args:
        rewards: ``(N,)`` of any float dtype.
        trajectories: ``(N,)`` codes.
        turns: ``(N,)``, at most one row for each turn of a trajectory.
        gamma: Discount, in [0, 1].

    Raises:
        ValueError: a trajectory has a turn twice.
    """
    order = np.lexsort((turns, trajectories))
    unit, turn = trajectories[order], turns[order]
    follows = np.zeros(order.size, dtype=bool)  # the next row is the next turn of the same trajectory
    follows[:-1] = unit[1:] == unit[:-1]
    twice = np.flatnonzero(follows[:-1] & (turn[1:] == turn[:-1]))
    if twice.size:
        row, other = sorted((int(order[twice[0]]), int(order[twice[0] + 1])))
        raise ValueError(
            f"rows {row} and {other} are both turn {turns[row]} of one trajectory: number the turns of a trajectory in "
            "the order they were taken"
        )
    total = rewards[order].astype(np.float64)
    if gamma == 0.0:
        follows[:] = False
    weight = np.zeros(order.size)
    weight[:-1] = gamma ** np.where(follows[:-1], turn[1:] - turn[:-1], 0)
    # From the last turns to the first: all the trajectories' turns that have d after them at once.
    ends = np.flatnonzero(~follows)
    after = ends[np.searchsorted(ends, np.arange(order.size))] - np.arange(order.size)
    by_distance = np.argsort(after, kind="stable")
    bounds = np.cumsum(np.bincount(after))
    for start, stop in pairwise(bounds):
        rows = by_distance[start:stop]
        total[rows] += weight[rows] * total[rows + 1]
    returns = np.empty(order.size)
    returns[order] = total
    return returns
