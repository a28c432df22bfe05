"""Report on a file of rollouts: dead groups now and expected, what buys signal, what each rule does, and warnings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ebpo_core.signal.bands import Band, find_bands
from ebpo_core.signal.expectation import Expectation, expect
from ebpo_core.signal.faults import Fault, find_faults
from ebpo_core.signal.groups import Groups, group_rewards
from ebpo_core.signal.rollouts import Rollouts
from ebpo_core.signal.rules import Rule, compare_rules


class StepSignal(NamedTuple):
    """Contents of a step, on the mean over the file's steps.

    Attributes:
        groups: Groups with at least two scored completions.
        informative: Those that are not dead.
        effective: ``(sum of x)^2 / sum of x^2`` with x the squared deviations from the mean of a group, summed: as many
            groups as carry equal parts of the signal of r - mean.
    """

    groups: float
    informative: float
    effective: float


@dataclass(frozen=True, eq=False)
class Report:
    """Everything that :func:`diagnose` found; ``expectation`` is None where no group has two scored completions."""

    rollouts: Rollouts
    groups: Groups
    step: StepSignal
    expectation: Expectation | None
    bands: tuple[Band, ...]
    rules: tuple[Rule, ...]
    warnings: tuple[Fault, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-safe plain values, without the rewards."""
        groups, rollouts, found = self.groups, self.rollouts, self.expectation
        return {
            "form": rollouts.form,
            "completions": len(rollouts.rewards),
            "scored": int(groups.sizes.sum()),
            "groups": len(groups.sizes),
            "prompts": len(np.unique(groups.prompts)),
            "steps": int(rollouts.steps.max()) + 1 if rollouts.has_steps else None,
            "group_size": {
                "smallest": int(groups.sizes.min()),
                "median": float(np.median(groups.sizes)),
                "largest": int(groups.sizes.max()),
            },
            "reward": {
                "mean": groups.mean,
                "lowest": groups.lowest,
                "highest": groups.highest,
                "distinct": groups.distinct,
                "columns": list(rollouts.columns),
            },
            "per_step": _plain(self.step),
            "dead": None if found is None else _plain(found.dead_now),
            "expected": None if found is None else _plain(found.sizes),
            "best_size": None if found is None else {"size": found.best_size, "share_of_resamples": found.best_share},
            "distribution": None if found is None else _distribution(groups, found),
            "prompts_by_difficulty": _plain(self.bands),
            "rules": _plain(self.rules),
            "warnings": _plain(self.warnings),
            "notes": list(rollouts.notes),
        }


def diagnose(
    rollouts: Rollouts, *, max_dead: float = 0.5, resamples: int = 200, confidence: float = 0.95, seed: int = 0
) -> Report:
    """Does this run have a signal?

    Args:
        rollouts: From :func:`~ebpo_core.signal.read_rollouts`.
        max_dead: The share of dead groups above which there is a warning.
        resamples: Weightings of the bootstrap behind every interval.
        confidence: Coverage of the intervals.
        seed: Of the bootstrap: same seed, same intervals.

    Raises:
        ValueError: No completion has a reward, or an option is out of its range.
    """
    groups = group_rewards(rollouts)
    warnings = find_faults(rollouts, groups, max_dead=max_dead)
    expectation = expect(groups, resamples=resamples, level=confidence, seed=seed)
    return Report(
        rollouts=rollouts,
        groups=groups,
        step=_per_step(groups),
        expectation=expectation,
        bands=() if expectation is None else find_bands(groups, expectation),
        rules=compare_rules(rollouts, groups),
        warnings=warnings,
    )


def _plain(value: Any) -> Any:
    """Named tuples as dicts, other tuples as lists, all the way down."""
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _per_step(groups: Groups) -> StepSignal:
    steps = np.unique(groups.steps, return_inverse=True)[1].reshape(-1)
    paired = groups.paired
    count = np.bincount(steps, paired)
    informative = np.bincount(steps, paired & ~groups.dead)
    squares = groups.squares / (groups.squares.max() or 1.0)  # the fourth power of a reward may be no float
    total, squared = np.bincount(steps, squares), np.bincount(steps, squares**2)
    effective = np.divide(total**2, squared, out=np.zeros_like(total), where=squared > 0)
    return StepSignal(float(count.mean()), float(informative.mean()), float(effective.mean()))


def _distribution(groups: Groups, found: Expectation) -> list[dict[str, Any]]:
    """The fitted distribution of each level's rate; for two rewards, that of the higher one says it all."""
    pairs = list(zip(groups.levels, found.rates, strict=True))
    return [
        {
            "reward": level.value,
            **{name: _plain(found.interval(getattr(rates, name))) for name in ("zero", "one", "a", "b")},
        }
        for level, rates in (pairs[-1:] if groups.distinct == 2 else pairs)
    ]
