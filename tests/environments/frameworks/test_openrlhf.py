"""OpenRLHF's experience maker and trainer with EBPO, against the NumPy twin and OpenRLHF's own code."""

# ruff: noqa: E402 - what is imported last needs what comes before it
from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bare_openrlhf
import bare_trainer
import numpy as np
import pytest
import ray
import torch

bare_openrlhf.stand_ins()

from deepspeed.runtime.engine import DeepSpeedEngine
from openrlhf.trainer import ppo_trainer
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

from ebpo_core import reference
from ebpo_core.checkpoint import find_prior, read_prior
from ebpo_core.integrations.contrib import openrlhf

LONGEST, GROUP = 4, 3


def arguments(estimator: str = "dr_grpo", **reward: Any) -> Any:
    advantage = SimpleNamespace(estimator=estimator, gamma=1.0, lambd=1.0, no_std_norm=False)
    return SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage, dynamic_filtering_enable=False),
        reward=SimpleNamespace(**{"clip_range": (-10, 10), "overlong_buffer_len": None, **reward}),
        rollout=SimpleNamespace(n_samples_per_prompt=GROUP, max_new_tokens=LONGEST),
        ckpt=SimpleNamespace(path="", load_enable=False, save_steps=1),
        logger=SimpleNamespace(logging_steps=10),
    )


def maker(args: Any, kl: float = 0.0, cls: type = openrlhf.EBPOExperienceMaker) -> Any:
    return cls(None, None, None, None, SimpleNamespace(value=kl), SimpleNamespace(args=args), None)


def experiences(seed: int, prompts: int = 4) -> list[Experience]:
    """Micro-batches of two rows, whose rows were reordered by length, as OpenRLHF's dynamic batches are."""
    rng = np.random.default_rng(seed)
    rows = prompts * GROUP
    rewards = rng.choice([0.0, 0.5, 1.0], rows)
    rewards[:GROUP] = 0.0
    order = rng.permutation(rows)
    made = []
    for part in np.split(order, rows // 2):
        lengths = rng.integers(1, LONGEST + 1, len(part))
        mask = torch.from_numpy(np.arange(LONGEST) < lengths[:, None])
        made.append(
            Experience(
                index=part.tolist(),
                sequences=torch.ones(len(part), LONGEST + 2, dtype=torch.long),
                action_mask=mask,
                rewards=torch.from_numpy(rewards[part]).float(),
                response_length=torch.from_numpy(lengths),
                kl=torch.from_numpy(rng.normal(size=(len(part), LONGEST))).float(),
                info={},
            )
        )
    return made


def by_place(made: list[Experience], values: list[Any]) -> np.ndarray:
    places = np.concatenate([experience.index for experience in made])
    out = np.empty(len(places))
    out[places] = np.concatenate(values)
    return out


def test_advantages_equal_the_twin_over_steps() -> None:
    twin = reference.EBPO()
    for step in range(3):
        made = experiences(step)
        rewards = by_place(made, [experience.rewards.double().numpy() for experience in made])
        expected = twin(rewards.reshape(-1, GROUP)).reshape(-1)
        done = maker(arguments()).compute_advantages_and_returns(made)
        for experience in done:
            wanted = expected[experience.index][:, None] * experience.action_mask.numpy()
            np.testing.assert_allclose(experience.advantages * experience.action_mask, wanted, rtol=1e-5, atol=1e-6)
            assert torch.equal(experience.advantages, experience.returns)
            assert experience.kl is None


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_everything_but_the_baseline_is_openrlhfs(kl: float) -> None:
    """OpenRLHF's own function, given EBPO's advantages for rewards and told to subtract and whiten nothing."""
    mine = maker(arguments(), kl).compute_advantages_and_returns(experiences(1))
    theirs = experiences(1)
    rewards = by_place(theirs, [experience.rewards.double().numpy() for experience in theirs])
    advantages = torch.from_numpy(reference.EBPO()(rewards.reshape(-1, GROUP)).reshape(-1)).float()
    for experience in theirs:
        experience.rewards = advantages[experience.index]
    other = maker(arguments("none of theirs"), kl, RemoteExperienceMaker)
    other.advantage_estimator = "reinforce"
    for a, b in zip(mine, other.compute_advantages_and_returns(theirs), strict=True):
        torch.testing.assert_close(a.advantages, b.advantages, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.info["return"], b.info["return"], rtol=1e-5, atol=1e-6)


def test_the_logged_spread_of_groups_is_openrlhfs() -> None:
    mine = maker(arguments()).compute_advantages_and_returns(experiences(2))
    theirs = maker(arguments(), cls=RemoteExperienceMaker).compute_advantages_and_returns(experiences(2))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.info["group_reward_std"], b.info["group_reward_std"], rtol=1e-5, atol=1e-6)


