"""Shrinkage, baselines and the prior of an estimator's last call, for logs and plots, and one warning."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ebpo_core.keys import Key

logger = logging.getLogger(__name__)

_warned_of_one_prompt = False  # once a process: a trainer may have several estimators

Vector: TypeAlias = NDArray[np.float64]
Blended: TypeAlias = tuple[Vector, Vector, Vector]


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """Results of an estimator's last call beside the advantages, for M groups in order of first appearance.

    They are computed when they are asked for, out of what the estimator keeps of its last call: of a plain matrix a
    copy, of any other batch the groups' statistics. In a call with ``turns`` the groups are the cells (prompt, turn),
    and :attr:`keys` end in the turn. After a call with ``process_group`` the vectors are of this rank's groups and the
    numbers of the whole batch.
    """

    shrinkage: Vector
    """``S_m``, shape (M,); NaN for a group without valid rows."""
    baseline: Vector
    """``V_m``, shape (M,); NaN for a group without valid rows."""
    count: Vector
    """Valid rows of each group, shape (M,)."""
    mu_glob: float
    """Mean of the root's prior that the batch was scored with, before any group is left out; NaN if it was empty."""
    sigma2: float
    """Its noise variance, as the option ``sigma2`` estimates it; NaN if it was empty."""
    tau2: float
    """Its variance of group means, as the option ``tau2`` estimates it; NaN if it was empty."""
    saturated_fail: float
    """Share of the non-empty groups whose valid rewards are all equal and below ``mu_glob`` (or at it, and <= 0)."""
    saturated_pass: float
    """Share of the non-empty groups whose valid rewards are all equal and above ``mu_glob`` (or at it, and > 0)."""
    outlier: float
    """Largest ``|r - mean| / std`` of the batch against the root's prior before it; NaN if that had no variance."""
    dead_advantage: float
    """Mean ``|A|`` over the valid rows of the groups whose valid rewards are all equal; NaN without such a group."""
    keys: tuple[Key, ...] | None = None
    """Key of each group, ``()`` for the root; None if the call had no keys."""
    blended: Blended | None = None
    """With keys, the three vectors that :attr:`prior_mean`, :attr:`prior_sigma2` and :attr:`prior_tau2` give."""

    @property
    def saturated(self) -> float:
        """Share of the non-empty groups whose valid rewards are all equal: plain GRPO learns nothing from them."""
        return self.saturated_fail + self.saturated_pass

    @property
    def prior_mean(self) -> Vector:
        """Mean of the prior that each group was shrunk toward, before any group is left out; NaN if it was empty."""
        return self._of_group(0, self.mu_glob)

    @property
    def prior_sigma2(self) -> Vector:
        """Noise variance of the prior of each group, shape (M,)."""
        return self._of_group(1, self.sigma2)

    @property
    def prior_tau2(self) -> Vector:
        """Variance of group means of the prior of each group, shape (M,)."""
        return self._of_group(2, self.tau2)

    def metrics(self, prefix: str = "ebpo/") -> dict[str, float]:
        """The numbers to log of a batch. One that is undefined (NaN: an empty prior, no saturated group) is left out.

        Names, each after ``prefix``: ``shrinkage`` (mean S over groups), ``prior_mean``, ``sigma2``, ``tau2`` (of the
        prior the batch was scored with), ``saturated_fail``, ``saturated_pass`` (shares of groups), ``dead_advantage``
        (mean size of the advantages that saturated groups got), ``outlier`` (the largest distance of a reward from the
        prior before this batch, in its standard deviations: one bad value poisons a running variance).
        """
        shrinkage = self.shrinkage[~np.isnan(self.shrinkage)]
        values = {
            "shrinkage": float(shrinkage.mean()) if shrinkage.size else math.nan,
            "prior_mean": self.mu_glob,
            "sigma2": self.sigma2,
            "tau2": self.tau2,
            "saturated_fail": self.saturated_fail,
            "saturated_pass": self.saturated_pass,
            "dead_advantage": self.dead_advantage,
            "outlier": self.outlier,
        }
        return {prefix + name: float(value) for name, value in values.items() if not math.isnan(value)}

    def _of_group(self, field: int, of_root: float) -> Vector:
        if self.blended is None or np.isnan(of_root):  # no key knows anything while the root does not
            return np.full(self.count.shape, of_root)
        return self.blended[field]


def warn_of_one_prompt() -> None:
    """Log, once a process, what is left of EBPO where ``normalize="batch"`` meets batches of one prompt."""
    global _warned_of_one_prompt
    if _warned_of_one_prompt:
        return
    _warned_of_one_prompt = True
    logger.warning(
        "a batch of one prompt with normalize='batch': this is exactly GRPO scaled by the batch, since the prompt's "
        "baseline is one number, which the batch's mean takes out again; saturated groups (all failed, or all passed) "
        "get 0, whatever the prior and the logged shrinkage say. Set normalize='scale' (in TRL ebpo_normalize), or put "
        "several prompts into a batch (in TRL a larger per_device_train_batch_size or steps_per_generation)"
    )
