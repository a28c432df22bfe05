"""Paired contrasts over the records of the training study: differences, intervals, corrections. No drawing here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from training import COMMON_RATE, COMMON_SIZES, RECORDS, STAGES, WARM_UPS, lines_of, name_of, queue, tuned_rates

Cell = tuple[str, str, int, str]
"""Task, rung, G and variant: the plain protocol "", or one of the names that ``cell_of`` gives."""

MIDDLE: Cell = ("countdown", "middle", 2, "")
"""The cell of the learning rates' tuning."""
ONE_RATE, PRETRAINED = "one rate", "pre-trained"
COMMON: dict[int, Cell] = {G: (*MIDDLE[:2], G, ONE_RATE) for G in COMMON_SIZES}
"""By group size: the middle rung with one learning rate for all arms, beside the cells with each arm's own."""
SORTING: Cell = ("sorting", "middle", 2, ONE_RATE)
"""The other task, whose rewards are graded."""

BASELINES = ("grpo", "rloo", "constant", "batch_mean")
"""What the protocol's main contrasts compare the two forms of EBPO with."""


FEWEST = 5
"""Pairs under which nothing is compared: an interval of two or three says nothing, and hides the others in a figure."""


class Contrast(NamedTuple):
    """Difference of two arms over paired seeds, in points (0 to 100)."""

    arm: str
    other: str
    seeds: int
    mean: float
    low: float  # of the 95 % t-interval
    high: float
    p: float  # of the paired t-test, uncorrected
    wins: int  # seeds in which ``arm`` is ahead
    visible: float  # smallest true difference that this cell sees in 80 % of repetitions, at 5 %
    clustered: tuple[float, float] | None  # the 95 % t-interval over the means of each warm-up; None if one has no pair


def read(name: str) -> list[dict[str, Any]]:
    """Records of a study, in the order in which they were written."""
    return lines_of(RECORDS.with_name(f"{name}.jsonl"))


def cell_of(config: Mapping[str, Any]) -> Cell:
    parts = ["equal scale"] * config["equal_rms"] + [PRETRAINED] * (config["rung"] == "smollm2")
    parts += [f"{config['prompts_per_call']} prompt a call"] if "prompts_per_call" in config else []
    parts += [f"{config['train_size']} prompts"] if "train_size" in config else []
    return config["task"], config["rung"], config["G"], ", ".join(parts)


def by_cell(records: Iterable[Mapping[str, Any]]) -> dict[Cell, dict[str, dict[int, Mapping[str, Any]]]]:
    """Records by cell, arm and seed: those alone that a stage of the runner asks for, without those of the tuning.

    A run at :data:`training.COMMON_RATE` is in the cell of that rate; it is in the plain one, too, if its arm was tuned
    to the same.
    """
    records = list(records)
    rates = tuned_rates({name_of(record["config"]): record for record in records})
    planned: dict[str, set[Cell]] = {}
    for stage in STAGES:
        for config in () if stage == "rates" else queue(stage, rates):
            cell = cell_of(config)
            cells = {cell} if stage != "common" else set()
            if config["rate"] == COMMON_RATE and not cell[3]:
                cells.add((*cell[:3], ONE_RATE))
            planned.setdefault(name_of(config), set()).update(cells)
    found: dict[Cell, dict[str, dict[int, Mapping[str, Any]]]] = {}
    for record in records:
        config = record["config"]
        for cell in sorted(planned.get(name_of(config), ())):
            found.setdefault(cell, {}).setdefault(config["arm"], {})[config["seed"]] = record
    return found


def one_rate_first(cells: Mapping[Cell, Any]) -> list[tuple[Cell, Any]]:
    """The cells with one learning rate for all arms, then the others, in their order."""
    return sorted(cells.items(), key=lambda item: item[0][3] != ONE_RATE)