def test_length_penalties_come_before_the_baseline() -> None:
    args = arguments(overlong_buffer_len=2, overlong_penalty_factor=1.0)
    made = experiences(3)
    penalised = experiences(3)
    from openrlhf.trainer.ppo_utils.length_penalty import apply_length_penalties

    apply_length_penalties(penalised, args)
    rewards = by_place(penalised, [experience.rewards.double().numpy() for experience in penalised])
    assert (rewards < 0).any()
    expected = reference.EBPO()(rewards.reshape(-1, GROUP)).reshape(-1)
    for experience in maker(args).compute_advantages_and_returns(made):
        np.testing.assert_allclose(experience.advantages[:, 0], expected[experience.index], rtol=1e-5, atol=1e-6)


class Actors:
    """In the place of OpenRLHF's group of model actors: keeps client states, makes folders as DeepSpeed does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.states: dict[str, Any] = {}

    def async_run_method(self, method_name: str, **kwargs: Any) -> list[Any]:
        if method_name == "save_checkpoint":
            self.states = kwargs["client_states"]
            (self.folder / kwargs["tag"]).mkdir(parents=True)
            (self.folder / "latest").write_text(kwargs["tag"])
            return [ray.put(None)]
        return [ray.put(self.states)]


def trainer(actors: Actors, args: Any) -> openrlhf.EBPOTrainer:
    made = object.__new__(openrlhf.EBPOTrainer)
    made.args, made.actor_model_group, made.critic_model_group = args, actors, None
    made.wandb_logger = made.tensorboard_logger = made._latest_eval_metric_value = None
    made.best_eval_metric_key, made.best_eval_metric_value = "", 0.0
    return made


def test_the_prior_is_in_openrlhfs_checkpoints(local_ray: None, tmp_path: Path) -> None:
    maker(arguments()).compute_advantages_and_returns(experiences(0))
    saved = openrlhf.estimator.get().state_dict()
    args, actors = arguments(), Actors(tmp_path / "_actor")
    args.ckpt.path, args.ckpt.load_enable = str(tmp_path), True
    trainer(actors, args).save_logs_and_checkpoints(4, {}, {"global_step": 4})
    assert actors.states["global_step"] == 4
    assert read_prior(find_prior(tmp_path))["ebpo"] == saved
    assert find_prior(tmp_path) == tmp_path / "_actor" / "global_step4" / "ebpo_prior.json"

    openrlhf.estimator.reset()
    trainer(actors, args).init_checkpoint_states()
    assert openrlhf.estimator.get().state_dict() == saved

    find_prior(tmp_path).unlink()
    with pytest.raises(FileNotFoundError, match=r"global_step4.*ebpo_prior\.json.*allow_missing_prior"):
        trainer(actors, args).init_checkpoint_states()


def test_the_prior_is_in_the_best_checkpoint_too(local_ray: None, tmp_path: Path) -> None:
    maker(arguments()).compute_advantages_and_returns(experiences(0))
    saved = openrlhf.estimator.get().state_dict()
    args, actors = arguments(), Actors(tmp_path / "_actor")
    args.ckpt.path, args.ckpt.load_enable = str(tmp_path), True
    made = trainer(actors, args)
    made.save_best_checkpoint({"eval_math_pass1": 0.5}, 3, {"global_step": 3})
    openrlhf.estimator.reset()
    trainer(actors, args).init_checkpoint_states()
    assert openrlhf.estimator.get().state_dict() == saved
    made.save_best_checkpoint({"eval_math_pass1": 0.25}, 5, {"global_step": 5})  # no better: no checkpoint
    assert [folder.name for folder in (tmp_path / "_actor").iterdir() if folder.is_dir()] == ["best_global_step3"]


def bare_arguments() -> Any:
    """What the trainer's constructor reads beside the arguments above."""
    args = arguments()
    args.eval, args.data = SimpleNamespace(steps=-1), SimpleNamespace(disable_fast_tokenizer=False)
    args.algo.kl = SimpleNamespace(target=None, init_coef=0.0)
    args.logger.wandb, args.logger.tensorboard_dir = SimpleNamespace(key=None), None
    return args


