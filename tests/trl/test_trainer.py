"""EBPOTrainer against the NumPy twin and against GRPOTrainer: real TRL training of a tiny policy on CPU."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("trl")

import pandas as pd
import torch
import trainer_worker as tiny

from ebpo_core import diagnostics, reference
from ebpo_core.trainer import EBPOConfig, EBPOTrainer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

METRICS = ("shrinkage", "prior_mean", "sigma2", "tau2", "saturated_fail", "saturated_pass", "outlier")


def train(tmp_path: Path, reward_funcs: Any = tiny.third, *, trainer: dict[str, Any] | None = None, **settings: Any):
    args = tiny.config(EBPOConfig, tmp_path, **settings)
    built = tiny.build(tiny.RecordingEBPO, args, reward_funcs, **(trainer or {}))
    built.train()
    return built


def oracle(trainer: Any, weights: tuple[float, ...] = (1.0,)) -> list[np.ndarray]:
    """The twin's advantages for every recorded batch, in order; evaluation batches do not update it."""
    twin = reference.EBPO(**trainer.args.ebpo_options())
    expected = []
    for mode, rewards in zip(trainer.modes, trainer.rewards, strict=True):
        per_func = rewards.double().numpy()
        total = np.nansum(per_func * np.array(weights), axis=1)
        total[np.isnan(per_func).all(axis=1)] = np.nan
        group = trainer.num_generations if mode == "train" else trainer.num_generations_eval
        expected.append(twin(total.reshape(-1, group), update=mode == "train").reshape(-1))
    return expected


