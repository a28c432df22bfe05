"""EBPO for AReaL: an object for the actor's ``reward_norm``, and ready actor classes.

AReaL has no hook for an estimator. Its actor calls ``reward_norm`` with the scores of the completions and uses the
result as the reward of the last token; with ``discount`` and ``gae_lambda`` 1 and no critic that is the advantage of
every token, less the KL terms. :func:`install` puts an :class:`EBPONorm` there::

    from areal.engine import FSDPPPOActor
    from ebpo_core.integrations import areal as ebpo

    class EBPOActor(ebpo.PriorCheckpoints, FSDPPPOActor):
        pass

Each data-parallel worker holds a share of the batch. They exchange their scores (``process_group=`` of the estimator),
so that advantages and prior are those of the whole batch, and the same on all. Options come from ``EBPO_OPTIONS``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ebpo_core.checkpoint import write_prior
from ebpo_core.estimator import EBPO
from ebpo_core.inputs import tensor_of
from ebpo_core.integrations import process


class EBPONorm:
    """In the place of AReaL's ``Normalization`` as ``actor.reward_norm``.

    Args:
        ebpo: The estimator.
        group_size: Completions of a prompt, which follow each other, where AReaL does not say how many there are
            (1.0.4, which knows no groups of different sizes).
        engine: AReaL's train engine; its ``data_parallel_group`` is the one whose shares make up a batch. None: the
            batch is not shared out.
    """

    def __init__(self, ebpo: EBPO, group_size: int, engine: Any = None) -> None:
        if group_size < 1:
            raise ValueError(f"group_size={group_size}: expected the number of completions of a prompt, at least 1")
        self.ebpo = ebpo
        self.group_size = group_size
        self.engine = engine

    @torch.no_grad()
    def __call__(
        self,
        x: torch.Tensor,
        loss_mask: torch.Tensor | None = None,
        high_precision: bool = True,  # noqa: ARG002
        reduce_group: Any = None,
        group_sizes: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """The batch of all workers enters the prior, then this worker's share is scored (paper, Algorithm 1).

        Args:
            x: ``(B,)`` scores of this worker's completions, those of a prompt beside each other.
            loss_mask: ``(B,)``, nonzero where a completion counts.
            high_precision: Not used; EBPO always computes in float64.
            reduce_group: The process group to gather over, in the place of the engine's.
            group_sizes: Completions of each prompt, in order; AReaL passes them after 1.0.4.

        Returns:
            ``(B,)`` float32 advantages.

        Raises:
            ValueError: sizes that do not add up to B, or an infinite score. A NaN score does not count and gets 0.
            RuntimeError: this happened on another worker; no worker's prior changed.
        """
        rewards = x.detach().double().cpu().numpy().reshape(-1)
        valid = None if loss_mask is None else loss_mask.detach().bool().cpu().numpy().reshape(-1)
        sizes = [self.group_size] * (len(rewards) // self.group_size) if group_sizes is None else list(group_sizes)
        groups = np.repeat(np.arange(len(sizes)), sizes)
        try:  # the estimator checks, not we: a worker that left before the exchange would keep the others waiting
            scored = self.ebpo(rewards, groups, mask=valid, process_group=self._process_group(reduce_group))
        except ValueError as error:
            if len(groups) == len(rewards):
                raise
            expected = f"{self.group_size}: set actor.reward_norm.group_size" if group_sizes is None else f"{sizes}"
            raise ValueError(f"{len(rewards)} completions do not make up groups of {expected}") from error
        return tensor_of(scored, torch.float32).to(x.device).reshape(x.shape)

    def _process_group(self, group: Any) -> Any:
        group = group if group is not None or self.engine is None else self.engine.data_parallel_group
        return group if dist.is_initialized() else None


def install(actor: Any, ebpo: EBPO) -> EBPONorm:
    """Make AReaL's ``PPOActor`` use EBPO.

    Args:
        actor: ``engine.actor``, a ``areal.trainer.ppo.actor.PPOActor``.
        ebpo: The estimator of this worker.

    Raises:
        ValueError: the actor's settings would change EBPO's advantages, or do not say how large a group is.
    """
    if not hasattr(actor, "reward_norm") or not hasattr(actor, "adv_norm"):
        raise TypeError(f"actor is of type {type(actor).__name__}: expected AReaL's PPOActor, which is engine.actor")
    if actor.adv_norm is not None:
        raise ValueError("actor.adv_norm is set and would standardise EBPO's advantages a second time: set it to null")
    for name, value in (("discount", actor.discount), ("gae_lambda", actor.gae_lambda)):
        if value != 1.0:
            raise ValueError(f"actor.{name}={value} would fade EBPO's advantages along the completion: set it to 1.0")
    group_size = getattr(actor.config.reward_norm, "group_size", None)
    if group_size is None:
        raise ValueError(
            "actor.reward_norm is not set, and says how many completions a prompt has: set "
            "actor.reward_norm.group_size to gconfig.n_samples (its other fields have no effect)"
        )
    actor.reward_norm = norm = EBPONorm(ebpo, group_size, actor.engine)
    return norm


class PriorCheckpoints:
    """Put before one of AReaL's PPO actor engines: its actor uses EBPO, and its checkpoints hold the prior."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.prior = process.ProcessEstimator()
        install(self.actor, self.prior.get())  # type: ignore[attr-defined]

    def save(self, meta: Any) -> Any:
        """AReaL's own, and ``ebpo_prior.json`` in the same folder where the optimizer is saved too."""
        result = super().save(meta)  # type: ignore[misc]
        if meta.with_optim and (not dist.is_initialized() or dist.get_rank() == 0):
            write_prior(meta.path, self.prior.get())
        return result

    def load(self, meta: Any) -> Any:
        """AReaL's own, and the prior, on every worker, where the optimizer is loaded too (a resumed run)."""
        result = super().load(meta)  # type: ignore[misc]
        if meta.with_optim:
            self.prior.restore(meta.path)
        return result
