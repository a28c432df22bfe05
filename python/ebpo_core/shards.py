"""One prior for several processes that each see one shard of every batch, over torch.distributed.

What travels is small: nine numbers for each prior and, where a batch is scored together, three for each group. Each
rank sends what the others do not know of yet, once, and puts what it receives together in the order of the ranks, so
that all of them hold the same bits afterwards. torch is imported here and nowhere else in the estimator.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple, cast

import numpy as np

from ebpo_core import _core
from ebpo_core.inputs import Batch
from ebpo_core.keys import Keys, Path


class Scoring(NamedTuple):
    """How a batch of all ranks is to be scored: the options, and the two arguments that every rank must agree on."""

    checked: _core.Options
    options: dict[str, Any]
    update: bool
    step: int | None


def gather(process_group: Any, payload: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """What every rank of the group sent, by rank, and this process's rank in it."""
    try:
        import torch.distributed as dist
    except ImportError as error:
        raise ImportError('several ranks need torch: pip install "ebpo-core[torch]"') from error
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "torch.distributed has no process group yet: call torch.distributed.init_process_group first, or leave "
            "out sync() and process_group= where one process sees every shard"
        )
    rank = dist.get_rank(process_group)
    if rank < 0:
        raise ValueError("process_group does not hold this process: pass a group that it belongs to")
    received: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(received, payload, group=process_group)
    return received, rank


def synchronise(state: _core.State, checked: _core.Options, options: dict[str, Any], process_group: Any) -> None:
    """Exchange what is new; see :meth:`ebpo_core.EBPO.sync`."""
    payload, changes = _payload(state, options)
    received, _ = gather(process_group, payload | {"call": "sync"})
    _check_agreement(received, options)
    state.exchange(checked, [one["share"] for one in received], changes)


def score_together(
    state: _core.State, scoring: Scoring, batch: Batch | Exception, keys: Keys | None, process_group: Any
) -> tuple[Any, Any, Any]:
    """Score this rank's shard as part of the batch of all ranks: its flat advantages, its vectors, the batch's scalars.

    ``batch`` may be the error of a rank whose shard cannot be read: the others must not wait for it for ever.
    """
    payload, changes = _payload(state, scoring.options)
    payload["call"] = ("score", scoring.update, scoring.step)
    error = batch if isinstance(batch, Exception) else None
    try:
        if not isinstance(batch, Exception):
            payload["groups"] = _groups(batch, keys)
    except (TypeError, ValueError) as refused:
        error = refused
    received, rank = gather(process_group, payload | {"error": None if error is None else str(error)})
    if error is not None:
        try:
            raise error
        finally:  # its traceback holds this frame: were the frame to hold it too, both would outlive the process group
            del error, batch
    shard = cast("Batch", batch)
    _check_agreement(received, scoring.options)

    shards = [one["groups"] for one in received]
    sizes = [len(one["statistics"][0]) for one in shards]
    statistics = tuple([value for one in shards for value in one["statistics"][field]] for field in range(3))
    lows, highs = zip(*(one["extremes"] for one in shards), strict=True)
    offset, scale, vectors, scalars = state.together(
        scoring.checked,
        [one["share"] for one in received],
        changes,
        statistics,  # type: ignore[arg-type]
        (float(np.nanmin(lows, initial=np.inf)), float(np.nanmax(highs, initial=-np.inf))),
        scoring.update,
        scoring.step,
        _joined([one["keys"] for one in shards], sizes),
    )
    start = sum(sizes[:rank])
    mine = slice(start, start + sizes[rank])
    flat = _core.apply_affine(shard.rewards, shard.groups, shard.mask, offset[mine].tolist(), scale[mine].tolist())
    shrinkage, baseline, count, blended = vectors
    own = None if blended is None else tuple(vector[mine] for vector in blended)
    return flat, (shrinkage[mine], baseline[mine], count[mine], own), scalars


def _payload(state: _core.State, options: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """What this rank tells in every exchange. What all ranks must have in common travels as a digest."""
    shared, share, changes = state.share()
    digest = hashlib.sha256(repr(shared).encode()).hexdigest()  # repr writes every bit of a float
    return {"options": options, "shared": digest, "share": share}, changes


def _groups(batch: Batch, keys: Keys | None) -> dict[str, Any]:
    statistics = [part.tolist() for part in _core.group_statistics(batch.rewards, batch.groups, batch.mask)]
    counted = batch.rewards[~np.isnan(batch.rewards) if batch.mask is None else batch.mask & ~np.isnan(batch.rewards)]
    extremes = (float(counted.min()), float(counted.max())) if counted.size else (np.nan, np.nan)
    return {
        "statistics": statistics,
        "extremes": extremes,
        "keys": None if keys is None else (keys.paths, keys.of_group.tolist()),
    }


def _joined(keys: list[tuple[list[Path], list[int]] | None], groups: list[int]) -> tuple[list[Path], Any] | None:
    """The keys of all ranks' groups; those of a rank that passed none are the root's."""
    if all(one is None for one in keys):
        return None
    paths: list[Path] = []
    of_group: list[int] = []
    for one, count in zip(keys, groups, strict=True):
        own, indices = ([[]], [0] * count) if one is None else one
        of_group += [len(paths) + index for index in indices]
        paths += own
    return paths, np.array(of_group, dtype=np.uint32)


def _check_agreement(received: list[dict[str, Any]], options: dict[str, Any]) -> None:
    """Raise on every rank alike where the ranks cannot be put together."""
    for rank, one in enumerate(received):
        if one.get("error") is not None:
            raise RuntimeError(f"rank {rank} could not score its shard, so no rank's prior changed: {one['error']}")
    for name, what, remedy in (
        ("call", "made different calls", "call the same method with the same update= and step= on every rank"),
        ("options", "have different options", "build the estimator alike on every rank"),
        (
            "shared",
            "started from different priors",
            "load one state on every rank; to save a state for all of them, call sync() first",
        ),
    ):
        values = [one[name] for one in received]
        odd = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if odd is not None:
            raise ValueError(f"ranks 0 and {odd} {what} ({values[0]!r} and {values[odd]!r}): {remedy}")
    ticks = [one["share"][1] for one in received]
    if options["decay"] < 1 and len(set(ticks)) > 1:
        raise ValueError(
            f"since the last sync the ranks made {ticks} updates; with decay={options['decay']} each must make as "
            "many, for an update is what time is counted in: call the estimator on every rank for every batch, also "
            "where a shard has no valid row"
        )
