"""Work that the processes of one training run share; in a single process every call is a plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, number of ranks) of torch's process group; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def everywhere(function: Callable[[], T]) -> list[T]:
    """Results of ``function`` by rank, on every rank. Where one rank fails all do, so that none waits for it.

    Raises:
        Exception: what ``function`` raised on this rank.
        RuntimeError: another rank failed; its error is quoted.
    """
    rank, ranks = world()
    if ranks == 1:
        return [function()]
    result: T | None = None
    failed: Exception | None = None
    try:
        result = function()
    except Exception as error:
        failed = error
    outcomes: list[Any] = [None] * ranks
    message = None if failed is None else f"rank {rank} failed: {type(failed).__name__}: {failed}"
    dist.all_gather_object(outcomes, (result, message))
    if failed is not None:
        raise failed
    for _, message in outcomes:
        if message is not None:
            raise RuntimeError(message)
    return [result for result, _ in outcomes]


def on_main(function: Callable[[], T]) -> T:
    """Result of ``function``, run on rank 0 alone, on every rank; errors as in :func:`everywhere`."""
    rank, _ = world()
    results: list[Any] = everywhere(lambda: function() if rank == 0 else None)
    result: T = results[0]
    return result
