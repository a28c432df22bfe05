"""Several real processes (gloo) that each see one shard hold the priors of one process that sees them all."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ebpo_core

pytest.importorskip("torch")

import sync_worker
from sync_worker import OPTIONS, STEPS, SYNC_EVERY, Shard, whole

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork (POSIX)")

CASES = [(options, keyed) for options in OPTIONS for keyed in (False, True)]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(Path(sync_worker.__file__)), str(request.param), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(request.param)]


def assert_close(got: Any, expected: Any, where: str = "state") -> None:
    """Equal to 1e-12, whatever the nesting."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for name in expected:
            assert_close(got[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert_close(a, b, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, rel=1e-12, abs=1e-14, nan_ok=True), where
    else:
        assert got == expected, where


@pytest.mark.parametrize(("options", "keyed"), CASES)
def test_synced_ranks_hold_the_prior_of_one_process(ranks: list[dict[str, Any]], options: str, keyed: bool) -> None:
    logs = [rank["lazily"][f"{options}{' keyed' * keyed}"] for rank in ranks]
    assert len(logs[0]["states"]) == STEPS // SYNC_EVERY == 4
    assert all(log["states"] == logs[0]["states"] for log in logs)  # to the bit
    assert all(all(log["scored with what the rank knew"]) for log in logs)
    one = ebpo_core.EBPO(**OPTIONS[options])
    for step in range(STEPS):
        one(**whole(step, len(ranks), keyed), step=step)
        if step % SYNC_EVERY == SYNC_EVERY - 1:
            assert_close(logs[0]["states"][step // SYNC_EVERY], one.state_dict())
    assert len(one.priors) >= 4 or not keyed


@pytest.mark.parametrize(("options", "keyed"), CASES)
def test_a_batch_scored_together_is_scored_as_one(ranks: list[dict[str, Any]], options: str, keyed: bool) -> None:
    logs = [rank["together"][f"{options}{' keyed' * keyed}"] for rank in ranks]
    one = ebpo_core.EBPO(**OPTIONS[options])
    for step in range(STEPS):
        batch = whole(step, len(ranks), keyed)
        expected = one(**batch, update=step != 6)
        if step == 4:
            continue
        entries = [next(entry for entry in log if entry["step"] == step) for log in logs]
        assert all(entry["state"] == entries[0]["state"] for entry in entries)
        assert_close(entries[0]["state"], one.state_dict())
        got = np.concatenate([entry["advantages"] for entry in entries])
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * max(1.0, np.abs(expected).max()))
        diagnostics = one.diagnostics
        assert diagnostics is not None
        for name in ("mu_glob", "sigma2", "tau2", "saturated_fail", "saturated_pass", "outlier"):
            for entry in entries:
                assert_close(entry[name], getattr(diagnostics, name), name)
        # The groups of one process are numbered by first appearance, as each rank's are.
        for name in ("shrinkage", "baseline", "count", "prior_mean"):
            joined = [value for entry in entries for value in entry[name]]
            assert_close(joined, getattr(diagnostics, name).tolist(), name)


def test_the_shards_are_what_they_should_be() -> None:
    shards = [[Shard(step, rank, 4) for rank in range(4)] for step in range(STEPS)]
    assert any(not shard.mask.any() for step in shards for shard in step)
    assert all(any(shard.mask.any() for shard in step) for step in shards)
    assert len({len(shard.rewards) for step in shards for shard in step}) > 3
    assert any(shard.keys is None for step in shards for shard in step)
    assert len({key for step in shards for shard in step for key in shard.keys or []}) == len(sync_worker.KEYS)


@pytest.mark.parametrize(
    ("name", "own", "others"),
    [
        ("infinite", "ValueError: rewards.0.*inf", "RuntimeError: rank 1 could not score its shard.*rewards.0.*inf"),
        (
            "shape",
            r"ValueError: rewards has shape \(1,\)",
            "RuntimeError: rank 1 could not score.*no rank's prior changed",
        ),
        *[
            (name, message, message)
            for name, message in (
                ("update", "ValueError: ranks 0 and 1 made different calls.*same update= and step="),
                ("step", "ValueError: ranks 0 and 1 made different calls"),
                ("options", "ValueError: ranks 0 and 1 have different options.*0.75"),
                ("max_keys", "ValueError: keys would make 2 priors.*max_keys=1"),
                ("max_keys together", "ValueError: keys would make 2 priors.*max_keys=1"),
                ("apart", "ValueError: ranks 0 and 1 started from different priors.*call sync.* first"),
                ("often", r"ValueError: since the last sync the ranks made \[1, 2.*decay=0.5"),
            )
        ],
    ],
)
def test_what_cannot_work_is_refused_on_every_rank(
    ranks: list[dict[str, Any]], name: str, own: str, others: str
) -> None:
    for rank, log in enumerate(ranks):
        assert re.match(own if rank == 1 else others, log["refusals"][name]), (rank, log["refusals"][name])


def test_a_group_of_some_ranks(ranks: list[dict[str, Any]]) -> None:
    assert [rank.get("pair") for rank in ranks] == [4.0, 4.0, None, None][: len(ranks)]


def test_without_a_process_group_the_error_says_so() -> None:
    ebpo = ebpo_core.EBPO()
    with pytest.raises(RuntimeError, match="init_process_group first, or leave out sync"):
        ebpo.sync()
    with pytest.raises(RuntimeError, match="no process group"):
        ebpo([[1.0, 0.0]], process_group=object())
    assert ebpo == ebpo_core.EBPO()


def test_a_group_of_one_and_what_counts_as_known(tmp_path: Path) -> None:
    """A loaded, copied or merged prior is known to all; here there is nobody else, so nothing is ever counted twice."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ebpo, one = ebpo_core.EBPO(decay=0.5), ebpo_core.EBPO(decay=0.5)
        for i in range(6):
            r = np.random.default_rng(i).random((3, 4))
            np.testing.assert_array_equal(ebpo(r, keys=["a", "b", i]), one(r, keys=["a", "b", i]))
            if i % 2:
                ebpo.sync()
                assert_close(ebpo.state_dict(), one.state_dict())
                one.load_state_dict(ebpo.state_dict())  # the same bits from here on
            else:
                ebpo = pickle.loads(pickle.dumps(ebpo))
            start = ebpo_core.Prior()
            start.update(r)
            ebpo.merge(start)
            one.merge(start)
        ebpo.sync()
        assert_close(ebpo.state_dict(), one.state_dict())
        before = ebpo.state_dict()
        ebpo.sync(dist.group.WORLD)
        assert ebpo.state_dict() == before
    finally:
        dist.destroy_process_group()


def test_a_refused_batch_leaves_nothing_behind(tmp_path: Path) -> None:
    """An error and its frames that hold each other would keep gloo's threads running until the interpreter ends."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            ebpo_core.EBPO()([[1.0, float("inf")]], process_group=dist.group.WORLD)
            raise AssertionError("an infinite reward passed")
        left = [one for one in gc.get_objects() if type(one) is ValueError and "inf" in str(one)]
        assert left == []
    finally:
        gc.enable()
        dist.destroy_process_group()
