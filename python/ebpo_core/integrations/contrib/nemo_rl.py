"""The advantage estimator ``ebpo`` for NeMo-RL. NeMo-RL has no registry, so :func:`install` patches it.

In a copy of NeMo-RL's ``examples/run_grpo.py``, before anything of it runs::

    import ebpo_core.integrations.contrib.nemo_rl as ebpo

    ebpo.install()

and in the YAML file::

    grpo:
      adv_estimator: {name: ebpo, ebpo: {normalize: scale}}

Two functions are replaced, in the driver: ``_create_advantage_estimator`` answers to the name ``ebpo``, and
``CheckpointManager.init_tmp_checkpoint`` also writes the prior, into the folder that NeMo-RL renames when it is whole.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import sys
from typing import Any

import torch
from nemo_rl.utils.checkpoint import CheckpointManager

from ebpo_core.checkpoint import write_prior
from ebpo_core.integrations import checks, process

NAME = "ebpo"
WHERE = "grpo.adv_estimator.ebpo"

_GRPO = "nemo_rl.algorithms.grpo"
_FACTORY = "_create_advantage_estimator"
# These import the factory by name, so each holds a reference of its own.
_COPIES = ("nemo_rl.algorithms.grpo_sync", "nemo_rl.algorithms.single_controller_utils.setup")

estimator = process.ProcessEstimator()


class EBPOAdvantageEstimator:
    """NeMo-RL's estimator protocol: made once before training, called with each batch.

    Args:
        estimator_config: ``grpo.adv_estimator``, whose field ``ebpo`` holds the estimator's options. Without it the
            options of ``EBPO_OPTIONS`` hold. ``normalize_rewards: false`` means ``normalize="none"``, where neither
            says.
        loss_config: Not used.

    Attributes:
        last_metrics: ``ebpo/`` metrics of the last batch. NeMo-RL's asynchronous trainer logs them.
    """

    def __init__(self, estimator_config: Any, loss_config: Any = None) -> None:  # noqa: ARG002
        scaled = getattr(estimator_config, "normalize_rewards", True)
        self.ebpo = estimator.get(getattr(estimator_config, "ebpo", None), WHERE, scaled=scaled)
        self.last_metrics: dict[str, float] = {}

    def compute_advantage(
        self, prompt_ids: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """The batch enters the prior, then is scored (paper, Algorithm 1).

        Args:
            prompt_ids: ``(B, S)`` prompt tokens, equal rows for completions of one prompt; or ``(B,)`` ids.
            rewards: ``(B,)`` float.
            mask: ``(B, T)``; only its shape matters, as in NeMo-RL's own GRPO: rows masked out of the loss count.

        Returns:
            ``(B, T)``, each row's advantage at every token, in dtype and device of ``rewards``.

        Raises:
            ValueError: a reward that is not finite, or shapes that do not fit. The prior is then untouched.
        """
        values = rewards.detach().to("cpu", torch.float64).reshape(-1)
        checks.check_finite(values.numpy())
        advantages = torch.as_tensor(self.ebpo(values, prompt_groups(prompt_ids)))
        diagnostics = self.ebpo.diagnostics
        self.last_metrics = {} if diagnostics is None else diagnostics.metrics()
        return advantages.to(rewards.device, rewards.dtype).unsqueeze(-1).expand(mask.shape)


def prompt_groups(prompt_ids: torch.Tensor) -> list[bytes] | list[int]:
    """One id a row of ``prompt_ids``, equal where rows are: a hash of the row's bytes, so linear in the batch."""
    if prompt_ids.dim() == 1:
        ids: list[int] = prompt_ids.tolist()
        return ids
    rows = prompt_ids.detach().cpu().contiguous().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]


def install() -> None:
    """Patch NeMo-RL in this process (see the top of this file). Call it in the driver; a second call does nothing.

    Raises:
        ImportError: NeMo-RL has moved what is patched; the error says what.
    """
    grpo = importlib.import_module(_GRPO)
    original = getattr(grpo, _FACTORY, None)
    if original is None or not hasattr(CheckpointManager, "init_tmp_checkpoint"):
        raise ImportError(
            f"this NeMo-RL has no {_GRPO}.{_FACTORY}, or no CheckpointManager.init_tmp_checkpoint: "
            "see docs/frameworks.md for the version that this was made for"
        )
    if not hasattr(original, "__wrapped__"):
        factory = _with_ebpo(original)
        setattr(grpo, _FACTORY, factory)
        for name in _COPIES:
            module = sys.modules.get(name)  # one that is imported later takes the new function from grpo
            if getattr(module, _FACTORY, None) is original:
                setattr(module, _FACTORY, factory)
    if not hasattr(CheckpointManager.init_tmp_checkpoint, "__wrapped__"):
        CheckpointManager.init_tmp_checkpoint = _saving(CheckpointManager.init_tmp_checkpoint)


def _with_ebpo(original: Any) -> Any:
    @functools.wraps(original)
    def create(master_config: Any) -> Any:
        config = master_config.grpo.adv_estimator
        if config.name != NAME:
            return original(master_config)
        if getattr(master_config.grpo, "use_dynamic_sampling", False):
            checks.warn_once("NeMo-RL", "grpo.use_dynamic_sampling")
        made = EBPOAdvantageEstimator(config, master_config.loss_fn)
        # NeMo-RL always resumes from the latest checkpoint in its folder; the estimator is made after that.
        latest = CheckpointManager(master_config.checkpointing).get_latest_checkpoint_path()
        if latest is not None:
            estimator.restore(latest)
        return made

    return create


def _saving(original: Any) -> Any:
    @functools.wraps(original)
    def init_tmp_checkpoint(self: Any, step: int, training_info: Any, run_config: Any = None) -> Any:
        folder = original(self, step, training_info, run_config)
        config = getattr(getattr(run_config, "grpo", None), "adv_estimator", None)
        if getattr(config, "name", None) == NAME:
            write_prior(folder, EBPOAdvantageEstimator(config).ebpo, global_step=step)
        return folder

    return init_tmp_checkpoint