def check_against_oracle(trainer: Any, weights: tuple[float, ...] = (1.0,)) -> None:
    expected = oracle(trainer, weights)
    assert len(expected) == len(trainer.outputs) > 0
    for output, reference_advantages in zip(trainer.outputs, expected, strict=True):
        np.testing.assert_allclose(output["advantages"].numpy(), reference_advantages, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ebpo_normalize": "scale", "ebpo_sigma2": "within", "ebpo_tau2": "debiased", "ebpo_decay": 0.5},
        {"ebpo_score": "before", "ebpo_normalize": "none", "ebpo_ddof": 1},
        {"ebpo_leave_one_out": True, "ebpo_eps": 1e-3, "ebpo_norm_ddof": 0},
    ],
    ids=["paper", "debiased", "before", "leave-one-out"],
)
def test_trains_with_the_advantages_of_the_twin(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = train(tmp_path, max_steps=4, **options)
    check_against_oracle(trainer)
    assert trainer.modes == ["train"] * 4
    assert trainer.outputs[0]["advantages"].dtype == torch.float32
    assert trainer.ebpo.prior.group_count == pytest.approx(
        sum(2 * options.get("ebpo_decay", 1.0) ** k for k in range(4))
    )


def test_only_the_advantages_differ_from_grpo(tmp_path: Path) -> None:
    ebpo = train(tmp_path / "ebpo", tiny.size, max_steps=1)
    args = tiny.config(tiny.GRPOConfig, tmp_path / "grpo", max_steps=1, scale_rewards="none")
    grpo = tiny.build(tiny.RecordingGRPO, args, tiny.size)
    grpo.train()
    ours, theirs = ebpo.outputs[0], grpo.outputs[0]
    assert ours.keys() == theirs.keys()
    for name in theirs.keys() - {"advantages"}:
        assert torch.equal(ours[name], theirs[name]), name
    assert not torch.allclose(ours["advantages"], theirs["advantages"])
    assert any(
        not torch.equal(a, b) for a, b in zip(ebpo.model.parameters(), grpo.model.parameters(), strict=True)
    )  # and so does what they train


def test_evaluation_reads_the_prior_and_leaves_it(tmp_path: Path) -> None:
    # 3 generations per prompt in evaluation, and a batch (12) larger than TRL's log of one training batch (8).
    trainer = train(
        tmp_path,
        trainer={"eval_dataset": tiny.prompts(8)},
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        num_generations_eval=3,
        per_device_eval_batch_size=12,
    )
    assert set(trainer.modes) == {"train", "eval"}
    assert trainer.modes[0] == "eval"  # against an empty prior
    check_against_oracle(trainer)
    assert trainer.ebpo.prior.group_count == 4  # two steps of two groups
    before = trainer.ebpo.state_dict()
    metrics = trainer.evaluate()
    assert trainer.ebpo.state_dict() == before
    assert {f"eval_ebpo/{name}" for name in METRICS} <= metrics.keys() | trainer.state.log_history[-1].keys()
    assert trainer.state.log_history[-1]["eval_ebpo/prior_mean"] == pytest.approx(trainer.ebpo.prior.mean)
    assert len(trainer._logs["advantages"]) == len(trainer._logs["prompt"]) == 8
    assert list(trainer._logs["advantages"]) == trainer.outputs[-1]["advantages"].tolist()[-8:]


def test_the_log_stays_aligned_when_an_evaluation_batch_is_smaller(tmp_path: Path) -> None:
    args = tiny.config(EBPOConfig, tmp_path, max_steps=1, per_device_eval_batch_size=tiny.GROUP)
    trainer = tiny.build(tiny.RecordingEBPO, args, eval_dataset=tiny.prompts(1))
    trainer.train()
    trainer.evaluate()
    training, evaluation = (output["advantages"].tolist() for output in trainer.outputs)
    assert list(trainer._logs["advantages"]) == training[4:] + evaluation
    assert list(trainer._logs["prompt"]) == trainer.prompts[0][4:] + trainer.prompts[1]


def test_metrics_of_every_batch_are_logged(tmp_path: Path) -> None:
    trainer = train(tmp_path, max_steps=3)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    twin = reference.Prior()
    for rewards, output, log in zip(trainer.rewards, trainer.outputs, logs, strict=True):
        groups = rewards.double().numpy().reshape(-1, tiny.GROUP)
        dead = groups.min(axis=1) == groups.max(axis=1)
        if dead.any():
            sizes = output["advantages"].numpy().reshape(-1, tiny.GROUP)[dead]
            assert log["ebpo/dead_advantage"] == pytest.approx(np.abs(sizes).mean(), rel=1e-6)
        else:
            assert "ebpo/dead_advantage" not in log
        before, twin = twin, twin.merge(reference.Prior.of(list(groups)))
        sigma2, tau2 = twin.sigma2("total", 0), twin.tau2("raw", 0)
        assert log["ebpo/prior_mean"] == pytest.approx(twin.rewards.mean)
        assert log["ebpo/sigma2"] == pytest.approx(sigma2)
        assert log["ebpo/tau2"] == pytest.approx(tau2)
        assert log["ebpo/shrinkage"] == pytest.approx((sigma2 / 4) / (sigma2 / 4 + tau2))
        assert log["ebpo/saturated_fail"] == np.mean(groups.sum(axis=1) == 0)
        assert log["ebpo/saturated_pass"] == np.mean(groups.sum(axis=1) == 4)
        if before.rewards.variance(0) > 0:
            spread = math.sqrt(before.rewards.variance(0))
            assert log["ebpo/outlier"] == pytest.approx(np.abs(groups - before.rewards.mean).max() / spread)
        else:
            assert "ebpo/outlier" not in log  # undefined, and never logged as NaN or None


@pytest.mark.parametrize("normalize", ["batch", "scale"])
def test_one_prompt_a_batch_is_grpo_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, normalize: str
) -> None:
    monkeypatch.setattr(diagnostics, "_warned_of_one_prompt", False)
    batches = iter([[1.0, 0.0, 0.0, 0.0], [0.0] * 4, [0.0] * 4])
    trainer = train(
        tmp_path,
        lambda **_: next(batches),
        max_steps=3,
        per_device_train_batch_size=tiny.GROUP,
        steps_per_generation=1,
        ebpo_normalize=normalize,
    )
    first, *failed = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert "ebpo/dead_advantage" not in first
    assert all(log["ebpo/shrinkage"] > 0.2 for log in failed)  # looks healthy, and yet
    assert all((log["ebpo/dead_advantage"] == 0) == (normalize == "batch") for log in failed)
    assert sum("one prompt" in line for line in caplog.messages) == (normalize == "batch")


def test_completions_table_shows_our_advantages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = train(tmp_path, max_steps=2, log_completions=True)
    for step in (1, 2):
        table = pd.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
        assert table["advantage"].tolist() == trainer.outputs[step - 1]["advantages"].tolist()
    assert "Advantage" in capsys.readouterr().out


