"""``EBPOTrainer``: TRL's ``GRPOTrainer`` with EBPO advantages (arXiv 2602.05165), and the mixin that makes it one.

Two of TRL's methods are the seam. ``_calculate_rewards`` returns the rewards of all ranks, the same tensor on each, so
every rank keeps the same prior without a collective of its own (the keys of its prompts are gathered here, where
``ebpo_keys`` asks for them). ``_generate_and_score_completions`` leaves this rank's
advantages in its output, where the mixin replaces them; nothing has used them by then.

Resuming, as TRL does it (TRL 1.16, transformers 5.23 and 5.24):

* ``_step`` counts micro-batches since the *process* started and is not saved. A generation batch is made when
  ``_step % generate_every == 0`` with ``generate_every = steps_per_generation * num_iterations``, and kept in
  ``_buffered_inputs``, which is not saved either.
* On resume the data loader is moved to micro-batch ``p = updates_in_epoch * gradient_accumulation_steps``, ``_step``
  starts at 0 and there is no buffer, so TRL generates at once, from the block of prompts that holds ``p``: block
  ``p // generate_every`` of the epoch (an epoch is a whole number of blocks). If ``p`` is inside a block, that block is
  generated again, by the newer policy, and used for ``generate_every`` micro-batches, so every later generation is
  shifted by ``p % generate_every`` against the blocks.
* Hence the rule for a checkpoint: the batch at hand is *unfinished*, and its rewards are left out of the saved prior,
  if and only if the block it came from is the block that a resumed run will generate first. Without earlier resumes
  that is ``_step % generate_every != 0``; after one, the shift counts, so the phase travels in the prior's file.
* ``RepeatSampler`` draws each epoch's order from one generator that is not saved: a run resumed in its second epoch
  would get the first epoch's order again. :meth:`EBPOMixin._load_optimizer_and_scheduler` moves it on.
* A checkpoint between generation batches and its resume therefore repeat the unbroken run exactly, prior included. One
  inside a batch cannot (the batch is generated again), but counts every block once.
* ``save_only_model`` drops the optimizer and the random state, not the prior. ``save_total_limit`` deletes folders, the
  prior with them. ``load_best_model_at_end`` puts back the best weights and leaves the prior of the last step.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from trl import GRPOTrainer  # type: ignore[attr-defined]

from ebpo_core import EBPO
from ebpo_core.checkpoint import PRIOR_NAME, CompleteCheckpoints, read_prior, write_prior
from ebpo_core.inputs import tensor_of

from .config import EBPOArguments, EBPOConfig
from .estimators import Estimators
from .keys import check_dataset, key_of_example, keys_of_groups
from .metrics import distinct, shadow_metrics, weighted_sum
from .turns import TurnRewards, by_token, policy_mask, rows_of, turn_counts

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

logger = logging.getLogger(__name__)


class EBPOMixin(CompleteCheckpoints):
    """Put in front of a GRPO-like trainer, its advantages become EBPO's: ``class T(EBPOMixin, GRPOTrainer)``.

    The trainer's ``args`` must be an :class:`EBPOArguments`. The base class must keep TRL's names
    (``_calculate_rewards``, ``_generate_and_score_completions``, ``_metrics``, ``_logs``, ``_step``), as
    ``RLOOTrainer`` and the classes Unsloth patches do; what such a class adds to the reward beyond the weighted sum
    (RLOO's KL term and clipping) is not in EBPO's advantages, so those settings raise.

    Attributes:
        ebpos: the estimators (:class:`ebpo_core.EBPO`), the same on every rank: one, or with ``ebpo_per_reward`` one
            for each reward function.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_args(self.args)
        if hasattr(self, "reward_clip_range"):  # RLOO
            for name, neutral in (("beta", 0.0), ("reward_clip_range", None), ("normalize_advantages", False)):
                if getattr(self.args, name, neutral) != neutral:
                    raise ValueError(
                        f"{name}={getattr(self.args, name)!r}: {type(self).__name__} changes the reward or the "
                        f"advantages with it, which EBPO would not see; set {name}={neutral!r}"
                    )
        self.reward_func_names[:] = distinct(self.reward_func_names)  # TRL would log two of one name as one
        self._ebpo_turn_rewards = TurnRewards()
        if self.args.ebpo_turns:
            self._check_turns()
            record = self._ebpo_turn_rewards.recorded  # in a list of our own: TRL's is the caller's
            self.reward_funcs: list[Any] = [record(i, function) for i, function in enumerate(self.reward_funcs)]
        names = self.reward_func_names if self.args.ebpo_per_reward else None
        self._estimators = Estimators(self.args.ebpo_options(), names)
        if self.args.ebpo_prior is not None:
            self._estimators.load(read_prior(self.args.ebpo_prior))
        self._check_keys()
        self._ebpo_rewards: torch.Tensor | None = None  # gathered rewards, from one seam method to the other
        self._ebpo_completions: Any = None  # this rank's, likewise
        self._ebpo_has_batch = False  # whether the estimators' last update was with the generation batch at hand
        self._ebpo_generated_at = 0  # `_step` when that batch was generated
        self._ebpo_shift = 0  # `_step + shift` is the micro-batch's place in the data, modulo generate_every
        self._ebpo_sampler: Any = None

    @property
    def ebpos(self) -> list[EBPO]:
        return self._estimators.all

    @property
    def ebpo(self) -> EBPO:
        """The one estimator; with ``ebpo_per_reward`` and several reward functions see ``ebpos``."""
        if len(self.ebpos) > 1:
            raise ValueError("ebpo_per_reward=True keeps one estimator per reward function: use trainer.ebpos")
        return self.ebpos[0]

    def _check_turns(self) -> None:
        if hasattr(self, "reward_clip_range"):
            raise ValueError(
                f"ebpo_turns=True: the loss of {type(self).__name__} has one advantage a completion; use EBPOTrainer"
            )
        if getattr(self.args, "use_liger_kernel", False):
            raise ValueError("ebpo_turns=True: Liger's loss has one advantage a completion; set use_liger_kernel=False")

    def _check_keys(self) -> None:
        """Refuse what a later batch would be refused for: the first one, or that with one key too many."""
        columns, track = self.args.ebpo_key_columns(), self.args.ebpo_track_prompts
        if not columns and not track:
            return
        known = [key for key in self.ebpos[0].priors if key != ()]
        # Where TRL's agent loop is not bounded, a turn too many is found out when it is taken.
        calls = getattr(self.args, "max_tool_calling_iterations", None)
        turns = 0 if calls is None or not self.args.ebpo_turns else calls + 1
        limit = self.args.ebpo_max_keys
        check_dataset(columns, self.train_dataset, limit, known, turns=turns, track_prompts=track)
        if not columns:
            return
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        for dataset in evaluated.values():
            if columns[0] in (getattr(dataset, "column_names", None) or ()):  # without it, evaluation uses the root
                check_dataset(columns, dataset)

    # ---- the seam -----------------------------------------------------------------------------------------------

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        rewards: torch.Tensor = super()._calculate_rewards(inputs, prompts, completions, *args, **kwargs)
        self._ebpo_rewards, self._ebpo_completions = rewards, completions
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        group_size = self.num_generations if mode == "train" else self.num_generations_eval
        # One key per group, gathered, since each rank knows its own prompts alone.
        columns, track = self.args.ebpo_key_columns(), self.args.ebpo_track_prompts
        keys = None
        if (columns or track) and (mode == "train" or not columns or columns[0] in inputs[0]):
            # In a list of its own, for gather_object joins the lists of all ranks.
            own = [key_of_example(columns, track, row) for row in inputs]
            keys = keys_of_groups(gather_object(own), group_size, columns)

        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self._ebpo_rewards is None:
            raise RuntimeError(f"{type(self).__name__}: the base class scored completions without _calculate_rewards")
        # Rewards of all ranks, (N, n_funcs), to one per completion, (M, G).
        gathered, self._ebpo_rewards = self._ebpo_rewards, None
        rewards_per_func = gathered.detach().cpu().double().numpy()
        weights = self.reward_weights.cpu().double().numpy()
        rewards = weighted_sum(rewards_per_func, weights).reshape(-1, group_size)
        # Every rank computes the advantages of all, (M, G), and so keeps the same prior.
        turns = self._ebpo_turns(output, gathered) if self.args.ebpo_turns else None
        if turns is None:
            advantages = self._ebpo_advantages(rewards, rewards_per_func, weights, keys, update=mode == "train")
        else:
            turn_advantages = self._ebpo_turn_advantages(turns, group_size, weights, keys, update=mode == "train")
            advantages = np.array([of_one.mean() for of_one in turn_advantages])  # for the log: one a completion
        if mode == "train":
            self._ebpo_has_batch, self._ebpo_generated_at = True, self._step
        metrics = self._estimators.metrics()

        # This rank's slice takes the place of TRL's advantages; in shadow mode both are only logged.
        local: torch.Tensor = output["advantages"]
        ours = tensor_of(advantages.reshape(-1), local.dtype)  # of all ranks
        logged = self._logs["advantages"]
        if self.args.ebpo_shadow:
            # TRL keeps at most one training batch in its log; the same tail of ours is compared and shown beside it.
            shown = min(len(ours), len(logged))
            trl = np.array(list(logged)[len(logged) - shown :], dtype=np.float64)
            metrics |= shadow_metrics(trl, advantages.reshape(-1)[len(ours) - shown :], rewards)
            self._logs["extra"]["ebpo_advantage"].extend(ours.tolist())
        else:
            start = self.accelerator.process_index * len(local)  # rank-major, as TRL slices
            output["advantages"] = ours[start : start + len(local)].to(local.device)
            if turns is not None:
                of_rank = turn_advantages[start : start + len(local)]
                output["advantages"] = by_token(of_rank, policy_mask(output), local.dtype)
            for _ in range(min(len(ours), len(logged))):
                logged.pop()
            logged.extend(ours.tolist())
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        return output

    def _ebpo_turns(self, output: dict[str, Any], gathered: torch.Tensor) -> list[NDArray[np.float64]]:
        """The rewards ``(n_funcs, K)`` of the turns of each completion of all ranks."""
        counts = turn_counts(policy_mask(output), self._ebpo_completions)
        start = self.accelerator.process_index * len(counts)
        own = self._ebpo_turn_rewards.take(gathered[start : start + len(counts)], counts, self.reward_func_names)
        return list(gather_object(own))

    def _ebpo_turn_advantages(
        self,
        turns: list[NDArray[np.float64]],
        group_size: int,
        weights: NDArray[np.float64],
        keys: list[Any] | None,
        *,
        update: bool,
    ) -> list[NDArray[np.float64]]:
        """EBPO on the turns of all completions; one array a completion."""
        rows = rows_of(turns, group_size)
        call: dict[str, Any] = {
            "groups": rows.groups,
            "trajectories": rows.trajectories,
            "turns": rows.turns,
            "gamma": self.args.ebpo_gamma,
            "keys": None if keys is None else [keys[group] for group in rows.groups],
            "update": update,
        }
        if self.args.ebpo_per_reward:
            return rows.of_completions(self._estimators.weighted(rows.rewards, weights, **call))
        return rows.of_completions(self.ebpo(rows.weighted(weights), **call))

    def _ebpo_advantages(
        self,
        rewards: NDArray[np.float64],
        rewards_per_func: NDArray[np.float64],
        weights: NDArray[np.float64],
        keys: list[Any] | None,
        *,
        update: bool,
    ) -> NDArray[np.float64]:
        """EBPO on ``rewards`` ``(M, G)``; a refusal by the core names the reward functions it came from."""
        try:
            if not self.args.ebpo_per_reward:
                return self.ebpo(rewards, update=update, keys=keys)
            per_reward = rewards_per_func.T.reshape(-1, *rewards.shape)
            return self._estimators.weighted(per_reward, weights, update=update, keys=keys)
        except (TypeError, ValueError) as error:
            infinite = np.isinf(rewards_per_func)
            if not infinite.any():
                raise
            functions = [self.reward_func_names[i] for i in np.unique(np.nonzero(infinite)[1])]
            error.add_note(
                f"These rewards are those of the reward functions {self.reward_func_names}; infinite values "
                f"(in float32) came from {functions}, completions {np.unique(np.nonzero(infinite)[0]).tolist()[:8]} "
                "of the gathered batch. Return a finite number, or None for a completion that cannot be scored."
            )
            raise

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def save_prior(self, path: str | os.PathLike[str]) -> Path:
        """Write the prior as it is now, for ``ebpo_prior`` of a later run. Call it on one process.

        Args:
            path: a folder, or a file name ending in ``.json``.
        """
        return write_prior(path, self._estimators.state(), global_step=self.state.global_step)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``, but ``resume_from_checkpoint=True`` takes the last *complete* checkpoint.

        Raises:
            FileNotFoundError: the checkpoint has no prior and ``ebpo_allow_missing_prior`` is not set.
            ValueError: ``True`` and no complete checkpoint in ``output_dir``, or a prior that cannot be loaded.
        """
        self._ebpo_shift = -self._step
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _generate_every(self) -> int:
        return int(self.args.steps_per_generation * self.num_iterations)

    def _ebpo_finished_state(self) -> Any:
        """The estimators without the batch that a run resumed from here generates again."""
        every = self._generate_every()
        block = (self._ebpo_generated_at + self._ebpo_shift) // every
        resumed = (self._step + self._ebpo_shift) // every
        again = self._ebpo_has_batch and block == resumed and not self.args.ignore_data_skip
        return self._estimators.state(before_update=again)

    def write_first(self, checkpoint: Path) -> None:
        every = self._generate_every()
        write_prior(
            checkpoint,
            self._ebpo_finished_state(),
            global_step=self.state.global_step,
            generation_phase=(self._step + self._ebpo_shift) % every,
            generate_every=every,
            written_after=["entropy_ctrl_state.json"] if getattr(self, "use_adaptive_entropy", False) else [],
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._ebpo_resume(Path(checkpoint))

    def _ebpo_resume(self, checkpoint: Path) -> None:
        every = self._generate_every()
        phase = self.state.global_step * self.args.gradient_accumulation_steps % every
        if (checkpoint / PRIOR_NAME).is_file() or not self.args.ebpo_allow_missing_prior:
            try:
                content = read_prior(checkpoint)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{error}; to resume a run that had no prior, set ebpo_allow_missing_prior=True"
                ) from error
            self._estimators.load(content)
            self._check_keys()
            if content.get("generate_every") == every:
                phase = content["generation_phase"]
        else:
            logger.warning(
                "%s has no %s: the prior starts %s",
                checkpoint,
                PRIOR_NAME,
                "empty" if self.args.ebpo_prior is None else f"from {self.args.ebpo_prior}",
            )
        self._ebpo_shift = (0 if self.args.ignore_data_skip else phase) - self._step
        # Left from an earlier train() of this very trainer, these would stand in for the batch to be generated again.
        self._buffered_inputs = None
        self._ebpo_has_batch = False
        sampler = self._ebpo_sampler
        if getattr(sampler, "shuffle", False):
            for _ in range(int(self.state.epoch or 0)):
                torch.randperm(sampler.num_samples, generator=sampler.generator)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._ebpo_sampler = super()._get_train_sampler(dataset)
        return self._ebpo_sampler


def _check_args(args: object) -> None:
    if not isinstance(args, EBPOArguments):
        raise TypeError(
            f"args is a {type(args).__name__}, which has no `ebpo_` fields: use EBPOConfig, or a dataclass that also "
            "derives from EBPOArguments"
        )


class EBPOTrainer(EBPOMixin, GRPOTrainer):
    """``trl.GRPOTrainer`` with EBPO advantages: the same arguments, with ``args`` an :class:`EBPOConfig`.

    Metrics beside TRL's own: ``ebpo/shrinkage``, ``ebpo/prior_mean``, ``ebpo/sigma2``, ``ebpo/tau2``,
    ``ebpo/saturated_fail``, ``ebpo/saturated_pass``, ``ebpo/dead_advantage``, ``ebpo/outlier`` (in evaluation with the
    prefix ``eval_``, against the prior as training left it), and ``ebpo/shadow_*`` in shadow mode. With
    ``ebpo_per_reward`` there is ``ebpo/<reward function>/shrinkage`` and so on; functions of one name are numbered, as
    in TRL's ``rewards/<lambda>_1/mean``.
    """

    _tag_names = ["trl", "grpo", "ebpo"]  # noqa: RUF012 -- TRL declares it so
    _name = "EBPO"
    _paper = {  # noqa: RUF012
        "title": "EBPO: Empirical Bayes Shrinkage for Stabilizing Group-Relative Policy Optimization",
        "id": "2602.05165",
        "citation": (
            "@article{han2026ebpo,\n"
            "    title  = {{EBPO: Empirical Bayes Shrinkage for Stabilizing Group-Relative Policy Optimization}},\n"
            "    author = {Han and Zhou and Gao and Zhou and Li and Kumar and Fan and Li and Zhang},\n"
            "    year   = 2026,\n"
            "    eprint = {arXiv:2602.05165}\n"
            "}"
        ),
    }

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: EBPOConfig | None = None, *rest: Any, **kwargs: Any
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = EBPOConfig(f"{str(name).rstrip('/').split('/')[-1] or 'model'}-EBPO")
        _check_args(args)  # before a model is loaded for nothing
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
