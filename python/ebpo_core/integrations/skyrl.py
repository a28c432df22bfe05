"""The advantage estimator ``ebpo`` for SkyRL, its configuration, and a trainer whose checkpoints hold the prior.

Nothing else to write: SkyRL's own command runs this module's :func:`main`::

    python -m skyrl.train.entrypoints.main_base trainer.override_entrypoint=ebpo_core.integrations.skyrl \\
        trainer.algorithm.ebpo.normalize=scale ...the options of SkyRL...

In an entry script of your own, import this module (which registers ``ebpo``), set
``trainer.algorithm.advantage_estimator=ebpo``, and put :class:`PriorCheckpoints` before your trainer.

SkyRL computes advantages in one CPU process over the whole batch, and that process holds the prior, in this module: the
registry sends estimators to other processes by cloudpickle, so that state inside a callable would be copied.
"""

# No `from __future__ import annotations` here: SkyRL builds nested dataclasses from the types of their fields.

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch
from skyrl.backends.skyrl_train.utils.io import io
from skyrl.backends.skyrl_train.utils.ppo_utils import AdvantageEstimatorRegistry
from skyrl.train.config import AlgorithmConfig, SkyRLTrainConfig, TrainerConfig
from skyrl.train.entrypoints.main_base import BasePPOExp
from skyrl.train.trainer import RayPPOTrainer
from skyrl.train.utils import initialize_ray
from skyrl.train.utils.utils import validate_cfg

from ebpo_core.checkpoint import PRIOR_NAME, prior_files, write_prior
from ebpo_core.estimator import EBPO
from ebpo_core.inputs import tensor_of
from ebpo_core.integrations import checks, process

NAME = "ebpo"
WHERE = "trainer.algorithm.ebpo"

# `pad_training_input_batch` fills the batch up with copies of its first row, whose uids it replaces by these.
_PADDING = re.compile(r"pad\d+")

estimator = process.ProcessEstimator()


@dataclass
class EBPOAlgorithmConfig(AlgorithmConfig):  # type: ignore[misc]
    """SkyRL's ``trainer.algorithm`` with the estimator's options."""

    advantage_estimator: str = NAME
    ebpo: dict[str, Any] = field(default_factory=dict)
    """Options of :class:`ebpo_core.EBPO`, and ``allow_missing_prior``."""


@dataclass
class EBPOTrainerConfig(TrainerConfig):  # type: ignore[misc]
    """SkyRL's ``trainer`` with :class:`EBPOAlgorithmConfig`."""

    algorithm: EBPOAlgorithmConfig = field(default_factory=EBPOAlgorithmConfig)


@dataclass
class EBPOTrainConfig(SkyRLTrainConfig):  # type: ignore[misc]
    """SkyRL's whole configuration with :class:`EBPOAlgorithmConfig`."""

    trainer: EBPOTrainerConfig = field(default_factory=EBPOTrainerConfig)