def test_the_trainer_makes_ebpos_experience_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in bare_openrlhf.PARTS:
        monkeypatch.setattr(ppo_trainer, name, getattr(ppo_trainer, name))
    bare_openrlhf.without_models(ppo_trainer)
    strategy = SimpleNamespace(args=bare_arguments())
    made = openrlhf.EBPOTrainer("model", strategy, "actor", None, None, "initial", None)
    assert type(made.experience_maker) is openrlhf.EBPOExperienceMaker
    assert made.experience_maker.actor_model_group == "actor"
    assert made.experience_maker.initial_model_group == "initial"
    assert made.experience_maker.kl_ctl is made.kl_ctl
    assert made.experience_maker.tokenizer == "tokenizer"


def test_install_replaces_the_trainer_and_ray_runs_it(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As OpenRLHF's command does: the driver starts the actor, in a process that has imported nothing of ours."""
    monkeypatch.setattr(ppo_trainer, "PPOTrainer", ppo_trainer.PPOTrainer)
    monkeypatch.setattr(openrlhf, "EBPOTrainer", bare_trainer.BareTrainer)
    openrlhf.install()
    path = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    strategy = SimpleNamespace(args=bare_arguments())
    made = ppo_trainer.PPOTrainer.options(runtime_env=path).remote("model", strategy, None, None, None, None, None)
    assert ray.get(made.init_checkpoint_states.remote())["global_step"] == 0
    assert ray.get(made.maker.remote()) == "EBPOExperienceMaker"
    ray.kill(made)


def test_what_would_break_groups_or_hide_them_is_refused_or_warned_of() -> None:
    with pytest.raises(ValueError, match="rloo, dr_grpo, reinforce_baseline, group_norm"):
        maker(arguments("gae")).compute_advantages_and_returns(experiences(0))
    args = arguments()
    args.algo.dynamic_filtering_enable = True
    with pytest.warns(UserWarning, match="--algo.dynamic_filtering_enable"):
        maker(args).compute_advantages_and_returns(experiences(0))


def test_seams() -> None:
    """What this adapter rests on and OpenRLHF may move."""
    command = Path(inspect.getfile(ppo_trainer)).parents[1] / "cli" / "train_ppo_ray.py"
    text = command.read_text()
    assert "from openrlhf.trainer.ppo_trainer import PPOTrainer\n" in text[text.index("def train(") :]
    choices = text[text.index('"--algo.advantage.estimator"') :]
    assert all(f'"{name}"' in choices[:400] for name in openrlhf.GROUPED)
    parameters = list(inspect.signature(RemoteExperienceMaker.__init__).parameters)[1:8]
    assert parameters == [
        "actor_model_group",
        "critic_model_group",
        "reward_model_group",
        "initial_model_group",
        "kl_controller",
        "strategy",
        "tokenizer",
    ]
    assert 'os.path.join(self.args.ckpt.path, "_actor")' in inspect.getsource(ppo_trainer.BasePPOTrainer)
    assert 'tag = f"best_global_step{global_step}"' in inspect.getsource(
        ppo_trainer.BasePPOTrainer.save_best_checkpoint
    )
    saving = inspect.getsource(ppo_trainer.BasePPOTrainer.save_logs_and_checkpoints)
    assert "global_step % self.args.ckpt.save_steps == 0" in saving
    assert 'tag = f"global_step{global_step}"' in saving
    assert "os.path.join(save_dir, 'latest')" in inspect.getsource(DeepSpeedEngine.save_checkpoint)
    assert "experience.advantages = experience.returns.clone()" in inspect.getsource(
        RemoteExperienceMaker.compute_advantages_and_returns
    )
