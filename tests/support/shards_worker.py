"""Shards of batches, and the processes that see one shard each: ``python tests/support/shards_worker.py RANKS FOLDER``.

The ranks are forked, since importing torch takes longer than all they do, and write what the tests compare to
``FOLDER/rank_<rank>.json``.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

import ebpo_core

STEPS = 9
KEYS = ["a", ("a", 1), ("a", 2), None, "b", ("b", "x", 3)]

OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "decay": {"decay": 0.8},
    "refined": {"sigma2": "within", "tau2": "debiased", "leave_one_out": True, "decay": 0.9, "normalize": "scale"},
    "before": {"score": "before", "kappa": 1.0, "norm_ddof": 0},
    "fixed": {"shrinkage": 0.5, "decay": 0.9},
    "turns": {"leave_one_out": "row", "normalize": "none", "decay": 0.9},  # the one whose rows are turns
}


class Shard:
    """One rank's part of a batch: whole groups of 1 to 5 rows, shuffled, some rows masked, one key a group."""

    def __init__(self, step: int, rank: int, ranks: int) -> None:
        rng = np.random.default_rng([step, rank])
        sizes = rng.integers(1, 6, rng.integers(1, 5))  # uneven shards of uneven groups
        self.groups = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
        self.rewards = rng.random(len(self.groups))
        empty = step % 3 == 1 and rank == step % ranks  # nothing on this rank counts; another has something
        self.mask = np.zeros(len(self.groups), dtype=bool) if empty else rng.random(len(self.groups)) < 0.9
        self.mask[0] |= not empty
        place = np.array([np.count_nonzero(self.groups[:row] == group) for row, group in enumerate(self.groups)])
        self.trajectories, self.turns = place // 2, place % 2  # the last one of a group may have one turn
        # Ranks see different keys: each knows half of them, and the first one none at all at times.
        of_group = [KEYS[i] for i in (rng.integers(0, 3, len(sizes)) + rank) % len(KEYS)]
        self.keys = None if rank == 0 and step % 2 else [of_group[group] for group in self.groups]

    def args(self, keyed: bool, turns: bool) -> dict[str, Any]:
        call: dict[str, Any] = {"rewards": self.rewards, "groups": self.groups, "mask": self.mask}
        call |= {"trajectories": self.trajectories, "turns": self.turns, "gamma": 0.5} if turns else {}
        return call | {"keys": self.keys} if keyed else call


def whole(step: int, ranks: int, keyed: bool, turns: bool) -> dict[str, Any]:
    """The batch of which the ranks see shards, as one process would pass it."""
    shards = [Shard(step, rank, ranks) for rank in range(ranks)]
    keys = [key for shard in shards for key in (shard.keys or [None] * len(shard.rewards))]
    call: dict[str, Any] = {
        "rewards": np.concatenate([shard.rewards for shard in shards]),
        "groups": np.concatenate([100 * rank + shard.groups for rank, shard in enumerate(shards)]),
        "mask": np.concatenate([shard.mask for shard in shards]),
    }
    if turns:
        call["trajectories"] = np.concatenate([shard.trajectories for shard in shards])
        call |= {"turns": np.concatenate([shard.turns for shard in shards]), "gamma": 0.5}
    return call | {"keys": keys} if keyed else call


def together(rank: int, ranks: int, name: str, keyed: bool, group: Any) -> list[dict[str, Any]]:
    """Score with every shard; one step is evaluation, and every other one is retried, which is not counted."""
    ebpo = ebpo_core.EBPO(**OPTIONS[name])
    log = []
    for step in range(STEPS):
        shard = Shard(step, rank, ranks).args(keyed, name == "turns")
        advantages = ebpo(**shard, update=step != 6, step=step, process_group=group)
        diagnostics = ebpo.diagnostics
        assert diagnostics is not None
        entry: dict[str, Any] = {"step": step, "advantages": advantages.tolist(), "state": ebpo.state_dict()}
        for number in ("mu_glob", "sigma2", "tau2", "saturated_fail", "saturated_pass", "outlier", "dead_advantage"):
            entry[number] = getattr(diagnostics, number)
        for vector in ("shrinkage", "baseline", "count", "prior_mean"):
            entry[vector] = getattr(diagnostics, vector).tolist()
        log.append(entry)
        if step % 2:
            ebpo(**shard, step=step, process_group=group)
            ebpo(**shard, update=False)  # alone, which no other rank need know of
            assert ebpo.state_dict() == entry["state"]
    return log