def compute_ebpo_advantage(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: Sequence[Any], config: Any = None, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The estimator as SkyRL calls it with a batch: the batch enters the prior, then is scored (paper, Algorithm 1).

    Args:
        token_level_rewards: ``(B, T)`` float.
        response_mask: ``(B, T)``, 1 at response tokens.
        index: ``(B,)`` uid of each row's prompt. Rows named ``pad0``, ``pad1``, ... are SkyRL's padding: they do not
            count.
        config: SkyRL's ``trainer.algorithm``; ``grpo_norm_by_std=false`` means ``normalize="none"``, as for GRPO, where
            ``ebpo.normalize`` is unset.

    Returns:
        Advantages and returns, the same ``(B, T)`` tensor twice, as SkyRL's own outcome estimators.

    Raises:
        ValueError: rewards that are not finite, wrong options, or ``advantage_batch_normalize``.
    """
    check(config)
    uids = [str(uid) for uid in index]
    real = np.array([_PADDING.fullmatch(uid) is None for uid in uids], dtype=bool)
    rewards = token_level_rewards.detach().sum(-1, dtype=torch.float64).cpu().numpy()
    checks.check_finite(np.where(real, rewards, 0.0), uids)
    advantages = tensor_of(running(config)(rewards, uids, mask=real), token_level_rewards.dtype)
    advantages = advantages.to(token_level_rewards.device).unsqueeze(-1) * response_mask
    return advantages, advantages


def running(config: Any) -> EBPO:
    """The estimator of this process, with the options in ``config`` (``trainer.algorithm``), else ``EBPO_OPTIONS``."""
    return estimator.get(getattr(config, "ebpo", None), WHERE, scaled=getattr(config, "grpo_norm_by_std", True))


def check(config: Any) -> None:
    """Refuse settings under which the advantages would not be EBPO's; warn where saturated groups are hidden."""
    if getattr(config, "advantage_batch_normalize", False):
        raise ValueError(
            "trainer.algorithm.advantage_batch_normalize=true would standardise EBPO's advantages a second time: "
            "set it to false"
        )
    if getattr(config, "zero_variance_filter", False):
        checks.warn_once("SkyRL", "trainer.algorithm.zero_variance_filter")
    if getattr(getattr(config, "dynamic_sampling", None), "type", None) is not None:
        checks.warn_once("SkyRL", "trainer.algorithm.dynamic_sampling.type")


class PriorCheckpoints:
    """Put before a SkyRL trainer: its checkpoints hold the prior, ``global_step_N/ebpo_prior.json``, and it logs it."""

    def save_checkpoints(self) -> Any:
        """The prior first: SkyRL names a checkpoint its latest when all else is written, and a run may be killed."""
        if self._uses_ebpo():
            folder = f"{self.cfg.trainer.ckpt_path}/global_step_{self.global_step}"  # type: ignore[attr-defined]
            with io.local_work_dir(folder) as local:
                ebpo = running(self.cfg.trainer.algorithm)  # type: ignore[attr-defined]
                step = self.global_step  # type: ignore[attr-defined]
                write_prior(local, ebpo, global_step=step, written_after=["trainer_state.pt"])
        return super().save_checkpoints()  # type: ignore[misc]

    def load_checkpoints(self) -> Any:
        """Restore the prior of the checkpoint that SkyRL resumed from, if it did."""
        step, folder = super().load_checkpoints()  # type: ignore[misc]
        if folder is not None and self._uses_ebpo():
            running(self.cfg.trainer.algorithm)  # type: ignore[attr-defined]
            with io.local_read_files(folder, [PRIOR_NAME]) as local:
                names = prior_files(local)
            with io.local_read_files(folder, names) as local:
                estimator.restore(local)
        return step, folder

    def compute_advantages_and_returns(self, data: Any) -> Any:
        """SkyRL's own, and the ``ebpo/`` metrics of the batch."""
        data = super().compute_advantages_and_returns(data)  # type: ignore[misc]
        if self._uses_ebpo():
            diagnostics = running(self.cfg.trainer.algorithm).diagnostics  # type: ignore[attr-defined]
            if diagnostics is not None:
                self.all_metrics.update(diagnostics.metrics())  # type: ignore[attr-defined]
        return data

    def _uses_ebpo(self) -> bool:
        return bool(self.cfg.trainer.algorithm.advantage_estimator == NAME)  # type: ignore[attr-defined]


class EBPOTrainer(PriorCheckpoints, RayPPOTrainer):  # type: ignore[misc]
    """SkyRL's ``RayPPOTrainer`` whose checkpoints hold the prior."""


class EBPOExp(BasePPOExp):  # type: ignore[misc]
    """SkyRL's experiment with :class:`EBPOTrainer`."""

    def get_trainer(self, **kwargs: Any) -> EBPOTrainer:
        """The trainer, in place of SkyRL's; the arguments are those of ``RayPPOTrainer``."""
        return EBPOTrainer(**kwargs)


@ray.remote(num_cpus=1)  # type: ignore[untyped-decorator]
def train(cfg: EBPOTrainConfig) -> None:
    """The training loop, in a process of its own as in SkyRL's entry point."""
    EBPOExp(cfg).run()


def main() -> None:
    """SkyRL's command line with EBPO; see the top of this file."""
    # SkyRL dispatches on this argument before it parses, and its configuration has no such field.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("trainer.override_entrypoint=")]
    cfg = EBPOTrainConfig.from_cli_overrides(arguments)
    check(cfg.trainer.algorithm)
    running(cfg.trainer.algorithm)  # a misspelt option fails here, before anything is loaded
    validate_cfg(cfg)
    initialize_ray(cfg)
    ray.get(train.remote(cfg))


def _register() -> None:
    # SkyRL raises on a name it knows, and its registry survives a reload of this module.
    if NAME in AdvantageEstimatorRegistry._functions:
        AdvantageEstimatorRegistry.unregister(NAME)
    AdvantageEstimatorRegistry.register(NAME, compute_ebpo_advantage)


_register()
