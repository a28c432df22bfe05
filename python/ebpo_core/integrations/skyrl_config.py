"""SkyRL's configuration with the estimator's options, ``trainer.algorithm.ebpo``."""

from dataclasses import dataclass, field
from typing import Any

from skyrl.train.config import AlgorithmConfig, SkyRLTrainConfig, TrainerConfig

# No `from __future__ import annotations` here: SkyRL builds nested dataclasses from the types of these fields.

NAME = "ebpo"


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
