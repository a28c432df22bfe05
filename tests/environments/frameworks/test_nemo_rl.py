"""NeMo-RL's estimator factory and checkpoints with EBPO. Runs where NeMo-RL's source is (fetch_sources.py)."""

# ruff: noqa: E402 - what is imported last needs what comes before it
from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import absent
import numpy as np
import pytest
import torch

grpo = absent.source("nemo_rl", "nemo_rl.algorithms.grpo")
estimators = absent.source("nemo_rl", "nemo_rl.algorithms.advantage_estimator")
checkpoint = absent.source("nemo_rl", "nemo_rl.utils.checkpoint")

from ebpo_core import EBPO, reference
from ebpo_core.integrations.contrib import nemo_rl


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo, "_create_advantage_estimator", grpo._create_advantage_estimator)
    monkeypatch.setattr(
        checkpoint.CheckpointManager, "init_tmp_checkpoint", checkpoint.CheckpointManager.init_tmp_checkpoint
    )
    nemo_rl.install()


def config(folder: Path, name: str = "ebpo", **ebpo: Any) -> Any:
    """The parts of NeMo-RL's master configuration that are read; its estimator part is NeMo-RL's own class."""
    estimator = estimators.AdvEstimatorConfig(name=name, ebpo=ebpo)
    saving = {"checkpoint_dir": str(folder), "metric_name": None, "higher_is_better": True, "keep_top_k": None}
    saving |= {"save_period": 1, "save_optimizer": False, "enabled": True}
    return SimpleNamespace(
        grpo=SimpleNamespace(adv_estimator=estimator, use_dynamic_sampling=False),
        loss_fn=SimpleNamespace(),
        checkpointing=saving,
        model_dump=dict,
    )


def batch(seed: int, prompts: int = 4, completions: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.integers(0, 50, (prompts, 6))).repeat_interleave(completions, 0)
    order = torch.from_numpy(rng.permutation(len(tokens)))
    rewards = torch.from_numpy(rng.choice([0.0, 1.0], len(tokens))).float()
    rewards[:completions] = 0.0
    return tokens[order], rewards[order], torch.ones(len(tokens), 5)


def twins(twin: Any, prompts: torch.Tensor, rewards: torch.Tensor) -> np.ndarray:
    ids = torch.unique(prompts, dim=0, return_inverse=True)[1]
    return twin(rewards.double().numpy(), ids.numpy())


def test_nemo_rls_factory_makes_it_and_it_equals_the_twin_over_steps(tmp_path: Path) -> None:
    made, twin = grpo._create_advantage_estimator(config(tmp_path, decay=0.9)), reference.EBPO(decay=0.9)
    assert isinstance(made, nemo_rl.EBPOAdvantageEstimator)
    for step in range(3):
        prompts, rewards, mask = batch(step)
        advantages = made.compute_advantage(
            prompt_ids=prompts, rewards=rewards, mask=mask, repeated_batch={}, logprobs_policy=None
        )
        assert advantages.shape == mask.shape
        assert advantages.dtype == rewards.dtype
        np.testing.assert_allclose(advantages[:, 0], twins(twin, prompts, rewards), rtol=1e-5, atol=1e-6)
        assert torch.equal(advantages[:, 0], advantages[:, -1])
    assert {"ebpo/shrinkage", "ebpo/prior_mean"} <= set(made.last_metrics)


def test_groups_are_nemo_rls() -> None:
    utils = importlib.import_module("nemo_rl.algorithms.utils")
    prompts, rewards, _ = batch(7)
    means, _ = utils.calculate_baseline_and_std_per_prompt(
        prompts, rewards, torch.ones_like(rewards), leave_one_out_baseline=False
    )
    groups = nemo_rl.prompt_groups(prompts)
    mine = [rewards[[g == group for g in groups]].mean() for group in groups]
    torch.testing.assert_close(torch.stack(mine), means)
    assert nemo_rl.prompt_groups(torch.tensor([3, 3, 1])) == [3, 3, 1]


def test_the_prior_is_in_nemo_rls_checkpoints(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    made = grpo._create_advantage_estimator(cfg)
    made.compute_advantage(*batch(0))
    saved = made.ebpo.state_dict()
    manager = checkpoint.CheckpointManager(cfg.checkpointing)
    temporary = manager.init_tmp_checkpoint(1, {"step": 1}, cfg)
    manager.finalize_checkpoint(temporary)
    assert (tmp_path / "step_1" / "ebpo_prior.json").is_file()

    nemo_rl.estimator.reset()
    assert grpo._create_advantage_estimator(cfg).ebpo.state_dict() == saved

    nemo_rl.estimator.reset()
    (tmp_path / "step_1" / "ebpo_prior.json").unlink()
    with pytest.raises(FileNotFoundError, match="allow_missing_prior"):
        grpo._create_advantage_estimator(cfg)
    nemo_rl.estimator.reset()
    allowed = grpo._create_advantage_estimator(config(tmp_path, allow_missing_prior=True))
    assert allowed.ebpo == EBPO()


def test_other_estimators_are_nemo_rls(tmp_path: Path) -> None:
    cfg = config(tmp_path, name="grpo")
    assert type(grpo._create_advantage_estimator(cfg)) is estimators.GRPOAdvantageEstimator
    manager = checkpoint.CheckpointManager(cfg.checkpointing)
    manager.finalize_checkpoint(manager.init_tmp_checkpoint(1, {"step": 1}, cfg))
    assert not (tmp_path / "step_1" / "ebpo_prior.json").exists()
    with pytest.raises(ValueError, match="Invalid adv_estimator name: gropo"):
        grpo._create_advantage_estimator(config(tmp_path, name="gropo"))


def test_installing_twice_changes_nothing(tmp_path: Path) -> None:
    once = grpo._create_advantage_estimator
    nemo_rl.install()
    assert grpo._create_advantage_estimator is once


def test_dynamic_sampling_warns(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    cfg.grpo.use_dynamic_sampling = True
    with pytest.warns(UserWarning, match=r"grpo\.use_dynamic_sampling"):
        grpo._create_advantage_estimator(cfg)


def test_bad_rewards_are_refused(tmp_path: Path) -> None:
    made = grpo._create_advantage_estimator(config(tmp_path))
    prompts, rewards, mask = batch(0)
    rewards[2] = torch.nan
    with pytest.raises(ValueError, match="row 2 is nan"):
        made.compute_advantage(prompts, rewards, mask)


def test_seams() -> None:
    """What this adapter rests on and NeMo-RL may move."""
    for trainer in (grpo.grpo_train, grpo.async_grpo_train):
        text = inspect.getsource(trainer)
        assert "_create_advantage_estimator(master_config)" in text
        assert "adv_estimator.compute_advantage(\n" in text
        assert "checkpointer.init_tmp_checkpoint(\n" in text
        assert "vars(grpo_save_state), master_config" in text
    root = Path(grpo.__file__).parents[1]
    for name in nemo_rl._COPIES:
        path = root / Path(*name.split(".")[1:]).with_suffix(".py")
        assert "_create_advantage_estimator" in path.read_text()