def outcome(record: Mapping[str, Any], name: str) -> float:
    """An outcome of a run: of the evaluation after it, or the mean over the last fifth of a curve."""
    if name in record["after"]:
        return float(record["after"][name])
    values = record["kl"] if name == "kl" else record["curves"][name]
    return float(np.mean(values[-max(1, len(values) // 5) :]))


def shared_seeds(arms: Mapping[str, Mapping[int, Mapping[str, Any]]], arm: str, other: str) -> list[int]:
    """Seeds in which two arms started from the same policy.

    The warm-up gives other bits on another kind of processor, so that a seed alone does not make a pair: what both arms
    scored before training has to be the same, too.
    """
    first, second = arms.get(arm, {}), arms.get(other, {})
    return sorted(seed for seed in set(first) & set(second) if first[seed]["before"] == second[seed]["before"])


def paired(
    arms: Mapping[str, Mapping[int, Mapping[str, Any]]], arm: str, other: str, name: str = "pass@1", unit: float = 100.0
) -> Contrast | None:
    """Contrast of two arms over their :func:`shared_seeds`; None under :data:`FEWEST` of them."""
    seeds = shared_seeds(arms, arm, other)
    if len(seeds) < FEWEST:
        return None
    differences = unit * np.array([outcome(arms[arm][s], name) - outcome(arms[other][s], name) for s in seeds])
    test = stats.ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(0.95)
    n = len(seeds)
    reach = stats.t.ppf(0.975, n - 1) + stats.t.ppf(0.8, n - 1)
    visible = float(reach * differences.std(ddof=1) / np.sqrt(n))
    mean, wins = float(differences.mean()), int((differences > 0).sum())
    by_warm_up = [differences[np.mod(seeds, WARM_UPS) == base] for base in range(WARM_UPS)]
    clustered = None
    if all(part.size for part in by_warm_up):
        over = stats.ttest_1samp([part.mean() for part in by_warm_up], 0.0).confidence_interval(0.95)
        clustered = float(over.low), float(over.high)
    low, high, p = float(interval.low), float(interval.high), float(test.pvalue)
    return Contrast(arm, other, n, mean, low, high, p, wins, visible, clustered)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of a family of p-values, in their order."""
    order = np.argsort(p_values)
    steps = np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return corrected.tolist()


def main_family(cells: Mapping[Cell, Any]) -> list[tuple[int, Contrast, float]]:
    """The protocol's main contrasts that have records: G, the contrast, and its p-value after Holm's correction.

    The correction counts all 16 contrasts of the protocol, also those that have no records yet.
    """
    found = []
    for G in (2, 4):
        arms = cells.get(("countdown", "middle", G, ""), {})
        for arm in ("ebpo", "ebpo_options"):
            found += [(G, c) for other in BASELINES if (c := paired(arms, arm, other)) is not None]
    missing = 2 * 2 * len(BASELINES) - len(found)
    corrected = holm([c.p for _, c in found] + [1.0] * missing)[: len(found)] if found else []
    return [(G, contrast, p) for (G, contrast), p in zip(found, corrected, strict=True)]


def over_tasks(
    cells: Mapping[Cell, Mapping[str, Mapping[int, Mapping[str, Any]]]],
    arm: str,
    other: str,
    variant: str = "",
    draws: int = 4000,
) -> dict[str, Any] | None:
    """Interquartile mean of the difference and share of pairs ahead over all cells, with bootstrap intervals.

    Seeds are drawn with replacement within a cell (stratified), pairs together. Only cells of the variant count: the
    plain protocol, or one rate for all arms.
    """
    strata = []
    for cell, arms in cells.items():
        seeds = shared_seeds(arms, arm, other)
        if cell[3] == variant and len(seeds) >= FEWEST:
            strata.append(
                100 * np.array([outcome(arms[arm][s], "pass@1") - outcome(arms[other][s], "pass@1") for s in seeds])
            )
    if not strata:
        return None
    rng = np.random.default_rng(0)

    def summary(parts: Sequence[Any]) -> tuple[float, float]:
        joined = np.concatenate(parts)
        improved = np.mean([np.mean((part > 0) + 0.5 * (part == 0)) for part in parts])
        return float(stats.trim_mean(joined, 0.25)), float(improved)

    drawn = np.array([summary([rng.choice(part, part.size) for part in strata]) for _ in range(draws)])
    iqm, improvement = summary(strata)
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return {
        "cells": len(strata),
        "runs": sum(part.size for part in strata),
        "iqm": (iqm, float(low[0]), float(high[0])),
        "improvement": (improvement, float(low[1]), float(high[1])),
    }


def saturated_at_start(arms: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> float:
    """Share of groups without a difference in the first batch, which is alike for all arms of a seed."""
    curves = [record["curves"] for seeds in arms.values() for record in seeds.values()]
    return float(np.mean([each["equal"][0] for each in curves]))
