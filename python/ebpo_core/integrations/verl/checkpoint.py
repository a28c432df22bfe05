"""The prior in verl's checkpoints: verl's callback class for ``trainer.checkpoint_callback_class`` (0.9.1 and later).

verl calls ``on_save`` after each checkpoint and has no counterpart on loading. It makes the callback before it loads,
though, in the process that computes advantages, so the prior is restored there, from the folder that verl is going to
load by its own rules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ebpo_core.checkpoint import write_prior
from ebpo_core.integrations.verl import rows
from ebpo_core.integrations.verl.estimator import WHERE, check_filters, estimator, is_ebpo, reset, running


class PriorCheckpoint:
    """Saves EBPO's prior in each checkpoint folder, ``global_step_N/ebpo_prior.json``, and restores it on resume.

    Does nothing for another ``algorithm.adv_estimator``. To add a callback of your own, derive it from this class and
    call ``super()`` in both methods.

    Args:
        config: verl's whole configuration.

    Raises:
        FileNotFoundError: verl is going to resume from a checkpoint without a prior, and
            ``algorithm.ebpo.allow_missing_prior`` is not set.
        TypeError, ValueError: wrong options under ``algorithm.ebpo``, or a prior that cannot be read.
    """

    def __init__(self, config: Any = None) -> None:
        self.config = config
        self.active = config is not None and is_ebpo(config.algorithm)
        if not self.active:
            return
        reset()  # a trainer in this process before this one had another run's prior
        running(config.algorithm)
        check_filters(config.algorithm)
        rows.install()
        folder = resume_folder(config.trainer)
        if folder is None:
            return
        try:
            estimator.restore(folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}. In verl: trainer.resume_mode=resume_path with trainer.resume_from_path of an earlier one, "
                f"trainer.resume_mode=disable, or +{WHERE}.allow_missing_prior=true"
            ) from error

    def on_save(self, *, global_step: int, checkpoint_dir: str, **_: Any) -> None:
        """Write the prior into ``checkpoint_dir``; verl calls this after each checkpoint, with keywords."""
        if self.active:
            write_prior(checkpoint_dir, running(self.config.algorithm), global_step=global_step)


def resume_folder(trainer: Any) -> Path | None:
    """The checkpoint folder that verl will load under this ``trainer`` node, or None for a fresh start.

    Raises:
        ValueError: verl does not know the ``trainer.resume_mode``, or the mode needs a path and there is none.
    """
    from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

    mode = trainer.resume_mode
    if mode == "disable":
        return None
    if mode == "auto":
        latest = find_latest_ckpt_path(str(Path(trainer.default_local_dir).absolute()))
        return None if latest is None else Path(latest)
    if mode != "resume_path":
        raise ValueError(f"trainer.resume_mode={mode!r}: expected 'auto', 'disable' or 'resume_path'")
    if not isinstance(trainer.resume_from_path, str):
        raise ValueError(f"trainer.resume_from_path={trainer.resume_from_path!r}: resume_mode=resume_path needs a path")
    return Path(trainer.resume_from_path).absolute()
