"""Real processes: runs and cache builds ended by SIGKILL, two ranks under Trainer, two ranks with ``fully_shard``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fusionroute_worker as worker
import numpy as np
import pytest

from ebpo_core.checkpoint import last_complete_checkpoint
from ebpo_core.fusionroute.training import columns

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL (POSIX)"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the output of every run below."""
    folder = tmp_path_factory.mktemp("runs")
    start = worker.save_fusion(folder / "models")

    def job(name: str, phase: str, ranks: int = 1, **more: Any) -> dict[str, Any]:
        settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, **more.pop("settings", {})}
        common = {"kind": "train", "start": str(start), "output": str(folder / name), "phase": phase, "ranks": ranks}
        return common | {"settings": settings, **more}

    saving = {"save_strategy": "steps", "save_steps": 2}
    plain = {"optim": "sgd", "logging_steps": 2, "save_strategy": "steps", "save_steps": 4}
    # Without looking for unused parameters, DDP fails where a rank has no row that uses the route head.
    strict = {"ddp_find_unused_parameters": False}
    per_rank = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, **strict}
    # The nine samples first, so that the fourth step has pairs alone: weight decay must not move the head in it.
    order = {"sft": {}, "mix": {"train_sampling_strategy": "sequential", "weight_decay": 0.1}}
    jobs = []
    for phase in ("sft", "mix"):
        jobs += [
            job(f"{phase}-whole", phase, settings=saving),
            job(f"{phase}-killed", phase, settings=saving, kill_in_save=4),
            job(f"{phase}-killed", phase, settings=saving, resume=True),
            job(f"{phase}-one", phase, settings=plain | order[phase]),
            job(f"{phase}-two", phase, ranks=2, settings=plain | order[phase] | per_rank),
        ]
    accumulated = {"routing_loss": "softmax", "gradient_accumulation_steps": 2, "weight_decay": 0.1, **plain}
    half = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 2, **strict}
    jobs += [job("cdpo-one", "cdpo", settings=accumulated | {"per_device_train_batch_size": 2})]
    jobs += [job("cdpo-two", "cdpo", ranks=2, settings=accumulated | half)]
    for ranks in (1, 2):
        output = str(folder / f"fsdp-{ranks}")
        jobs.append({"kind": "fsdp", "ranks": ranks, "start": str(start), "output": output})
    for name, ranks, on_rank in [
        ("whole", 1, {}),
        ("killed", 1, {"0": {"die_at": 5}}),
        ("ranks", 2, {}),
        ("failed", 2, {"1": {"fail_at": 2}}),
    ]:
        output = str(folder / f"cache-{name}")
        jobs.append({"kind": "cache", "ranks": ranks, "output": output, "on_rank": on_rank})
    # What a longer run of before left where the run "sft-killed" dies: it must not make that checkpoint look whole.
    stale = folder / "sft-killed" / "checkpoint-4"
    stale.mkdir(parents=True)
    (stale / "trainer_state.json").write_text(json.dumps({"global_step": 4}))
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, str(Path(worker.__file__)), str(file)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **pipes) as process:
        try:
            stdout, stderr = process.communicate(timeout=280)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # ranks that wait for each other, too
            raise
    assert process.returncode == 0, stdout[-4000:] + stderr[-8000:]
    ends = {"sft-killed": -signal.SIGKILL, "mix-killed": -signal.SIGKILL, "cache-killed": -signal.SIGKILL}
    expected = [
        0 if job.get("resume") else (ends | {"cache-failed": 1}).get(Path(job["output"]).name, 0) for job in jobs
    ]
    assert json.loads(file.with_suffix(".status").read_text()) == expected, stderr[-8000:]
    return folder


