"""Faults of a run that its rewards show: what makes a group-relative method learn nothing, or the wrong thing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ebpo_core.signal.cells import Vector
from ebpo_core.signal.groups import Groups
from ebpo_core.signal.rollouts import Rollouts

# Thresholds, as shares: unscored completions; groups of one; groups or prompts with the fault.
_MISSING, _SINGLE, _SOME = 0.01, 0.1, 0.01
# How many times one range of rewards may be another.
_SCALES = 10.0
# A group is a giant if it has this many times the median size, and at least this many completions.
_GIANT, _GIANT_ROWS = 16, 128


class Fault(NamedTuple):
    """One fault: a word for scripts, and a sentence that says what was seen and what to do."""

    kind: str
    message: str


def find_faults(rollouts: Rollouts, groups: Groups, *, max_dead: float = 0.5) -> tuple[Fault, ...]:
    """Every fault, at most one of a kind.

    Kinds: ``constant_verifier``, ``constant_reward``, ``failing_verifier``, ``different_scales``,
    ``unique_group_column``, ``one_group``, ``single_completions``, ``giant_group``, ``mixed_prompts``,
    ``duplicate_prompts``, ``one_group_per_step``, ``dead_groups``.

    Args:
        rollouts: The file.
        groups: Its groups.
        max_dead: The share of dead groups above which there is a warning, in [0, 1].

    Raises:
        ValueError: ``max_dead`` out of its range.
    """
    if not 0 <= max_dead <= 1:
        raise ValueError(f"max_dead={max_dead}: expected a share between 0 and 1")
    return tuple(
        fault
        for look in (_of_verifier, _of_scales, _of_grouping, _of_prompts, _of_steps)
        for fault in look(rollouts, groups)
    ) + tuple(_of_dead_groups(groups, max_dead))


def _of_verifier(rollouts: Rollouts, groups: Groups) -> Iterator[Fault]:
    missing = float(np.isnan(rollouts.rewards).mean())
    if missing > _MISSING:
        yield Fault(
            "failing_verifier",
            f"{missing:.1%} of the completions have no reward (NaN or null): see what the reward function fails on",
        )
    if groups.distinct == 1:
        yield Fault(
            "constant_verifier",
            f"every reward is {groups.lowest:g}: no rule can learn from this; check the reward function, its answer "
            "extraction and the prompt's format on a few completions by hand",
        )
        return
    columns = {name: values for name, values in rollouts.columns.items() if not np.isnan(values).all()}
    constant = [name for name, values in columns.items() if _span(values) == 0]
    if constant and len(columns) > 1:
        yield Fault(
            "constant_reward",
            f"the rewards of {', '.join(map(repr, constant))} are all equal and shift every completion alike: "
            "check the function or leave it out",
        )


def _of_scales(rollouts: Rollouts, groups: Groups) -> Iterator[Fault]:
    del groups
    spans = {f"column {name!r}": _span(values) for name, values in rollouts.columns.items()}
    if rollouts.sources is not None:
        labels, source_of = np.unique(np.array(rollouts.sources), return_inverse=True)
        spans |= {
            f"source {str(label)!r}": _span(rollouts.rewards[source_of == number])
            for number, label in enumerate(labels)
        }
    for kind in ("column", "source"):
        of_kind = {name: span for name, span in spans.items() if name.startswith(kind) and span > 0}
        if not of_kind:
            continue
        narrow, wide = min(of_kind, key=of_kind.__getitem__), max(of_kind, key=of_kind.__getitem__)
        if of_kind[wide] > _SCALES * of_kind[narrow]:
            yield Fault(
                "different_scales",
                f"rewards of {wide} range over {of_kind[wide]:g}, those of {narrow} over {of_kind[narrow]:g}: where "
                "they share a batch or a sum the wide one drowns the other; bring them to one scale, or use one prior "
                "each (keys= and ebpo_keys for sources, ebpo_per_reward for reward functions)",
            )
            return


def _of_grouping(rollouts: Rollouts, groups: Groups) -> Iterator[Fault]:
    column = rollouts.group_column
    rows = np.bincount(rollouts.groups)  # scored or not
    single = float((rows == 1).mean())
    if len(rows) > 1 and single == 1:
        yield Fault(
            "unique_group_column",
            f"every value of {column!r} occurs once in a step: it names completions, not prompts; choose the column "
            "that the completions of one prompt share",
        )
    elif len(rows) == 1 and rows[0] > 1:
        yield Fault(
            "one_group",
            f"all {rows[0]} completions have one value of {column!r}: they are one group; choose the column that names "
            "prompts",
        )
    else:
        if single > _SINGLE:
            yield Fault(
                "single_completions",
                f"{single:.0%} of the groups have a single completion, whose advantage is 0 under every rule that "
                "subtracts the group's mean: check the grouping, or use a prior of its own for each prompt",
            )
        largest, median = int(rows.max()), float(np.median(rows))
        if largest >= _GIANT_ROWS and largest > _GIANT * median:
            yield Fault(
                "giant_group",
                f"the largest group has {largest} completions and the median {median:g}: look for a default value of "
                f"{column!r}, or for prompts cut to the same text",
            )
    del groups


def _of_prompts(rollouts: Rollouts, groups: Groups) -> Iterator[Fault]:
    del groups
    if rollouts.prompts is None:
        return
    # (2, pairs): the pairs of group and prompt that occur
    pairs = np.unique(np.stack([rollouts.groups, rollouts.prompts]), axis=1)
    prompts_of_group = np.bincount(pairs[0])
    mixed = float((prompts_of_group > 1).mean())
    if mixed > _SOME:
        yield Fault(
            "mixed_prompts",
            f"{mixed:.0%} of the groups hold completions of different prompts: {rollouts.group_column!r} does not name "
            "prompts, and a mean over such a group is no baseline for either",
        )
        return
    _, first, rows = np.unique(rollouts.groups, return_index=True, return_counts=True)
    steps = rollouts.steps if rollouts.has_steps else np.zeros_like(rollouts.steps)
    _, groups_of_visit = np.unique(np.stack([steps[first], rollouts.prompts[first]]), axis=1, return_counts=True)
    twice = float((groups_of_visit > 1).mean())
    # Where the prompt itself names the group, a prompt that comes twice makes one group of twice the size.
    usual = int(np.median(rows))
    merged = float(((rows >= 2 * usual) & (rows % usual == 0)).mean()) if usual >= 2 else 0.0
    if twice > _SOME:
        yield Fault(
            "duplicate_prompts",
            f"{twice:.0%} of the prompts are in several groups of one step: remove duplicates from the data set, or "
            "give all completions of a prompt one group",
        )
    elif merged > _SOME:
        yield Fault(
            "duplicate_prompts",
            f"{merged:.0%} of the groups have a multiple of the usual {usual} completions: their prompts come several "
            "times in one step and are taken for one group; remove duplicates from the data set",
        )


def _of_steps(rollouts: Rollouts, groups: Groups) -> Iterator[Fault]:
    if not rollouts.has_steps:
        return
    per_step = np.bincount(groups.steps)
    if (per_step[per_step > 0] == 1).all() and len(per_step) > 1:
        yield Fault(
            "one_group_per_step",
            "each step has a single group: what is centred over the batch is then centred over the group, so EBPO as "
            'published equals batch-scaled GRPO and dead groups get 0; set normalize="scale" (ebpo_normalize in TRL), '
            "or generate several prompts a step (steps_per_generation, per_device_train_batch_size)",
        )


def _of_dead_groups(groups: Groups, max_dead: float) -> Iterator[Fault]:
    paired = groups.paired
    if not paired.any() or groups.distinct == 1:
        return
    dead = float(groups.dead[paired].mean())
    if dead > max_dead:
        failed = float(groups.failed[paired].mean())
        yield Fault(
            "dead_groups",
            f"{dead:.0%} of the groups are dead ({failed:.0%} failed, {dead - failed:.0%} passed), more than "
            f"{max_dead:.0%}: choose prompts or a group size with more signal, or a rule that learns from dead groups",
        )


def _span(values: Vector) -> float:
    known = values[~np.isnan(values)]
    return float(np.ptp(known)) if known.size else 0.0