def test_several_weighted_reward_functions_with_none(tmp_path: Path) -> None:
    def sometimes(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None if i % 3 == 0 else 2.0 * (len(ids) > 3) for i, ids in enumerate(completion_ids)]

    trainer = train(tmp_path, [tiny.third, sometimes], max_steps=3, reward_weights=[0.5, -2.0])
    assert any(rewards.isnan().any() for rewards in trainer.rewards)
    check_against_oracle(trainer, (0.5, -2.0))


def test_unscorable_completions_get_zero_and_do_not_count(tmp_path: Path) -> None:
    def partly(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        rewards: list[float | None] = list(tiny.third(completion_ids))
        return [None if i in (0, 4, 5, 6, 7) else r for i, r in enumerate(rewards)]  # one row, and one whole group

    trainer = train(tmp_path, partly, max_steps=2)
    check_against_oracle(trainer)
    for output in trainer.outputs:
        assert output["advantages"][[0, 4, 5, 6, 7]].tolist() == [0.0] * 5
    assert trainer.ebpo.prior.count == 2 * 3
    assert trainer.ebpo.prior.group_count == 2


@pytest.mark.parametrize("functions", ["one", "cancelling"])
def test_an_infinite_reward_is_refused_and_leaves_the_prior(tmp_path: Path, functions: str) -> None:
    def bad(completion_ids: list[list[int]], trainer_state: Any, **_: Any) -> list[float]:
        rewards = tiny.third(completion_ids)
        if trainer_state.global_step == 1:
            rewards[5] = math.inf
        return rewards

    def opposite(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [-r for r in bad(completion_ids, **kwargs)]

    args = tiny.config(EBPOConfig, tmp_path, max_steps=3)
    trainer = tiny.build(tiny.RecordingEBPO, args, [bad, opposite] if functions == "cancelling" else bad)
    with pytest.raises(ValueError, match=r"(?i)rewards.*inf") as caught:
        trainer.train()
    assert "'bad'" in "".join(caught.value.__notes__)
    assert "[5]" in "".join(caught.value.__notes__)
    assert trainer.ebpo.prior.count == 8  # the first step's, and nothing of the second's


def test_lora_adapters_train(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = train(tmp_path, trainer={"peft_config": lora}, **settings)
    check_against_oracle(trainer)
    assert trainer.model.peft_config
    args = tiny.config(EBPOConfig, tmp_path, **settings | {"max_steps": 3})
    again = tiny.build(tiny.RecordingEBPO, args, peft_config=lora)
    again.train(resume_from_checkpoint=True)
    assert again.ebpo.prior.count == 24


def test_the_mixin_fits_other_grpo_like_trainers(tmp_path: Path) -> None:
    from dataclasses import dataclass

    from trl import RLOOConfig, RLOOTrainer

    from ebpo_core.trainer import EBPOArguments, EBPOMixin

    @dataclass
    class Config(EBPOArguments, RLOOConfig):
        pass

    class Trainer(tiny.Recorder, EBPOMixin, RLOOTrainer):
        pass

    args = tiny.config(Config, tmp_path, max_steps=2, beta=0.0, ebpo_normalize="scale")
    trainer = tiny.build(Trainer, args)
    trainer.train()
    check_against_oracle(trainer)
    with pytest.raises(ValueError, match=r"normalize_advantages=True.*set normalize_advantages=False"):
        tiny.build(Trainer, tiny.config(Config, tmp_path, beta=0.0, normalize_advantages=True))
    with pytest.raises(ValueError, match=r"ebpo_turns=True.*one advantage a completion; use EBPOTrainer"):
        tiny.build(Trainer, tiny.config(Config, tmp_path, beta=0.0, ebpo_normalize="none", ebpo_turns=True))


def test_default_args_and_wrong_args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=r"GRPOConfig.*use EBPOConfig"):
        tiny.build(EBPOTrainer, tiny.config(tiny.GRPOConfig, tmp_path))
    # TRL's own default is bf16, which transformers refuses without a GPU: the defaults are given their CPU form here.
    monkeypatch.setattr("ebpo_core.trainer.trainer.EBPOConfig", functools.partial(tiny.config, EBPOConfig))
    trainer = tiny.build(EBPOTrainer, None)
    assert isinstance(trainer.args, EBPOConfig)
    assert trainer.args.output_dir.endswith("-EBPO")
