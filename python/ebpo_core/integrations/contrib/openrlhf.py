"""EBPO for OpenRLHF's Ray trainer. OpenRLHF has no hook for an estimator: a subclass takes its trainer's place. Run ::

    python -m ebpo_core.integrations.contrib.openrlhf --algo.advantage.estimator dr_grpo ...

in place of ``python -m openrlhf.cli.train_ppo_ray``, with the same arguments. ``--algo.advantage.estimator`` must name
an estimator that OpenRLHF's parser knows and that takes groups (``rloo``, ``dr_grpo``, ``reinforce_baseline``,
``group_norm``); which one makes no difference, EBPO's advantages take its place. Options come from ``EBPO_OPTIONS``.

The synchronous trainer only: ``--train.async_enable`` uses other classes.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from openrlhf.trainer import ppo_trainer
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker, apply_length_penalties, compute_reward

from ebpo_core.checkpoint import write_prior
from ebpo_core.inputs import tensor_of
from ebpo_core.integrations import checks, process

GROUPED = ("rloo", "dr_grpo", "reinforce_baseline", "group_norm")

estimator = process.ProcessEstimator()


class EBPOExperienceMaker(RemoteExperienceMaker):  # type: ignore[misc]
    """OpenRLHF's experience maker with EBPO's advantages, and without the whitening that some estimators get after."""

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: Sequence[Any]) -> Sequence[Any]:
        """Length penalties, then EBPO in place of the group baseline, then KL in the reward, as OpenRLHF does.

        Args:
            experiences: OpenRLHF's, rows in any order; ``index`` holds each row's place in prompt order, in which
                ``rollout.n_samples_per_prompt`` rows follow each other.

        Returns:
            The same experiences, with ``advantages`` and ``returns`` of the shape of ``action_mask``.

        Raises:
            ValueError: wrong settings or options, or rewards that are not finite.
        """
        args = self.strategy.args
        check(args)
        for experience in experiences:
            experience.rewards = experience.rewards.to(torch.promote_types(experience.rewards.dtype, torch.float32))
        apply_length_penalties(experiences, args)
        rewards = torch.cat([experience.rewards for experience in experiences]).double().cpu().numpy()
        places = np.concatenate([np.asarray(experience.index, dtype=np.int64) for experience in experiences])
        checks.check_finite(rewards)
        # EBPO of all N rows, by their places in prompt order.
        groups = places // args.rollout.n_samples_per_prompt
        scored = estimator.get()(rewards, groups)
        spread = torch.from_numpy(group_std(rewards, groups))
        # Each experience gets its rows back, with KL and clipping as OpenRLHF applies them.
        sizes = [len(experience.index) for experience in experiences]
        of_experience = np.split(scored, np.cumsum(sizes)[:-1]), torch.split(spread, sizes)
        for experience, advantages, std in zip(experiences, *of_experience, strict=True):
            experience.info["group_reward_std"] = std.to(experience.rewards)
            reward = compute_reward(
                tensor_of(advantages, experience.rewards.dtype).to(experience.rewards.device),
                self.kl_ctl.value,
                experience.kl,
                action_mask=experience.action_mask,
                reward_clip_range=args.reward.clip_range,
            )
            experience.returns = self.get_cumulative_returns(reward, experience.action_mask, 1.0)
            experience.advantages = experience.returns.clone()
            experience.info["return"] = reward.sum(dim=-1)
            experience.kl = None
        return experiences


def check(args: Any) -> None:
    """Refuse settings under which groups would not be kept together; warn where saturated groups are hidden."""
    if args.algo.advantage.estimator not in GROUPED:
        raise ValueError(
            f"--algo.advantage.estimator {args.algo.advantage.estimator}: EBPO takes the place of one that works on "
            f"groups; name one of {', '.join(GROUPED)}"
        )
    if getattr(args.algo, "dynamic_filtering_enable", False):
        checks.warn_once("OpenRLHF", "--algo.dynamic_filtering_enable")


def group_std(rewards: np.ndarray[Any, Any], groups: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """``(N,)``: the standard deviation (n - 1) of each row's group, which OpenRLHF logs; 0 for a group of one."""
    _, index, counts = np.unique(groups, return_inverse=True, return_counts=True)
    means = np.bincount(index, rewards) / counts
    squares = np.bincount(index, (rewards - means[index]) ** 2)
    return np.asarray(np.sqrt(squares / np.maximum(counts - 1, 1))[index])


# Ray wraps the class of an actor, and what was wrapped is what can be derived from.
_PPOTrainer: Any = ppo_trainer.PPOTrainer.__ray_metadata__.modified_class


class EBPOTrainer(_PPOTrainer):  # type: ignore[misc]
    """OpenRLHF's synchronous trainer with :class:`EBPOExperienceMaker`; the prior is in its checkpoints' folders."""

    experience_maker: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check(self.args)
        maker: Any = self.experience_maker
        self.experience_maker = EBPOExperienceMaker(
            maker.actor_model_group,
            maker.critic_model_group,
            maker.reward_model_group,
            maker.initial_model_group,
            maker.kl_ctl,
            maker.strategy,
            maker.tokenizer,
        )

    def save_logs_and_checkpoints(self, global_step: int, logs_dict: Any = None, client_states: Any = None) -> None:
        """OpenRLHF's own, with the prior in the checkpoint's folder, where it saves one."""
        super().save_logs_and_checkpoints(global_step, logs_dict, client_states)
        if global_step % self.args.ckpt.save_steps == 0:
            self._write_prior(f"global_step{global_step}", global_step)

    def save_best_checkpoint(self, eval_metrics: Any, global_step: int, client_states: Any = None) -> None:
        """OpenRLHF's own, with the prior in the checkpoint's folder, where it saves one."""
        best = self.best_eval_metric_value
        super().save_best_checkpoint(eval_metrics, global_step, client_states)
        if self.best_eval_metric_value > best:
            self._write_prior(f"best_global_step{global_step}", global_step)

    def init_checkpoint_states(self) -> Any:
        """OpenRLHF's own; restores the prior where OpenRLHF resumes.

        Raises:
            FileNotFoundError: the checkpoint holds no prior, and ``allow_missing_prior`` is not set.
        """
        states = super().init_checkpoint_states()
        estimator.get()
        if states.get("global_step", 0):
            latest = self._checkpoints() / "latest"  # DeepSpeed's: the name of the folder that it loads
            estimator.restore(latest.with_name(latest.read_text(encoding="utf-8").strip()))
        return states

    def _checkpoints(self) -> Path:
        return Path(self.args.ckpt.path) / "_actor"

    def _write_prior(self, tag: str, global_step: int) -> None:
        folder = self._checkpoints() / tag
        if folder.is_dir():  # there is none where OpenRLHF saves weights alone
            write_prior(folder, estimator.get(), global_step=global_step)


def install() -> None:
    """Put :class:`EBPOTrainer` in the place of OpenRLHF's trainer, in this process, which starts the training."""
    ppo_trainer.PPOTrainer = ray.remote(EBPOTrainer)


if __name__ == "__main__":
    # Python runs this file as `__main__`; Ray must find the classes in the module of this name.
    from ebpo_core.integrations.contrib.openrlhf import install as install_once

    install_once()
    sys.argv[0] = "openrlhf.cli.train_ppo_ray"
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)
