"""``SignalCallback``: warnings during a run of TRL's GRPO, or of EBPO, whose rewards stop carrying a signal."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import TrainerCallback


class SignalWarning(UserWarning):
    """A run that learns little or nothing; ``warnings.simplefilter("error", SignalWarning)`` stops it there."""


class SignalCallback(TrainerCallback):
    """Watches the metrics that TRL logs and warns once for each kind of fault, on the main process.

    ``GRPOTrainer(..., callbacks=[SignalCallback()])``, and the same for ``EBPOTrainer`` and ``RLOOTrainer``.

    * ``dead_groups``: over the window more than ``max_dead`` of the groups had equal rewards. From ``ebpo/saturated_*``
      or TRL's ``frac_reward_zero_std``. Under ``scale_rewards="batch"`` or ``"normalize_then_sum"`` TRL means something
      else by that metric, so without EBPO's the share cannot be known, and a warning at the start says so
      (``no_dead_share``).
    * ``constant_verifier``: over the window every reward was one value; ``constant_reward``: every one of a function.
    * ``failing_verifier``: no completion of some log had a reward.
    * ``one_group_per_step``: an EBPO run with ``ebpo_normalize="batch"`` and one prompt per generation batch, where it
      equals GRPO that scales by the batch, and dead groups get 0. At the start.

    Args:
        window: Training logs that are looked at together; nothing but the settings is judged before there are so many.
        max_dead: A share of groups, in [0, 1].

    Attributes:
        warned: The warnings so far, by kind.

    Raises:
        ValueError: An argument out of its range.
    """

    def __init__(self, *, window: int = 20, max_dead: float = 0.5) -> None:
        if window < 1:
            raise ValueError(f"window={window}: expected at least 1 log")
        if not 0 <= max_dead <= 1:
            raise ValueError(f"max_dead={max_dead}: expected a share between 0 and 1")
        self.max_dead = max_dead
        self.warned: dict[str, str] = {}
        self._logs: deque[dict[str, Any]] = deque(maxlen=window)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge the settings."""
        del control, kwargs
        if not state.is_world_process_zero:
            return
        self._logs.clear()
        shadow = getattr(args, "ebpo_shadow", False)
        if getattr(args, "ebpo_normalize", None) == "batch" and not shadow:
            prompts = args.generation_batch_size // args.num_generations
            if prompts == 1:
                self._warn(
                    "one_group_per_step",
                    f"each generation batch holds one prompt (generation_batch_size={args.generation_batch_size}, "
                    f'num_generations={args.num_generations}): with ebpo_normalize="batch" EBPO then equals GRPO that '
                    "scales by the batch, and groups of equal rewards get 0, whatever ebpo/shrinkage says; set "
                    'ebpo_normalize="scale", or a larger per_device_train_batch_size or steps_per_generation',
                )
        if _hides_dead_groups(args) and (not hasattr(args, "ebpo_normalize") or args.ebpo_per_reward):
            self._warn(
                "no_dead_share",
                'with scale_rewards="batch" or multi_objective_aggregation="normalize_then_sum" TRL logs the spread of '
                "the whole batch as frac_reward_zero_std, so the share of dead groups is not seen here; set "
                "log_completions=True and run `ebpo signal` on the output",
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Take in a training log and judge the window. Logs of evaluation, and a run's last, have no ``reward``."""
        del control, kwargs
        if not state.is_world_process_zero or logs is None or "reward" not in logs:
            return
        self._logs.append(dict(logs))
        if len(self._logs) == self._logs.maxlen:
            for kind, message in self._faults(args):
                self._warn(kind, f"step {state.global_step}: {message}")

    def _faults(self, args: Any) -> Iterator[tuple[str, str]]:
        """Kinds and messages of what the full window shows."""
        logs = self._logs
        over = f"over the last {len(logs)} logs"
        if any(_number(log, "reward") is None for log in logs):
            message = f"{over} no completion of some batch got a reward (None): see what the functions fail on"
            yield "failing_verifier", message
        constant = _constant(logs, "reward", "reward_std")
        if constant is not None:
            message = (
                f"{over} every reward was {constant:g}: nothing can be learnt; check reward function, extraction "
                "and the prompt's format on a few completions"
            )
            yield "constant_verifier", message
            return
        names = [name[: -len("/mean")] for name in logs[-1] if name.startswith("rewards/") and name.endswith("/mean")]
        for name in names if len(names) > 1 else ():
            constant = _constant(logs, f"{name}/mean", f"{name}/std")
            if constant is not None:
                message = (
                    f"{over} the reward function {name[len('rewards/') :]!r} returned {constant:g} alone, which shifts "
                    "every completion alike: check it or leave it out"
                )
                yield "constant_reward", message
        dead = [share for log in logs if (share := _dead_share(args, log)) is not None]
        if dead and (mean := math.fsum(dead) / len(dead)) > self.max_dead:
            message = (
                f"{over} {mean:.0%} of the groups had equal rewards, more than max_dead={self.max_dead:.0%}, and GRPO "
                "learns nothing from them: use prompts nearer to the policy's level, more generations, or EBPO with "
                'ebpo_normalize="scale"; `ebpo signal` on the completions says which'
            )
            yield "dead_groups", message

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self.warned:
            self.warned[kind] = message
            warnings.warn(message, SignalWarning, stacklevel=3)


def _hides_dead_groups(args: Any) -> bool:
    """True where TRL's ``frac_reward_zero_std`` is about the batch and not about groups."""
    summed = getattr(args, "multi_objective_aggregation", "sum_then_normalize") == "sum_then_normalize"
    return getattr(args, "scale_rewards", None) == "batch" or not summed


def _number(log: Mapping[str, Any], name: str) -> float | None:
    value = log.get(name)
    return None if value is None or math.isnan(value) else float(value)


def _constant(logs: deque[dict[str, Any]], mean: str, std: str) -> float | None:
    """The one value that all rewards of the window had, or None."""
    means, stds = ([_number(log, name) for log in logs] for name in (mean, std))
    first = means[0]
    if first is None:
        return None
    # Means and deviations of equal float32 rewards may be a rounding error off.
    if any(value is None or value > 1e-6 * max(1.0, abs(first)) for value in stds):
        return None
    same = all(value is not None and math.isclose(value, first, rel_tol=1e-5, abs_tol=1e-8) for value in means)
    return first if same else None


def _dead_share(args: Any, log: Mapping[str, Any]) -> float | None:
    """Share of dead groups in one log, or None where it does not say."""
    failed, passed = _number(log, "ebpo/saturated_fail"), _number(log, "ebpo/saturated_pass")
    if failed is not None and passed is not None:
        return failed + passed
    return None if _hides_dead_groups(args) else _number(log, "frac_reward_zero_std")