def mixed(rank: int, ranks: int, group: Any) -> dict[str, Any]:
    """Shards of other forms than their neighbours': a float32 tensor, a matrix of float64, a rank without a row."""
    import torch

    ebpo = ebpo_core.EBPO(normalize="none")
    top = float(np.finfo(np.float32).max)
    if rank == 0:
        scored = ebpo(torch.tensor([[top, -top, -top]]), process_group=group)
    elif rank == 1:
        scored = ebpo(np.array([[1.0, 0.0], [0.0, 0.0]]), mask=[[True, True], [True, False]], process_group=group)
    else:
        scored = ebpo([[float("nan")]], process_group=group)
    return {
        "type": type(scored).__name__,
        "dtype": str(getattr(scored, "dtype", None)),
        "scored": np.asarray(scored).tolist(),
    }


def refusals(rank: int, group: Any) -> dict[str, Any]:
    """What each rank gets to see of calls that cannot work, and whether its priors stayed as they were."""
    log: dict[str, Any] = {}

    def attempt(name: str, ebpo: ebpo_core.EBPO, call: Any) -> None:
        before = ebpo.state_dict()
        try:
            call(ebpo)
            log[name] = "no error"
        except (ValueError, TypeError, RuntimeError) as error:
            log[name] = f"{type(error).__name__}: {error}"
        assert ebpo.state_dict() == before, name

    def seen(**options: Any) -> ebpo_core.EBPO:
        ebpo = ebpo_core.EBPO(**options)
        ebpo([[1.0, 0.0]])
        return ebpo

    bad = [[np.inf if rank == 1 else 1.0, 0.0]]
    attempt("infinite", seen(), lambda e: e(bad, process_group=group))
    attempt("shape", seen(), lambda e: e([1.0] if rank == 1 else [[1.0, 0.0]], process_group=group))
    attempt("update", seen(), lambda e: e([[1.0, 0.0]], update=rank == 0, process_group=group))
    attempt("step", seen(), lambda e: e([[1.0, 0.0]], step=rank, process_group=group))
    attempt("options", seen(decay=1.0 - rank / 4), lambda e: e([[1.0, 0.0]], process_group=group))
    keys = [f"key {min(rank, 1)}"]  # each of them has room for its own, none for both
    attempt("max_keys", seen(max_keys=1), lambda e: e([[1.0, 0.0]], keys=keys, process_group=group))
    apart = seen()
    apart([[float(rank), 0.0]])
    attempt("apart", apart, lambda e: e([[1.0, 0.0]], process_group=group))
    attempt("update type", seen(), lambda e: e([[1.0, 0.0]], update=1 if rank == 1 else True, process_group=group))
    rows: dict[str, Any] = {"rewards": [1.0, 0.0], "groups": [0, 0], "trajectories": [0, 0]}
    turns = [1, 2] if rank == 1 else None
    rewards = [1.0, 0.0] if rank == 1 else [1.0, 1.0]
    plain = seen(normalize="none")
    attempt("turns", plain, lambda e: e(**(rows | {"rewards": rewards}), turns=turns, process_group=group))
    attempt("gamma", plain, lambda e: e(**rows, turns=[1, 2], gamma=1.0 - rank / 4, process_group=group))
    attempt("keys", seen(), lambda e: e([[1.0, 0.0]], keys=["a"] * (1 + (rank == 1)), process_group=group))
    return log


def run(rank: int, ranks: int, folder: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    log: dict[str, Any] = {"together": {}, "mixed": mixed(rank, ranks, dist.group.WORLD)}
    for name in OPTIONS:
        for keyed in (False, True):
            case = f"{name}{' keyed' * keyed}"
            log["together"][case] = together(rank, ranks, name, keyed, dist.group.WORLD)
    log["refusals"] = refusals(rank, dist.group.WORLD)
    pair = dist.new_group([0, 1])
    if rank < 2:  # a group of its own, with ranks that the others do not wait for
        ebpo = ebpo_core.EBPO()
        ebpo([[float(rank), 1.0]], process_group=pair)
        log["pair"] = ebpo.prior.count
    (folder / f"rank_{rank}.json").write_text(json.dumps(log), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def main(ranks: int, folder: Path) -> None:
    import torch.distributed  # noqa: F401  # once, before the forks

    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            try:
                run(rank, ranks, folder)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    failed = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(any(failed))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
