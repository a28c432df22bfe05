"""``ebpo signal`` on what verl's own writers of rollouts leave on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from ebpo_core.signal import read_rollouts

# Two prompts, three sessions each; the second session has two outputs.
SESSIONS = [
    (prompt, session, output)
    for prompt in "ab"
    for session, outputs in ((0, 1), (1, 2), (2, 1))
    for output in range(outputs)
]


@pytest.mark.parametrize(("writer", "uid"), [(PPOTrainer, True), (RayPPOTrainer, False)], ids=["v1", "ray"])
def test_a_rollout_dump_is_read(tmp_path: Path, writer: Any, uid: bool) -> None:
    rows = SESSIONS if uid else [row for row in SESSIONS if row[2] == 0]
    extra: dict[str, list[Any]] = (
        {"uid": ["_".join(map(str, row)) for row in rows]} if uid else {"acc": [True] * len(rows)}
    )
    for step in (9, 10):
        writer._write_generations(
            [f"user\n{prompt}" for prompt, _, _ in rows],
            ["answer" for _ in rows],
            [None for _ in rows],
            [float(session) for _, session, _ in rows],
            extra,
            str(tmp_path),
            step,
        )
    read = read_rollouts(tmp_path)
    assert read.form == "verl"
    assert np.bincount(read.groups).tolist() == [3] * 4
    assert read.rewards.tolist() == [0, 1, 2] * 4
    assert read.steps.tolist() == [0] * 6 + [1] * 6