def result(folder: Path, rank: int = 0) -> dict[str, Any]:
    content = json.loads((folder / f"result_{rank}.json").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize("phase", ["sft", "mix"])
def test_killed_and_resumed_equals_not_killed(runs: Path, phase: str) -> None:
    whole, killed = result(runs / f"{phase}-whole"), result(runs / f"{phase}-killed")
    assert killed["weights"] == whole["weights"]
    assert killed["logs"][:-1] == whole["logs"][:-1]  # the last is a mean over the steps of this process
    assert len([log for log in whole["logs"] if "loss" in log]) == 4
    assert len([log for log in whole["logs"] if "eval_loss" in log]) == 2
    assert last_complete_checkpoint(runs / f"{phase}-killed") == str(runs / f"{phase}-killed" / "checkpoint-4")
    # The checkpoint is a model like any other.
    last = worker.load(runs / f"{phase}-killed" / "checkpoint-4")
    assert worker.weights(last) == whole["weights"]


@pytest.mark.parametrize("name", ["sft", "mix", "cdpo"])
def test_two_ranks_equal_one_process_with_the_batch_of_both(runs: Path, name: str) -> None:
    one, two = result(runs / f"{name}-one"), [result(runs / f"{name}-two", rank) for rank in range(2)]
    assert {rank["kind"] for rank in two} == {"DistributedDataParallel"}
    assert two[0]["weights"] == two[1]["weights"]
    for parameter, values in one["weights"].items():
        np.testing.assert_allclose(two[0]["weights"][parameter], values, rtol=1e-4, atol=1e-5, err_msg=parameter)
    for ours, theirs in zip(two[0]["logs"][:-1], one["logs"][:-1], strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"rewards/accuracies"}:  # margins of the first step are rounding errors
            assert ours[key] == pytest.approx(theirs[key], rel=2e-4, abs=2e-5), key
    logged = [log for log in one["logs"] if "loss" in log]
    evaluated = [log for log in one["logs"] if "eval_loss" in log]
    assert (len(logged), len(evaluated)) == (2, 2)
    wanted = {"loss_lm", "loss_routing"} if name != "cdpo" else set()
    wanted |= {"loss_cdpo", "cdpo/bias_magnitude", "rewards/margins"} if name in ("mix", "cdpo") else set()
    assert wanted | {"routing/accuracy", "routing/usage/one"} <= logged[0].keys() | logged[1].keys()
    for log in evaluated:
        assert {f"eval_{key}" for key in wanted | {"routing/accuracy", "routing/usage/one"}} <= log.keys()
    checkpoint = runs / f"{name}-two" / "checkpoint-4"
    assert worker.weights(worker.load(checkpoint, load_experts=False)) == two[0]["weights"]
    # trainer_state.json proves the whole folder, also the file of a rank that was late.
    written = {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()}
    assert written["rng_state_0.pth"] < written["rng_state_1.pth"] <= written["trainer_state.json"]


def test_pairs_alone_leave_the_head_on_every_rank(runs: Path) -> None:
    before = worker.weights(worker.load(runs / "models" / "start", load_experts=False))
    after = result(runs / "cdpo-two", 1)["weights"]
    assert [name for name in before if before[name] == after[name]] == ["route_head.weight"]


def test_fully_sharded_parameters_train_as_whole_ones(runs: Path) -> None:
    # The worker has asserted that every parameter of the model is a DTensor, and that no expert's is.
    one, two = result(runs / "fsdp-1"), [result(runs / "fsdp-2", rank) for rank in range(2)]
    before = worker.weights(worker.load(runs / "models" / "start", load_experts=False))
    for rank in two:
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert rank["weights"].keys() == one["weights"].keys() == before.keys()
        for name, values in one["weights"].items():
            np.testing.assert_allclose(rank["weights"][name], values, rtol=1e-3, atol=1e-4, err_msg=name)
            assert np.abs(np.array(before[name]) - values).max() > 1e-3


def test_a_killed_build_goes_on_where_it_was(runs: Path) -> None:
    folder = runs / "cache-killed" / "cache"
    (first,) = folder.glob("expert-00-*")
    assert first.is_file()  # the first expert is done
    (shards,) = folder.glob("expert-01-*")
    assert 0 < len(list(shards.glob("*.arrow"))) < 6
    (shards / ".00000016-00000020.arrow.123").write_bytes(b"half a file")

    models = worker.experts()
    cache = worker.build_cache(folder, models)
    whole = result(runs / "cache-whole")
    assert models[0].calls == 0
    assert 0 < models[1].calls < whole["calls"][1]
    assert worker.content(cache) == whole["content"]
    assert sorted(folder.iterdir()) == sorted([first, shards.with_suffix("")])

    # Killed while shards are put together: all are there, the file is not.
    last = shards.with_suffix("")
    table = columns.read(last)
    shards.mkdir()
    for start in range(0, 23, 4):
        columns.write(shards / f"{start:08d}-{min(start + 4, 23):08d}.arrow", table.slice(start, 4))
    content = last.read_bytes()
    last.unlink()
    models = worker.experts()
    assert worker.content(worker.build_cache(folder, models)) == whole["content"]
    # Killed after that: shards are left whose file is there already.
    shards.mkdir()
    (shards / "00000000-00000004.arrow").write_bytes(content)
    assert worker.content(worker.build_cache(folder, models)) == whole["content"]
    assert [model.calls for model in models] == [0, 0]
    assert not shards.exists()


def test_two_ranks_share_the_work(runs: Path) -> None:
    whole, ranks = result(runs / "cache-whole"), [result(runs / "cache-ranks", rank) for rank in range(2)]
    assert all(rank["content"] == whole["content"] for rank in ranks)
    assert all(
        0 < calls < all_calls for rank in ranks for calls, all_calls in zip(rank["calls"], whole["calls"], strict=True)
    )
    assert [sum(calls) for calls in zip(*(rank["calls"] for rank in ranks), strict=True)] == whole["calls"]
    files = sorted(file.name for file in (runs / "cache-ranks" / "cache").iterdir())
    assert files == sorted(file.name for file in (runs / "cache-whole" / "cache").iterdir())
    assert len(files) == 2


def test_a_rank_that_fails_does_not_leave_the_others_waiting(runs: Path) -> None:
    other, own = ((runs / "cache-failed" / f"error_{rank}").read_text() for rank in range(2))
    assert own.startswith("FloatingPointError: expert 'e1'")
    assert other == f"RuntimeError: rank 1 failed: {own}"
    assert not (runs / "cache-failed" / "result_0.json").exists()
    # What did not fail is kept.
    models = worker.experts()
    assert len(worker.build_cache(runs / "cache-failed" / "cache", models)) == 23
    assert models[0].calls == 0
