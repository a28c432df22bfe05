"""Real processes: a run ended by SIGKILL and resumed, and two ranks that train together over gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl")

from trainer_worker import key

import ebpo_core
from ebpo_core.trainer import PRIOR_NAME, last_complete_checkpoint, read_prior

WORKER = Path(__file__).parents[1] / "support" / "trainer_worker.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL (POSIX)")


def result(folder: Path, rank: int = 0) -> dict[str, Any]:
    content = json.loads((folder / f"result_{rank}.json").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the output of every run below."""
    # Six steps in two epochs. The run "killed" dies half-way through writing checkpoint-4, goes on from checkpoint-2,
    # dies again while the batch after step 5 is scored, and goes on from checkpoint-4.
    folder = tmp_path_factory.mktemp("runs")

    def job(name: str, *extra: str, ranks: int = 1, steps: str = "6") -> dict[str, Any]:
        return {"ranks": ranks, "arguments": ["--output", str(folder / name), "--steps", steps, *extra]}

    jobs = [
        job("whole"),
        job("killed", "--kill-in-save", "4"),
        job("killed", "--resume", "--kill-in-reward", "5"),
        job("killed", "--resume"),
        job("cut", "--kill-in-save", "4"),
        job("ranks", "--save-steps", "3", "--batch", "4", "--slow-rank", "1", ranks=2, steps="3"),
        job("keys", "--batch", "4", "--keys", "topic", "level", "--per-reward", ranks=2, steps="3"),
        job("turns", "--batch", "4", "--turns", ranks=2, steps="2"),
    ]
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, str(WORKER), str(file)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    kill = -signal.SIGKILL
    assert json.loads(file.with_suffix(".status").read_text()) == [0, kill, kill, 0, kill, 0, 0, 0], done.stderr[-8000:]
    return folder


def test_killed_and_resumed_equals_not_killed(runs: Path) -> None:
    whole, killed = runs / "whole", runs / "killed"
    expected, got = result(whole), result(killed)
    assert got["resumed_from"] == str(killed / "checkpoint-4")
    assert got["state"] == expected["state"]
    assert (killed / "checkpoint-6" / PRIOR_NAME).read_bytes() == (whole / "checkpoint-6" / PRIOR_NAME).read_bytes()
    assert got["rewards"] == expected["rewards"][4:]
    assert got["advantages"] == expected["advantages"][4:]
    assert got["weights"] == expected["weights"]


def test_a_save_cut_by_sigkill_is_not_the_last_complete_checkpoint(runs: Path) -> None:
    cut = runs / "cut"
    left = {entry.name for entry in (cut / "checkpoint-4").iterdir()}
    assert {PRIOR_NAME, "model.safetensors"} < left
    assert "trainer_state.json" not in left
    assert last_complete_checkpoint(cut) == str(cut / "checkpoint-2")


def test_two_ranks_keep_one_prior(runs: Path) -> None:
    first, second = result(runs / "ranks", 0), result(runs / "ranks", 1)
    assert first["state"] == second["state"]
    assert first["rewards"] == second["rewards"]
    assert first["logged"] == second["logged"]
    assert first["advantages"] != second["advantages"]

    # One process that sees the same global rewards: the same prior, bit for bit, and advantages to slice.
    single = ebpo_core.EBPO()
    for step, rewards in enumerate(first["rewards"]):
        advantages = np.float32(single(np.array(rewards).reshape(-1, 4))).reshape(-1).tolist()
        assert len(advantages) == 8
        assert first["advantages"][step] == advantages[:4]
        assert second["advantages"][step] == advantages[4:]
    assert [single.state_dict()] == first["state"]
    assert first["logged"] == advantages

    checkpoint = runs / "ranks" / "checkpoint-3"
    assert [read_prior(checkpoint)["ebpo"]] == first["state"]
    # trainer_state.json proves the whole folder, also the file of a rank that was late.
    written = {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()}
    assert written["rng_state_0.pth"] < written["rng_state_1.pth"] <= written["trainer_state.json"]
    assert written[PRIOR_NAME] <= min(written.values())


def test_two_ranks_gather_the_keys_of_their_prompts(runs: Path) -> None:
    """Each rank sees one group a step, with a key of its own, and scores it with the keys and rewards of both."""
    ranks = [result(runs / "keys", rank) for rank in (0, 1)]
    assert ranks[0]["state"] == ranks[1]["state"]
    singles = [ebpo_core.EBPO(), ebpo_core.EBPO()]
    for step, rewards in enumerate(ranks[0]["rewards"]):
        keys = [tuple(part for part in key(rank["prompts"][step][0]) if part is not None) for rank in ranks]
        third, size = np.array(rewards).reshape(2, 2, 4)
        expected = singles[0](third, keys=keys) - 0.5 * singles[1](size, keys=keys)
        for rank in (0, 1):
            assert ranks[rank]["advantages"][step] == np.float32(expected[rank]).tolist()
    assert [single.state_dict() for single in singles] == ranks[0]["state"]
    assert len(singles[0].priors) > 3
    saved = read_prior(runs / "keys" / "checkpoint-2")["ebpo_per_reward"]
    assert [entry["reward"] for entry in saved] == ["reward", "size"]


def test_two_ranks_gather_the_turns_of_their_completions(runs: Path) -> None:
    """Each rank sees one prompt a step; the advantages of its turns are those of one process that sees both."""
    ranks = [result(runs / "turns", rank) for rank in (0, 1)]
    assert ranks[0]["state"] == ranks[1]["state"]
    single = ebpo_core.EBPO(normalize="none", leave_one_out="row")
    for step in range(2):
        completions = [of_one for rank in ranks for of_one in rank["turns"][step]]
        names = [name for name, of_one in enumerate(completions) for _ in of_one]
        turns = [turn for of_one in completions for turn in range(1, len(of_one) + 1)]
        rewards = np.concatenate(completions)
        expected = np.float32(single(rewards, [name // 4 for name in names], trajectories=names, turns=turns))
        for rank in (0, 1):
            for row in range(4):
                got = [value for value in ranks[rank]["advantages"][step][row] if value != 0]
                own = expected[[name == 4 * rank + row for name in names]].tolist()
                assert list(dict.fromkeys(got)) == [value for value in dict.fromkeys(own) if value != 0]
    assert [single.state_dict()] == ranks[0]["state"]
    assert 2 in single.priors
