"""One batch of several ranks: each passes its shard, and every rank scores all of them, joined in rank order.

Over torch.distributed travel the rewards, group codes, masks and keys of a shard, or the error that it cannot
be scored with. Every rank then computes what one process would that sees the whole batch, to the bit, and takes its own
slice. torch is imported here and nowhere else in the estimator.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ebpo_core.inputs import Groups
from ebpo_core.keys import Keys, Path


class Shard(NamedTuple):
    """One rank's rows, as the core reads them, or a whole batch made of such."""

    rewards: NDArray[Any]
    groups: Groups
    mask: NDArray[np.bool_] | None
    keys: Keys | None

    @property
    def group_count(self) -> int:
        """Number of groups, those without a valid row included."""
        return self.rewards.size // self.groups if isinstance(self.groups, int) else self.groups[1]


def gather(
    shard: Shard | Exception, common: dict[str, tuple[Any, str]], process_group: Any
) -> tuple[Shard, slice, slice]:
    """The batch of all ranks, and the slices of its rows and of its groups that are this rank's.

    Args:
        shard: This rank's rows, or the error that they cannot be scored with: the others must not wait for ever.
        common: Things that all ranks must have in common, by name: the value, and the remedy where it differs.
        process_group: A torch.distributed process group that holds this process.

    Raises:
        RuntimeError: another rank has an error, or there is no process group.
        ValueError: the ranks differ in something of ``common``, or ``process_group`` does not hold this process.
        Exception: ``shard`` itself, if it is one.
    """
    error = shard if isinstance(shard, Exception) else None
    told = {
        "error": None if error is None else str(error),
        "shard": None if error is not None else shard,
        "common": {name: value for name, (value, _) in common.items()},
    }
    received, rank = _all_gather(told, process_group)
    if error is not None:
        try:
            raise error
        finally:  # its traceback holds this frame: were the frame to hold it too, both would outlive the process group
            del error, shard, told
    for other, one in enumerate(received):
        if one["error"] is not None:
            raise RuntimeError(f"rank {other} could not score its shard, so no rank's prior changed: {one['error']}")
    for name, (_, remedy) in common.items():
        values = [one["common"][name] for one in received]
        odd = next((other for other, value in enumerate(values) if value != values[0]), None)
        if odd is not None:
            raise ValueError(f"ranks 0 and {odd} have different {name} ({values[0]!r} and {values[odd]!r}): {remedy}")
    shards: list[Shard] = [one["shard"] for one in received]
    rows = np.cumsum([0, *(one.rewards.size for one in shards)])
    groups = np.cumsum([0, *(one.group_count for one in shards)])
    return _join(shards), slice(rows[rank], rows[rank + 1]), slice(groups[rank], groups[rank + 1])


def _join(shards: list[Shard]) -> Shard:
    """The shards as one batch; equal ids of different ranks are different groups."""
    rewards = np.concatenate([one.rewards for one in shards])  # float64 where one rank's are
    sizes = {one.groups for one in shards if isinstance(one.groups, int)}
    groups: Groups
    if len(sizes) == 1 and all(isinstance(one.groups, int) for one in shards):
        groups = sizes.pop()
    else:
        groups = _joined_codes(shards), sum(one.group_count for one in shards)
    mask = None
    if any(one.mask is not None for one in shards):
        mask = np.concatenate([np.ones(one.rewards.size, bool) if one.mask is None else one.mask for one in shards])
    return Shard(rewards, groups, mask, _joined_keys(shards))


def _joined_codes(shards: list[Shard]) -> NDArray[np.uint32]:
    """The group of each row, the groups of a rank counted on from those of the rank before."""
    codes, before = [], 0
    for one in shards:
        own = np.repeat(np.arange(one.group_count), one.groups) if isinstance(one.groups, int) else one.groups[0]
        codes.append(own.astype(np.uint32) + np.uint32(before))
        before += one.group_count
    return np.concatenate(codes)


def _joined_keys(shards: list[Shard]) -> Keys | None:
    """The keys of all groups; those of a rank that passed none are the root's."""
    if all(one.keys is None for one in shards):
        return None
    paths: list[Path] = []
    of_group, prompts, before = [], [], 0
    for one in shards:
        own = Keys([()], np.zeros(one.group_count, np.uint32)) if one.keys is None else one.keys
        of_group.append(own.of_group + np.uint32(len(paths)))
        paths += own.paths
        if own.prompts is not None:
            prompts.append(own.prompts + np.uint32(before))
        before += one.group_count
    return Keys(paths, np.concatenate(of_group), np.concatenate(prompts) if prompts else None)


def _all_gather(told: Any, process_group: Any) -> tuple[list[Any], int]:
    """The objects that the ranks of the group told, by rank, and this process's rank in it."""
    try:
        import torch.distributed as dist
    except ImportError as error:
        raise ImportError('process_group= needs torch: pip install "ebpo-core[torch]"') from error
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "torch.distributed has no process group yet: call torch.distributed.init_process_group first, or leave "
            "out process_group= where one process sees the whole batch"
        )
    rank = dist.get_rank(process_group)
    if rank < 0:
        raise ValueError("process_group does not hold this process: pass a group that it belongs to")
    received: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(received, told, group=process_group)
    return received, rank
