"""One data-parallel worker of ``test_integrations_areal``: ``areal_worker.py RANK WORLD STORE OUT``, over gloo."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from ebpo_core import EBPO
from ebpo_core.integrations.areal import EBPONorm


def batch(step: int) -> tuple[np.ndarray, list[int]]:
    """Scores and group sizes of the whole batch: uneven groups, the first saturated."""
    rng = np.random.default_rng(step)
    sizes = [4, 2, 3, 4, 1, 4]
    scores = rng.choice([0.0, 0.5, 1.0], sum(sizes))
    scores[:4] = 0.0
    return scores.astype(np.float32), sizes


def share(step: int, rank: int, world: int) -> tuple[np.ndarray, list[int]]:
    """The groups of one worker: a third, or two thirds, of the batch."""
    scores, sizes = batch(step)
    if world == 1:
        return scores, sizes
    cut = 2
    rows = sum(sizes[:cut])
    return (scores[:rows], sizes[:cut]) if rank == 0 else (scores[rows:], sizes[cut:])


def main() -> None:
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world)
    ebpo = EBPO()
    group = dist.group.WORLD if world > 1 else None
    norm = EBPONorm(ebpo, group_size=4, engine=SimpleNamespace(data_parallel_group=group))
    advantages = []
    for step in range(3):
        scores, sizes = share(step, rank, world)
        advantages.append(norm(torch.from_numpy(scores), group_sizes=sizes).tolist())
    refused = ""
    try:  # one worker's share does not fit: all must say so, none may wait
        norm(torch.zeros(4 if rank else 5), group_sizes=[4])
    except (ValueError, RuntimeError) as error:
        refused = f"{type(error).__name__}: {error}"
    with open(sys.argv[4], "w", encoding="utf-8") as file:  # noqa: PTH123
        json.dump({"advantages": advantages, "prior": ebpo.prior.state_dict(), "refused": refused}, file)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
