"""Curricula in TRL: TRL's own repetition over our order, in real trainers, through epochs, resumes and two ranks."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import curriculum_worker as worker
import trainer_worker as tiny
from trl.trainer.utils import RepeatSampler

from ebpo_core.curriculum.samplers import CurriculumSampler
from ebpo_core.curriculum.trl import Curriculum, CurriculumMixin, RepeatedCurriculum
from ebpo_core.trainer import EBPOConfig, EBPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


class GRPO(tiny.Recorder, CurriculumMixin, tiny.GRPOTrainer):
    """The mixin in front of TRL's own trainer."""


def build(
    output: Path, *, cls: Any = worker.Trainer, curriculum: Any = None, dataset: Any = None, **settings: Any
) -> Any:
    config = tiny.GRPOConfig if cls is GRPO else EBPOConfig
    args = tiny.config(config, output, **settings)
    return tiny.build(cls, args, train_dataset=dataset or worker.prompts(), curriculum=curriculum)


def generated(trainer: Any) -> list[list[str]]:
    """The prompts of each generation, each once, in order."""
    return [prompts[:: tiny.GROUP] for prompts in trainer.prompts]


def expected(order: str, epochs: int) -> list[list[str]]:
    """Batches of two prompts, by the sampler alone."""
    data = worker.prompts()
    sampler = Curriculum(order).sampler(data, 2, seed=7)  # type: ignore[arg-type]
    batches = []
    for epoch in range(epochs):
        plan = sampler.plan(epoch).tolist()
        batches += [[data["prompt"][i] for i in plan[start : start + 2]] for start in range(0, len(plan), 2)]
    return batches


@pytest.mark.parametrize(
    ("size", "batch", "group", "repeats"), [(14, 2, 4, 1), (13, 3, 2, 4), (5, 5, 1, 2), (7, 4, 3, 3)]
)
def test_it_repeats_as_trls_sampler_does(size: int, batch: int, group: int, repeats: int) -> None:
    curriculum = CurriculumSampler(size, batch_size=batch, seed=3, drop_last=True)
    ours = RepeatedCurriculum(curriculum, group, repeats)
    for epoch in range(2):
        ours.set_epoch(epoch)
        plan = curriculum.plan().tolist()
        theirs = RepeatSampler(plan, group, batch_size=batch, repeat_count=repeats, shuffle=False)
        assert list(ours) == [plan[place] for place in theirs]
        assert len(ours) == len(theirs) == len(list(ours))


@pytest.mark.parametrize("order", ["topic", "topic_blocks", "easy_to_hard", "shuffled"])
def test_a_trainer_follows_the_order_through_epochs(order: str, tmp_path: Path) -> None:
    trainer = build(tmp_path, curriculum=Curriculum(order), max_steps=9)  # type: ignore[arg-type]
    trainer.train()
    batches = generated(trainer)
    assert batches == expected(order, 2)[:9]
    for prompts in trainer.prompts:
        assert [len(list(same)) for _, same in itertools.groupby(prompts)] == [tiny.GROUP] * 2
    if order.startswith("topic"):
        # 5, 5 and 4 prompts of three topics: six batches of two are coherent, what is left makes the seventh.
        assert [prompts[0][0] == prompts[1][0] for prompts in batches[:6]] == [True] * 6


def test_several_steps_and_iterations_use_one_generation(tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2, "max_steps": 8}
    trainer = build(tmp_path, curriculum=Curriculum("topic"), **settings)
    trainer.train()
    data = worker.prompts()
    plan = Curriculum("topic").sampler(data, 8, seed=7).plan(0).tolist()
    assert len(plan) == 8
    again = Curriculum("topic").sampler(data, 8, seed=7).plan(1).tolist()
    assert generated(trainer) == [[data["prompt"][i] for i in part] for part in (plan, again)]


def test_a_resumed_run_goes_on_in_the_order_of_the_unbroken_one(tmp_path: Path) -> None:
    """In the second epoch, where a sampler that starts over would repeat the first."""
    settings = {"curriculum": Curriculum("topic"), "max_steps": 16, "save_strategy": "steps", "save_steps": 9}
    whole = build(tmp_path, **settings)
    whole.train()
    resumed = build(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert generated(whole) == expected("topic", 3)[:16]
    assert resumed.prompts == whole.prompts[9:]
    assert resumed.ebpo.state_dict() == whole.ebpo.state_dict()


def test_two_ranks_share_one_order(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(Path(__file__).parents[1] / "support" / "curriculum_worker.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-8000:]
    runs = {
        name: [json.loads((tmp_path / f"{name}_{rank}.json").read_text()) for rank in range(2)]
        for name in ("whole", "resumed")
    }
    together = [one + other for one, other in zip(*runs["whole"], strict=True)]
    assert [prompts[:: tiny.GROUP] for prompts in together] == expected("topic", 3)[:16]
    assert runs["resumed"] == [rank[9:] for rank in runs["whole"]]


def test_in_front_of_trls_own_trainer_and_without_a_curriculum(tmp_path: Path) -> None:
    ours = build(tmp_path, cls=GRPO, curriculum=Curriculum("easy_to_hard"))
    ours.train()
    assert generated(ours) == expected("easy_to_hard", 1)[:2]
    plain = build(tmp_path, cls=GRPO)
    assert type(plain._get_train_sampler()) is RepeatSampler


def test_columns_that_trl_drops_are_still_followed(tmp_path: Path) -> None:
    trainer = build(tmp_path, curriculum=Curriculum("topic", seed=7), remove_unused_columns=True, seed=8)
    trainer.train()
    assert generated(trainer) == expected("topic", 1)[:2]


def test_wrong_data_is_an_error_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"column 'subject'.*Curriculum\(topics=\.\.\.\)"):
        build(tmp_path, curriculum=Curriculum("topic", topics="subject"))
    with pytest.raises(ValueError, match="1 rows, fewer than the 2"):
        build(tmp_path, curriculum=Curriculum("topic"), dataset=worker.prompts().select([0]))
    streaming = worker.prompts().to_iterable_dataset()
    with pytest.raises(TypeError, match="without a length"):
        Curriculum("topic").sampler(streaming, 2, 0)
    assert issubclass(worker.Trainer, EBPOTrainer)
