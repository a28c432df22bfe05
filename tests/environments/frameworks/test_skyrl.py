"""SkyRL's registry, padding, trainer and configuration with ``ebpo``, against the NumPy twin."""

from __future__ import annotations

import inspect
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

if sys.version_info < (3, 12) and find_spec("skyrl") is None:  # this folder's environment has one for 3.11
    pytest.skip(
        f"SkyRL 0.4.0 needs Python 3.12 or newer, this is {sys.version.split()[0]}: make an environment with "
        "PYTHON=python3.12 VENV=.venv-3.12",
        allow_module_level=True,
    )

import cloudpickle
import ray
import torch
from skyrl.backends.skyrl_train.training_batch import TrainingInputBatch, pad_training_input_batch
from skyrl.backends.skyrl_train.utils import ppo_utils
from skyrl.train.entrypoints import main_base
from skyrl.train.trainer import RayPPOTrainer, ResumeMode

from ebpo_core import reference
from ebpo_core.integrations import skyrl

LONGEST = 5


def config(**ebpo: Any) -> Any:
    changed = {f"trainer.algorithm.ebpo.{name}": value for name, value in ebpo.items()}
    return skyrl.EBPOTrainConfig.from_cli_overrides([f"{name}={value}" for name, value in changed.items()])


def batch(seed: int, sizes: tuple[int, ...] = (4, 2, 4, 3)) -> TrainingInputBatch:
    """Uneven groups in any order, the first one saturated; outcome rewards at the last response token."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    rewards = np.where(groups == 0, 0.0, rng.choice([0.0, 0.5, 1.0], len(groups)))
    lengths = rng.integers(1, LONGEST + 1, len(groups))
    mask = torch.from_numpy((np.arange(LONGEST) < lengths[:, None]).astype(np.int64))
    token_rewards = torch.zeros(len(groups), LONGEST)
    token_rewards[torch.arange(len(groups)), torch.from_numpy(lengths - 1)] = torch.from_numpy(rewards).float()
    data = TrainingInputBatch(
        {
            "sequences": torch.ones(len(groups), LONGEST, dtype=torch.long),
            "attention_mask": mask,
            "response_mask": mask,
            "loss_mask": mask,
            "rewards": token_rewards,
            "values": None,
        }
    )
    data.metadata = {"uids": [f"{seed}-{group}" for group in groups], "avg_response_length": float(lengths.mean())}
    return data


def twins(twin: Any, data: TrainingInputBatch) -> np.ndarray:
    rewards = data["rewards"].double().sum(-1).numpy()
    return twin(rewards, np.array(data.metadata["uids"]))[:, None] * data["response_mask"].numpy()


def trainer(cfg: Any) -> skyrl.EBPOTrainer:
    """SkyRL's trainer without the models, which need GPUs."""
    made = object.__new__(skyrl.EBPOTrainer)
    made.cfg, made.all_metrics, made.all_timings, made.global_step = cfg, {}, {}, 7
    return made


def test_the_registry_gives_the_estimator_and_it_equals_the_twin_over_steps() -> None:
    twin = reference.EBPO()
    for step in range(3):
        data = batch(step)
        advantages, returns = ppo_utils.compute_advantages_and_returns(
            data["rewards"], data["response_mask"], data.metadata["uids"], "ebpo", config().trainer.algorithm
        )
        assert torch.equal(advantages, returns)
        assert advantages.dtype == torch.float32
        np.testing.assert_allclose(advantages.numpy(), twins(twin, data), rtol=1e-5, atol=1e-6)


def test_skyrls_padding_changes_nothing() -> None:
    plain, padded = batch(0), pad_training_input_batch(batch(0), 3)
    assert padded.metadata["uids"][-3:] == ["pad0", "pad1", "pad2"]
    expected = trainer(config()).compute_advantages_and_returns(plain)["advantages"]
    seen = skyrl.estimator.get({}).state_dict()
    skyrl.estimator.reset()
    actual = trainer(config()).compute_advantages_and_returns(padded)["advantages"]
    assert torch.equal(actual[:-3], expected)
    assert not actual[-3:].any()
    assert skyrl.estimator.get({}).state_dict() == seen


