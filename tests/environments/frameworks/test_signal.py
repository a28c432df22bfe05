"""``ebpo signal`` on what SkyRL's own writer of evaluations leaves on the disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from skyrl.train.utils.trainer_utils import dump_per_dataset_eval_results

from ebpo_core.signal import read_rollouts


def test_an_evaluation_dump_is_read(tmp_path: Path) -> None:
    output: dict[str, Any] = {
        "prompt_token_ids": [[1], [1], [2], [2]],
        "response_ids": [[3]] * 4,
        "rewards": [1.0, 0.0, [0.0, 0.5], [1.0]],  # of a completion, or of its tokens
        "stop_reasons": ["stop"] * 4,
    }
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    sources = ["gsm8k", "gsm8k", "math", "math"]
    dump_per_dataset_eval_results(tmp_path, tokenizer, output, sources, sources, [{}] * 4, {"eval/all/avg_score": 0.6})
    read = read_rollouts(tmp_path)
    assert read.form == "skyrl"
    assert read.rewards.tolist() == [1, 0, 0.5, 1]
    assert read.groups.tolist() == [0, 0, 1, 1]
    assert read.sources == sources
