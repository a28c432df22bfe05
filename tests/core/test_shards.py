"""Several real processes (gloo) that each pass one shard of a batch score as one process that sees them all."""

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

import shards_worker
from shards_worker import OPTIONS, STEPS, Shard, whole

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork (POSIX)")

CASES = [(options, keyed) for options in OPTIONS for keyed in (False, True)]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(Path(shards_worker.__file__)), str(request.param), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize(("options", "keyed"), CASES)
def test_a_batch_scored_together_is_scored_as_one(ranks: list[dict[str, Any]], options: str, keyed: bool) -> None:
    logs = [rank["together"][f"{options}{' keyed' * keyed}"] for rank in ranks]
    one = ebpo_core.EBPO(**OPTIONS[options])
    for step in range(STEPS):
        batch = whole(step, len(ranks), keyed, options == "turns")
        expected = one(**batch, update=step != 6, step=step)
        entries = [next(entry for entry in log if entry["step"] == step) for log in logs]
        assert all(entry["state"] == one.state_dict() for entry in entries)  # to the bit
        np.testing.assert_array_equal(np.concatenate([entry["advantages"] for entry in entries]), expected)
        diagnostics = one.diagnostics
        assert diagnostics is not None
        for name in ("mu_glob", "sigma2", "tau2", "saturated_fail", "saturated_pass", "outlier", "dead_advantage"):
            for entry in entries:
                np.testing.assert_array_equal(entry[name], getattr(diagnostics, name), name)
        # The groups of one process are numbered by first appearance, as each rank's are.
        for name in ("shrinkage", "baseline", "count", "prior_mean"):
            joined = [value for entry in entries for value in entry[name]]
            np.testing.assert_array_equal(joined, getattr(diagnostics, name), name)
    assert len(one.priors) >= 4 or not keyed


def test_shards_of_different_forms_are_one_batch(ranks: list[dict[str, Any]]) -> None:
    top = float(np.finfo(np.float32).max)
    rows, groups = [top, -top, -top, 1.0, 0.0, 0.0], [0, 0, 0, 1, 1, 2]
    expected = ebpo_core.EBPO(normalize="none")(rows, groups)
    first, second = ranks[0]["mixed"], ranks[1]["mixed"]
    assert (first["type"], first["dtype"]) == ("Tensor", "torch.float32")
    assert (second["type"], second["dtype"]) == ("ndarray", "float64")
    # An advantage beyond the range of float32 saturates, where one process would keep it in float64.
    np.testing.assert_allclose(first["scored"][0], np.clip(expected[:3], -top, top), rtol=1e-6)
    np.testing.assert_allclose(np.ravel(second["scored"]), [*expected[3:], 0.0], rtol=1e-12)
    assert all(rank["mixed"]["scored"] == [[0.0]] for rank in ranks[2:])


def test_the_shards_are_what_they_should_be() -> None:
    shards = [[Shard(step, rank, 4) for rank in range(4)] for step in range(STEPS)]
    assert any(not shard.mask.any() for step in shards for shard in step)
    assert all(any(shard.mask.any() for shard in step) for step in shards)
    assert len({len(shard.rewards) for step in shards for shard in step}) > 3
    assert any(shard.keys is None for step in shards for shard in step)
    assert len({key for step in shards for shard in step for key in shard.keys or []}) == len(shards_worker.KEYS)


@pytest.mark.parametrize(
    ("name", "own", "others"),
    [
        ("infinite", "ValueError: rewards.0.*inf", "RuntimeError: rank 1 could not score its shard.*rewards.0.*inf"),
        (
            "shape",
            r"ValueError: rewards has shape \(1,\)",
            "RuntimeError: rank 1 could not score.*no rank's prior changed",
        ),
        ("update type", "TypeError: update=1", "RuntimeError: rank 1 could not score its shard.*update=1"),
        ("keys", "ValueError: keys has length 2", "RuntimeError: rank 1 could not score its shard.*keys has length 2"),
        *[
            (name, message, message)
            for name, message in (
                (
                    "update",
                    r"ValueError: ranks 0 and 1 have different arguments update= and step= .*same ones on every",
                ),
                ("step", r"ValueError: ranks 0 and 1 have different arguments update= and step= \(\(True, 0\)"),
                ("turns", "ValueError: ranks 0 and 1 have different argument turns= .*on every rank, or on none"),
                ("gamma", r"ValueError: ranks 0 and 1 have different argument gamma= \(1.0 and 0.75\)"),
                ("options", "ValueError: ranks 0 and 1 have different options.*0.75.*alike on every rank"),
                ("max_keys", "ValueError: keys would make 2 priors.*max_keys=1"),
                ("apart", "ValueError: ranks 0 and 1 have different priors.*load one state on every rank"),
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
    with pytest.raises(
        RuntimeError, match="no process group yet.*init_process_group first, or leave out process_group="
    ):
        ebpo([[1.0, 0.0]], process_group=object())
    assert ebpo == ebpo_core.EBPO()


def test_a_group_of_one_is_a_plain_call(tmp_path: Path) -> None:
    """To the bit, through pickling and merging."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ebpo, one = ebpo_core.EBPO(decay=0.5), ebpo_core.EBPO(decay=0.5)
        for i in range(6):
            r = np.random.default_rng(i).random((3, 4))
            plain = ebpo(r, process_group=dist.group.WORLD)  # a matrix alone is reduced in an order of its own
            np.testing.assert_array_equal(plain, one(r))
            assert ebpo == one
            assert ebpo.diagnostics.metrics() == one.diagnostics.metrics()  # type: ignore[union-attr]
            got = ebpo(r, keys=["a", "b", i], process_group=dist.group.WORLD)
            np.testing.assert_array_equal(got, one(r, keys=["a", "b", i]))
            assert ebpo == one
            ours, theirs = ebpo.diagnostics, one.diagnostics
            assert ours is not None
            assert theirs is not None
            assert ours.keys == theirs.keys
            np.testing.assert_array_equal(ours.prior_mean, theirs.prior_mean)
            if i % 2:
                ebpo = pickle.loads(pickle.dumps(ebpo))
            start = ebpo_core.Prior()
            start.update(r)
            ebpo.merge(start)
            one.merge(start)
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
