"""EBPO for prime-rl's orchestrator. prime-rl has no hook for an algorithm from outside, so :func:`install` patches it:
``type = "grpo"`` then means EBPO. Run the orchestrator as ::

    python -m ebpo_core.integrations.contrib.prime_rl @ orchestrator.toml

in place of ``orchestrator @ orchestrator.toml``. Options come from ``EBPO_OPTIONS``.

prime-rl scores each group as it finishes and never sees a batch, so groups are scored in streaming mode
(:meth:`ebpo_core.EBPO.group`): against the prior of all groups before, and scaled by its noise. Every environment has a
prior of its own, which falls back on that of all environments while it is young.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from prime_rl.orchestrator import algo
from prime_rl.orchestrator.algo.base import Algorithm, iter_trainable_traces
from prime_rl.orchestrator.ckpt import CheckpointManager

from ebpo_core.checkpoint import write_prior
from ebpo_core.integrations import checks, process

TYPE = "grpo"

estimator = process.ProcessEstimator()


class EBPOAlgorithm(Algorithm):  # type: ignore[misc]
    """prime-rl's algorithm protocol: advantages of a finished group, one for each trainable trace.

    Raises:
        ValueError: wrong options, or ``length_penalty``, whose terms are relative to a group and would mix with the
            prior's rewards of other groups.
    """

    def __init__(self, config: Any, policy_pool: Any) -> None:
        super().__init__(config, policy_pool)
        if getattr(config, "length_penalty", None) is not None:
            raise ValueError(
                "orchestrator.algo.length_penalty is set: its terms are relative to the group, and EBPO compares "
                "rewards across groups. Leave it out, or put the penalty into the environment's reward"
            )
        self.ebpo = estimator.get()

    async def score_group(self, episodes: list[Any]) -> None:
        """Score one group against the prior, then take it into the prior."""
        found = list(iter_trainable_traces(episodes))
        if not found:
            return
        rewards = np.array([trace.reward for _, trace in found], dtype=np.float64)
        checks.check_finite(rewards)
        advantages = np.asarray(self.ebpo.group(rewards, key=environment(found[0][0])))
        for (_, trace), advantage in zip(found, advantages.tolist(), strict=True):
            algo.assign_advantages(trace, advantage)


def environment(episode: Any) -> str:
    """The name that the orchestrator runs the episode's environment under, which keys its prior."""
    return str(episode.env.name or episode.env.id)


def install() -> None:
    """Patch prime-rl in this process: ``grpo`` is EBPO, and the orchestrator's checkpoints hold the prior.

    Raises:
        ImportError: prime-rl has moved what is patched.
    """
    if TYPE not in algo.ALGORITHM_CLASSES or not hasattr(CheckpointManager, "get_ckpt_path"):
        raise ImportError(
            f"this prime-rl has no ALGORITHM_CLASSES[{TYPE!r}], or no CheckpointManager.get_ckpt_path: see "
            "docs/frameworks.md for the version that this was made for"
        )
    algo.ALGORITHM_CLASSES[TYPE] = EBPOAlgorithm
    if not hasattr(CheckpointManager.save, "__wrapped__"):
        CheckpointManager.save = _saving(CheckpointManager.save)
        CheckpointManager.load = _loading(CheckpointManager.load)


def _saving(original: Any) -> Any:
    @functools.wraps(original)
    def save(self: Any, progress: Any, train_source: Any, step: int) -> None:
        # First: prime-rl takes a folder with progress.pt in it for a checkpoint.
        write_prior(self.get_ckpt_path(step), estimator.get(), global_step=step, written_after=["progress.pt"])
        original(self, progress, train_source, step)

    return save


def _loading(original: Any) -> Any:
    @functools.wraps(original)
    def load(self: Any, progress: Any, train_source: Any, step: int, path: Path | None = None) -> None:
        original(self, progress, train_source, step, path)
        estimator.get()
        estimator.restore(path if path is not None else self.get_ckpt_path(step))

    return load


if __name__ == "__main__":
    from prime_rl.entrypoints.orchestrator import main

    # Python runs this file as `__main__`; the module of this name is the one that the rest imports.
    from ebpo_core.integrations.contrib.prime_rl import install as install_once

    install_once()
    main()
