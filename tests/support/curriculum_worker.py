"""Two ranks that train by a curriculum over gloo, unbroken and resumed in their second epoch; a script for a test.

``python tests/support/curriculum_worker.py DIR`` writes the prompts of every generation to ``DIR/<run>_<rank>.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import trainer_worker as tiny
import transformers
from datasets import Dataset
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ebpo_core.curriculum.trl import Curriculum, CurriculumMixin
from ebpo_core.trainer import EBPOConfig, EBPOTrainer


class Trainer(tiny.Recorder, CurriculumMixin, EBPOTrainer):
    """EBPO by a curriculum, its prompts recorded."""


def prompts() -> Dataset:
    """Fourteen problems: the first word of a prompt is its topic, the last its place."""
    rows = [
        {"prompt": f"{i % 3} {i // 10} {i % 10}", "topic": "abc"[i % 3], "pass_rate": (i * 5 % 7) / 6}
        for i in range(14)
    ]
    return Dataset.from_list(rows)


def train(folder: str, run: str, resume: bool) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    args = tiny.config(
        EBPOConfig,
        Path(folder) / run,
        max_steps=16,
        per_device_train_batch_size=tiny.GROUP,
        save_strategy="steps",
        save_steps=9,
    )
    trainer: Any = tiny.build(Trainer, args, train_dataset=prompts(), curriculum=Curriculum("topic"))
    trainer.train(resume_from_checkpoint=str(Path(folder) / "whole" / "checkpoint-9") if resume else None)
    target = Path(folder) / f"{run}_{trainer.accelerator.process_index}.json"
    target.write_text(json.dumps(trainer.prompts), encoding="utf-8")


if __name__ == "__main__":
    for name, again in (("whole", False), ("resumed", True)):
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=2,
            run_id=name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            start_method="fork",
        )
        elastic_launch(launch, train)(sys.argv[1], name, again)
