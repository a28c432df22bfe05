"""EBPO for slime: a reward post-processing function and a data source, both named on slime's command line::

    --advantage-estimator grpo
    --custom-reward-post-process-path ebpo_core.integrations.slime.reward_post_process
    --data-source-path ebpo_core.integrations.slime.PriorDataSource

slime calls the function in its rollout manager, one process, with the whole rollout batch, and with the estimators
grpo, gspo and cispo broadcasts what it returns over the tokens unchanged: these rewards are the advantages. The data
source lives in the same process and saves the prior where slime saves its own state, beside the checkpoints.

Options are a mapping ``ebpo`` in the YAML file of ``--custom-config-path``, or ``EBPO_OPTIONS``; ``keys`` names fields
of ``sample.metadata`` whose values choose a prior, outermost first.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ebpo_core.checkpoint import write_prior
from ebpo_core.estimator import EBPO
from ebpo_core.integrations import checks, process
from ebpo_core.keys import key_of_row

if TYPE_CHECKING:

    class PriorDataSource:
        """See :func:`_data_source`; made at first use, because it is a subclass of slime's."""


WHERE = "ebpo (--custom-config-path)"
# With these slime's advantages are the rewards that the post-processing returns.
_ESTIMATORS = ("grpo", "gspo", "cispo")

estimator = process.ProcessEstimator(keyed=True)


def reward_post_process(args: Any, samples: Sequence[Any]) -> tuple[list[Any], list[float]]:
    """The function that slime calls with a rollout batch, which enters the prior, then is scored (Algorithm 1).

    Groups are told apart by ``sample.group_index`` and may differ in size. Samples cut from one rollout (equal
    ``rollout_id``, as agents with compaction or sub-agents make) count once for each distinct reward, and share its
    advantage. A sample whose reward is None or NaN does not count, and its advantage is 0.

    Args:
        args: slime's arguments.
        samples: slime's samples, flat, in any order.

    Returns:
        The rewards as they were, for slime's logs, and the advantages, both in the order of ``samples``.

    Raises:
        ValueError: settings under which slime would change the advantages, a sample without ``group_index``, a reward
            that is infinite, or wrong options. The prior is then untouched.
    """
    check(args)
    raw = [sample.get_reward_value(args) for sample in samples]
    ebpo = running(args)
    rewards = np.array([np.nan if reward is None else reward for reward in raw], dtype=np.float64)
    groups, rollouts = [], []
    # Plain numbers: tensors of one value would not be one.
    for row, (sample, reward) in enumerate(zip(samples, rewards.tolist(), strict=True)):
        if sample.group_index is None:
            raise ValueError(
                f"sample {row} has no group_index, and EBPO needs to know which samples share a prompt: set it in the "
                "data source, as slime's RolloutDataSource does"
            )
        groups.append(sample.group_index)
        # An outcome of a rollout is a trajectory: sub-agents of one may have rewards of their own.
        rollouts.append((row,) if sample.rollout_id is None else (sample.rollout_id, reward))
    columns = estimator.columns
    keys = [key_of_row(columns, sample.metadata, f"{WHERE}: keys") for sample in samples] if columns else None
    return raw, ebpo(rewards, groups, keys=keys, trajectories=rollouts).tolist()


def running(args: Any) -> EBPO:
    """The estimator of this process, with the options in ``args.ebpo``, else in ``EBPO_OPTIONS``.

    As for slime's own estimators, ``--disable-grpo-std-normalization`` means ``normalize="none"``, where that option is
    unset.
    """
    return estimator.get(getattr(args, "ebpo", None), WHERE, scaled=getattr(args, "grpo_std_normalization", True))


def check(args: Any) -> None:
    """Refuse settings under which the advantages would not be EBPO's; warn where saturated groups are hidden."""
    if args.advantage_estimator not in _ESTIMATORS:
        raise ValueError(
            f"--advantage-estimator {args.advantage_estimator}: slime would compute advantages of its own from EBPO's; "
            f"use one of {', '.join(_ESTIMATORS)}, which take them as they are"
        )
    if getattr(args, "normalize_advantages", False):
        raise ValueError("--normalize-advantages would standardise EBPO's advantages a second time: leave it out")
    if getattr(args, "dynamic_sampling_filter_path", None):
        checks.warn_once("slime", "--dynamic-sampling-filter-path")


def _data_source() -> type:
    base = importlib.import_module("slime.rollout.data_source").RolloutDataSourceWithBuffer

    class PriorDataSource(base):  # type: ignore[misc, valid-type]
        """slime's data source with a buffer, which also saves and loads the prior.

        The prior is in the folder ``{args.save}/rollout/{rollout_id}``, beside the state of slime's data source.

        Raises:
            ValueError: ``--disable-rollout-global-dataset``, with which slime never saves its data source.
        """

        def __init__(self, args: Any) -> None:
            super().__init__(args)
            if not args.rollout_global_dataset:
                raise ValueError(
                    "--disable-rollout-global-dataset: slime then never asks the data source to save itself, and "
                    "EBPO's prior would be lost on resume; leave it out, or use slime's own data source and no resume"
                )

        def save(self, rollout_id: int) -> None:
            """Called by slime after each checkpoint."""
            super().save(rollout_id)
            write_prior(_folder(self.args.save, rollout_id), running(self.args), global_step=rollout_id)

        def load(self, rollout_id: int | None = None) -> None:
            """Called by slime at the start, with the last rollout trained (-1 or None for a fresh run)."""
            super().load(rollout_id)
            if self.args.load is None or rollout_id is None or rollout_id < 0:
                return
            running(self.args)
            estimator.restore(_folder(self.args.load, rollout_id))

    PriorDataSource.__module__, PriorDataSource.__qualname__ = __name__, "PriorDataSource"
    return PriorDataSource


def _folder(checkpoints: str, rollout_id: int) -> Path:
    return Path(checkpoints) / "rollout" / str(rollout_id)


def __getattr__(name: str) -> Any:
    if name != "PriorDataSource":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made = _data_source()  # once, so that it is one class
    return made
