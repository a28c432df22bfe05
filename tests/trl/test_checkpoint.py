"""The prior in TRL's checkpoints: order of files, resume inside and between generation batches, bad files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl")

import trainer_worker as tiny
import transformers

import ebpo_core
from ebpo_core import reference
from ebpo_core.trainer import PRIOR_NAME, EBPOConfig, is_complete, last_complete_checkpoint, read_prior, write_prior

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

STATE = "trainer_state.json"


def build(
    output: Path, *, cls: Any = tiny.RecordingEBPO, dataset: Any = None, eval_dataset: Any = None, **settings: Any
) -> Any:
    config = tiny.GRPOConfig if cls is tiny.RecordingGRPO else EBPOConfig
    args = tiny.config(config, output, **{"save_strategy": "steps", "save_steps": 1} | settings)
    return tiny.build(cls, args, train_dataset=dataset or tiny.prompts(16), eval_dataset=eval_dataset)


def groups_in(checkpoint: Path | str) -> float:
    return prior_of(read_prior(checkpoint)["ebpo"]).group_count


def prior_of(state: dict[str, Any]) -> ebpo_core.Prior:
    ebpo = ebpo_core.EBPO()
    ebpo.load_state_dict(state)
    return ebpo.prior


# ---- the files ------------------------------------------------------------------------------------------------------


def test_prior_is_written_first_and_trainer_state_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[str]] = {}
    save_checkpoint = transformers.Trainer._save_checkpoint
    save_to_json = transformers.TrainerState.save_to_json

    def at_start(self: Any, *args: Any) -> None:
        seen["start"] = {file.name for file in (tmp_path / "checkpoint-1").iterdir()}
        save_checkpoint(self, *args)

    def before_state(self: Any, path: str) -> None:
        seen["before state"] = {file.name for file in Path(path).parent.iterdir()}
        save_to_json(self, path)

    monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", at_start)
    monkeypatch.setattr(transformers.TrainerState, "save_to_json", before_state)
    build(tmp_path, max_steps=1).train()
    final = {file.name for file in (tmp_path / "checkpoint-1").iterdir()}
    assert seen["start"] == {PRIOR_NAME}
    assert seen["before state"] == final - {STATE}
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth"} < final


def test_a_folder_cut_anywhere_is_passed_over(tmp_path: Path) -> None:
    build(tmp_path, max_steps=2).train()
    whole = tmp_path / "checkpoint-2"
    assert last_complete_checkpoint(tmp_path) == str(whole)
    content = (whole / STATE).read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 3):
        (whole / STATE).write_bytes(content[:length])
        assert not is_complete(whole)
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    (whole / STATE).unlink()
    assert not is_complete(whole)
    (whole / STATE).write_bytes((tmp_path / "checkpoint-1" / STATE).read_bytes())  # of another step
    assert not is_complete(whole)
    (whole / STATE).write_bytes(content)
    assert is_complete(whole)

    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-old").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(whole)
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    assert last_complete_checkpoint(tmp_path / "checkpoint-10") is None


def test_a_file_that_trl_writes_after_trainer_state_counts_too(tmp_path: Path) -> None:
    build(tmp_path, max_steps=2, use_adaptive_entropy=True).train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "entropy_ctrl_state.json").unlink()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_writing_over_an_old_checkpoint_makes_it_incomplete_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path, max_steps=2).train()

    def out_of_space(self: Any, output_dir: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.Trainer, "_save_optimizer_and_scheduler", out_of_space)
    trainer = build(tmp_path, max_steps=2)
    with pytest.raises(OSError, match="No space left"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_write_is_all_or_nothing(tmp_path: Path) -> None:
    file = write_prior(tmp_path / "new" / "folder", ebpo_core.EBPO().state_dict(), global_step=3)
    assert file == tmp_path / "new" / "folder" / PRIOR_NAME
    before = file.read_bytes()
    with pytest.raises(TypeError):
        write_prior(file, {"not JSON": object()})
    assert file.read_bytes() == before
    assert [f.name for f in file.parent.iterdir()] == [PRIOR_NAME]
    assert read_prior(file) == read_prior(file.parent)
    assert write_prior(tmp_path / "mine.json", ebpo_core.EBPO().state_dict()) == tmp_path / "mine.json"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON.*damaged"),
        ("[1]", "not an EBPO prior"),
        ('{"format": "ebpo-core/prior", "version": 1}', "not an EBPO prior"),
        ('{"format": "ebpo-core/prior", "version": 99, "ebpo": {}}', "version 99.*upgrade"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / PRIOR_NAME).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prior(tmp_path)


# ---- resume ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"steps_per_generation": 4},
        {"steps_per_generation": 2, "num_iterations": 2},
        {"steps_per_generation": 8, "gradient_accumulation_steps": 2},
    ],
    ids=["slices", "iterations", "accumulation"],
)
def test_an_unfinished_generation_batch_is_not_in_the_checkpoint(tmp_path: Path, settings: dict[str, Any]) -> None:
    # A generation batch serves four optimizer steps in each case.
    trainer = build(tmp_path, max_steps=6, per_device_train_batch_size=tiny.GROUP, **settings)
    per_batch = settings["steps_per_generation"]  # one group per micro-batch
    trainer.train()
    assert len(trainer.rewards) == 2
    counts = [groups_in(tmp_path / f"checkpoint-{step}") for step in range(1, 7)]
    assert counts == [0, 0, 0, per_batch, per_batch, per_batch]
    assert trainer.ebpo.prior.group_count == 2 * per_batch

    resumed = build(tmp_path, max_steps=8, per_device_train_batch_size=tiny.GROUP, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    # TRL generates the unfinished batch again, from the same prompts, and the prior holds it once.
    assert resumed.prompts == [trainer.prompts[1]]
    twin = reference.EBPO()
    for rewards, output in ((trainer.rewards[0], trainer.outputs[0]), (resumed.rewards[0], resumed.outputs[0])):
        expected = twin(rewards.double().numpy().reshape(-1, tiny.GROUP)).reshape(-1)
        np.testing.assert_allclose(np.sort(output["advantages"]), np.sort(expected), rtol=1e-6, atol=1e-7)
    assert resumed.ebpo.prior.mean == pytest.approx(twin.prior.rewards.mean)
    assert resumed.ebpo.prior.group_count == 2 * per_batch


def test_an_evaluation_inside_a_generation_batch_changes_nothing(tmp_path: Path) -> None:
    settings = {"steps_per_generation": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = build(tmp_path, max_steps=3, eval_dataset=tiny.prompts(2), **settings)
    trainer.train()
    assert trainer.modes == ["train", "eval", "eval", "train", "eval"]
    assert [groups_in(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3)] == [0, 4, 4]


def test_resume_where_an_epoch_ends_inside_an_accumulation(tmp_path: Path) -> None:
    # An epoch is one generation batch of three micro-batches, so its second step accumulates one, not two: step 3 ends
    # at the second epoch's micro-batch 2, which 3 * 2 does not tell.
    settings = {"steps_per_generation": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": tiny.GROUP}
    build(tmp_path, max_steps=3, dataset=tiny.prompts(3), **settings).train()
    assert groups_in(tmp_path / "checkpoint-3") == 3
    resumed = build(tmp_path, max_steps=4, dataset=tiny.prompts(3), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(resumed.prompts) == 1
    assert groups_in(tmp_path / "checkpoint-4") == 6


def test_every_block_counts_once_through_resumes_inside_batches(tmp_path: Path) -> None:
    # Four blocks of prompts of four steps each. A resume inside a block shifts TRL's generations against the blocks:
    # at step 9 the batch at hand comes from the second block, and a resumed run goes on with the third.
    settings = {"steps_per_generation": 4, "per_device_train_batch_size": tiny.GROUP}
    counted: list[int] = []
    blocks: list[list[str]] = []
    for resume, stop in ((None, 6), (6, 9), (9, 11), (11, 16)):
        trainer = build(tmp_path, max_steps=stop, **settings)
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / f"checkpoint-{resume}"))
        counted.append(int(groups_in(tmp_path / f"checkpoint-{stop}")) // 4)
        blocks += [sorted(set(prompts)) for prompts in trainer.prompts]
    order = [blocks[0], blocks[1], blocks[3], blocks[5]]
    assert len({str(block) for block in order}) == 4
    assert [order.index(block) for block in blocks] == [0, 1, 1, 2, 2, 3]
    assert counted == [1, 2, 2, 4]
    assert trainer.ebpo.prior.group_count == 16


def test_resume_in_the_same_process_generates_again(tmp_path: Path) -> None:
    settings = {"steps_per_generation": 4, "per_device_train_batch_size": tiny.GROUP}
    trainer = build(tmp_path, max_steps=3, **settings)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.prompts == [trainer.prompts[0]] * 2
    assert trainer.ebpo.prior.group_count == 4
    assert groups_in(tmp_path / "checkpoint-3") == 0


@pytest.mark.parametrize("form", ["true", "string", "slash", "path"])
def test_resumed_run_equals_the_unbroken_one_across_epochs(tmp_path: Path, form: str) -> None:
    # Three steps per epoch: step 4 is in the second epoch, whose order of prompts differs from the first's.
    unbroken = build(tmp_path / "unbroken", max_steps=6, dataset=tiny.prompts(6))
    unbroken.train()
    build(tmp_path / "cut", max_steps=6, dataset=tiny.prompts(6)).train()
    for step in (5, 6):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{step}")
    half_written = tmp_path / "cut" / "checkpoint-5"
    write_prior(half_written, ebpo_core.EBPO().state_dict())
    checkpoint = tmp_path / "cut" / "checkpoint-4"
    resumed = build(tmp_path / "cut", max_steps=6, dataset=tiny.prompts(6))
    forms = {"true": True, "string": str(checkpoint), "slash": f"{checkpoint}/", "path": checkpoint}
    resumed.train(resume_from_checkpoint=forms[form])
    assert resumed.prompts == unbroken.prompts[4:]
    assert resumed.ebpo.state_dict() == unbroken.ebpo.state_dict()
    a, b = (json.loads((tmp_path / run / "checkpoint-6" / PRIOR_NAME).read_text()) for run in ("unbroken", "cut"))
    assert a == b


def test_resume_true_without_a_complete_checkpoint(tmp_path: Path) -> None:
    write_prior(tmp_path / "checkpoint-3", ebpo_core.EBPO().state_dict())
    with pytest.raises(ValueError, match=r"no complete checkpoint in output_dir.*leave it unset"):
        build(tmp_path).train(resume_from_checkpoint=True)


def test_missing_prior_raises_unless_allowed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build(tmp_path, cls=tiny.RecordingGRPO, max_steps=2).train()
    checkpoint = last_complete_checkpoint(tmp_path)  # a checkpoint of plain GRPO is complete
    assert checkpoint == str(tmp_path / "checkpoint-2")
    with pytest.raises(FileNotFoundError, match=f"{PRIOR_NAME}.*ebpo_allow_missing_prior=True"):
        build(tmp_path, max_steps=3).train(resume_from_checkpoint=checkpoint)

    allowed = build(tmp_path, max_steps=3, ebpo_allow_missing_prior=True)
    allowed.train(resume_from_checkpoint=checkpoint)
    assert allowed.ebpo.prior.group_count == 2
    assert "the prior starts empty" in caplog.text
    (tmp_path / "checkpoint-3" / PRIOR_NAME).write_text("{")  # allowed to be missing, not to be damaged
    with pytest.raises(ValueError, match="damaged"):
        build(tmp_path, max_steps=4, ebpo_allow_missing_prior=True).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-3")
        )


def test_warm_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = build(tmp_path / "first", max_steps=2)
    first.train()
    saved = first.save_prior(tmp_path / "exported")
    for path in (tmp_path / "first" / "checkpoint-2", tmp_path / "exported", saved):
        second = build(tmp_path / "second", max_steps=1, ebpo_prior=str(path))
        assert second.ebpo.prior.state_dict() == first.ebpo.prior.state_dict()
    second.train()
    assert second.ebpo.prior.group_count == 6
    log = next(entry for entry in second.state.log_history if "loss" in entry)
    assert log["ebpo/prior_mean"] == pytest.approx(np.mean([*first.rewards, *second.rewards]))
    assert "ebpo/outlier" in log  # the first batch already meets a prior

    resumed = build(tmp_path / "second", max_steps=2, ebpo_prior=str(saved))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.ebpo.prior.group_count == 8  # the checkpoint's prior, not the exported one

    with pytest.raises(FileNotFoundError, match=r"no EBPO prior at .*nowhere"):
        build(tmp_path, ebpo_prior=str(tmp_path / "nowhere"))
    assert not caplog.messages
    other = build(tmp_path, ebpo_prior=str(saved), ebpo_decay=0.5)
    assert other.ebpo.prior.state_dict() == first.ebpo.prior.state_dict()
    (line,) = caplog.messages
    assert line.endswith(": decay=0.5 (saved: 1.0)")


def test_a_run_goes_on_under_other_options(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    functions = [tiny.third, tiny.size]
    settings: dict[str, Any] = {"ebpo_per_reward": True, "save_strategy": "steps", "save_steps": 1}
    tiny.build(tiny.EBPOTrainer, tiny.config(EBPOConfig, tmp_path, max_steps=2, **settings), functions).train()
    settings |= {"ebpo_decay": 0.5, "ebpo_normalize": "scale"}
    resumed = tiny.build(tiny.EBPOTrainer, tiny.config(EBPOConfig, tmp_path, max_steps=3, **settings), functions)
    resumed.train(resume_from_checkpoint=True)
    lines = [line for line in caplog.messages if "saved under other options" in line]
    assert len(lines) == 1  # for all functions
    assert lines[0].endswith(": normalize='scale' (saved: 'batch'), decay=0.5 (saved: 1.0)")
    for ebpo in resumed.ebpos:
        assert ebpo.prior.group_count == 4 * 0.5 + 2  # `decay` acts from the next update on


def test_rotation_best_model_and_model_only(tmp_path: Path) -> None:
    trainer = build(
        tmp_path,
        max_steps=3,
        save_total_limit=1,
        save_only_model=True,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="reward",
        eval_dataset=tiny.prompts(2),
    )
    trainer.train()
    assert trainer.ebpo.prior.group_count == 6  # of the last step, whichever weights were best
    for folder in tmp_path.glob("checkpoint-*"):
        assert is_complete(folder)
        assert groups_in(folder) == 2 * int(folder.name.split("-")[1])
        assert not (folder / "optimizer.pt").exists()