def test_skyrls_trainer_over_steps_with_options_and_metrics() -> None:
    cfg, twin = config(normalize="scale", score="before"), reference.EBPO(normalize="scale", score="before")
    runner = trainer(cfg)
    for step in range(3):
        data = batch(step)
        expected = twins(twin, data)
        done = runner.compute_advantages_and_returns(data)
        np.testing.assert_allclose(done["advantages"].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert {"ebpo/shrinkage", "ebpo/prior_mean", "ebpo/saturated_fail"} <= set(runner.all_metrics)


def test_step_wise_trajectories_count_once() -> None:
    """SkyRL hands the last step of each trajectory over, and gives its advantage to every step."""
    cfg, plain, twin = config(), batch(1), reference.EBPO()
    cfg.generator.step_wise_trajectories = True
    rows = torch.arange(len(plain["rewards"])).repeat_interleave(2)  # two steps a trajectory
    steps = TrainingInputBatch({name: None if value is None else value[rows] for name, value in plain.items()})
    steps.metadata = {**plain.metadata, "uids": [plain.metadata["uids"][row] for row in rows]}
    steps.metadata["is_last_step"] = [False, True] * len(plain["rewards"])
    done = trainer(cfg).compute_advantages_and_returns(steps)["advantages"]
    np.testing.assert_allclose(done.numpy(), twins(twin, plain)[rows], rtol=1e-5, atol=1e-6)
    assert skyrl.estimator.get({}).prior.state_dict()["rewards"]["count"] == len(plain["rewards"])


def test_through_ray_the_function_is_this_modules(local_ray: None) -> None:
    from skyrl.backends.skyrl_train.utils.ppo_utils import AdvantageEstimatorRegistry, sync_registries

    assert cloudpickle.loads(cloudpickle.dumps(skyrl.compute_ebpo_advantage)) is skyrl.compute_ebpo_advantage
    sync_registries()
    assert AdvantageEstimatorRegistry.get("ebpo") is skyrl.compute_ebpo_advantage
    stored = ray.get(AdvantageEstimatorRegistry._ray_actor.get.remote("ebpo"))
    assert cloudpickle.loads(stored) is skyrl.compute_ebpo_advantage


class Dispatch:
    """In the place of SkyRL's dispatch to model workers: writes and reads nothing."""

    def save_checkpoint(self, *args: Any) -> None:
        pass

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        pass

    def get_node_ids(self) -> list[str]:
        return []


def with_checkpoints(cfg: Any, resume: Any, folder: Path) -> skyrl.EBPOTrainer:
    cfg.trainer.ckpt_path = str(folder)
    made = trainer(cfg)
    made.dispatch, made.resume_mode, made.tokenizer = Dispatch(), resume, None
    made.critic_model, made._node_ids = None, ["here"]
    made._cleanup_old_checkpoints = lambda: None  # asks every node of the cluster
    made.train_dataloader = SimpleNamespace(state_dict=dict, load_state_dict=lambda _: None)
    return made


def test_the_prior_is_in_skyrls_checkpoints(tmp_path: Path) -> None:
    first = with_checkpoints(config(), ResumeMode.NONE, tmp_path)
    assert first.load_checkpoints() == (0, None)
    first.compute_advantages_and_returns(batch(0))
    saved = skyrl.estimator.get({}).state_dict()
    folder = Path(first.save_checkpoints())
    assert (folder / "ebpo_prior.json").is_file()

    skyrl.estimator.reset()
    second = with_checkpoints(config(), ResumeMode.LATEST, tmp_path)
    assert second.load_checkpoints()[0] == 7
    assert skyrl.estimator.get({}).state_dict() == saved

    (folder / "ebpo_prior.json").unlink()
    with pytest.raises(FileNotFoundError, match="allow_missing_prior"):
        second.load_checkpoints()
    skyrl.estimator.reset()
    with_checkpoints(config(allow_missing_prior="true"), ResumeMode.LATEST, tmp_path).load_checkpoints()


def test_another_estimators_checkpoints_are_left_alone(tmp_path: Path) -> None:
    cfg = config()
    cfg.trainer.algorithm.advantage_estimator = "grpo"
    folder = Path(with_checkpoints(cfg, ResumeMode.NONE, tmp_path).save_checkpoints())
    assert not (folder / "ebpo_prior.json").exists()
    with_checkpoints(cfg, ResumeMode.LATEST, tmp_path).load_checkpoints()


def test_a_misspelt_option_stops_the_command_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["main_base", "trainer.override_entrypoint=ebpo_core.integrations.skyrl"]
    monkeypatch.setattr("sys.argv", [*arguments, "trainer.algorithm.ebpo.normalise=scale"])
    with pytest.raises(ValueError, match=r"trainer\.algorithm\.ebpo has the unknown option 'normalise'"):
        main_base.main()


def test_what_would_change_or_hide_is_refused_or_warned_of() -> None:
    data, algorithm = batch(0), config().trainer.algorithm
    call = (data["rewards"], data["response_mask"], data.metadata["uids"])
    algorithm.advantage_batch_normalize = True
    with pytest.raises(ValueError, match="advantage_batch_normalize"):
        skyrl.compute_ebpo_advantage(*call, config=algorithm)
    for changed, option in (({"zero_variance_filter": True}, "zero_variance_filter"), ({}, r"dynamic_sampling\.type")):
        algorithm = config().trainer.algorithm
        algorithm.zero_variance_filter = bool(changed)
        algorithm.dynamic_sampling.type = None if changed else "filter"
        with pytest.warns(UserWarning, match=option):
            skyrl.compute_ebpo_advantage(*call, config=algorithm)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            skyrl.compute_ebpo_advantage(*call, config=algorithm)


def test_seams() -> None:
    """What this adapter rests on and SkyRL may move."""
    parameters = inspect.signature(ppo_utils.compute_advantages_and_returns).parameters
    assert {"token_level_rewards", "response_mask", "index", "config"} <= set(parameters)
    called = inspect.getsource(RayPPOTrainer.compute_advantages_and_returns)
    assert "config=self.cfg.trainer.algorithm" in called
    assert 'index=data.metadata["uids"]' in called
    assert 'f"global_step_{self.global_step}"' in inspect.getsource(RayPPOTrainer.save_checkpoints)
    assert "self.get_trainer(\n            cfg=" in inspect.getsource(main_base.BasePPOExp._setup_trainer)
    assert hasattr(config().trainer.algorithm, "advantage_batch_normalize")
    assert {"zero_variance_filter", "dynamic_sampling", "grpo_norm_by_std"} <= set(vars(config().trainer.algorithm))
