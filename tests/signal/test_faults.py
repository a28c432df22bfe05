"""Each warning on a file that has that fault and no other, and none on files that have none; what rules do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rollout_files import draw_rewards, healthy, rows_of, write_lines

import ebpo_core
from ebpo_core.signal import Report, diagnose, read_rollouts
from ebpo_core.signal.rollouts import Rollouts

Rows = list[dict[str, Any]]
OPTIONS = {"resamples": 10}


def report_on(tmp_path: Path, rows: Rows, **named: Any) -> Report:
    return diagnose(read_rollouts(write_lines(tmp_path / "rollouts.jsonl", rows), **named), **OPTIONS)


def kinds(report: Report) -> list[str]:
    return [fault.kind for fault in report.warnings]


@pytest.mark.parametrize("steps", [None, 8])
@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_file_has_no_warnings(tmp_path: Path, steps: int | None, seed: int) -> None:
    report = report_on(tmp_path, healthy(seed, groups_per_step=steps))
    assert report.warnings == ()


def constant(rows: Rows) -> Rows:
    return [{**row, "reward": 0.0} for row in rows]


def failing(rows: Rows) -> Rows:
    return [{**row, "reward": None} if number % 30 == 0 else row for number, row in enumerate(rows)]


def nan(rows: Rows) -> Rows:
    return [{**row, "reward": float("nan")} if number % 30 == 0 else row for number, row in enumerate(rows)]


def duplicated(rows: Rows) -> Rows:
    return [{**row, "prompt": "Prompt 1" if row["group"] == "g0" else row["prompt"]} for row in rows]


def one_group(rows: Rows) -> Rows:
    return [{"group": 1, "reward": row["reward"]} for row in rows]


def unique(rows: Rows) -> Rows:
    return [{"group": number, "reward": row["reward"]} for number, row in enumerate(rows)]


def single(rows: Rows) -> Rows:
    return [row for number, row in enumerate(rows) if number % 8 == 0 or int(row["group"][1:]) % 4]


def giant(rows: Rows) -> Rows:
    return [*rows, *({**rows[0], "group": "none", "prompt": "none"} for _ in range(200)), {**rows[0], "reward": 1.0}]


def mixed(rows: Rows) -> Rows:
    return [{**row, "prompt": f"{row['prompt']} {number % 2}"} for number, row in enumerate(rows)]


def sources(rows: Rows) -> Rows:
    return [
        {**row, "source": "code", "reward": 100 * row["reward"]}
        if int(row["group"][1:]) % 2
        else {**row, "source": "math"}
        for row in rows
    ]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("constant_verifier", constant),
        ("failing_verifier", failing),
        ("failing_verifier", nan),
        ("duplicate_prompts", duplicated),
        ("one_group", one_group),
        ("unique_group_column", unique),
        ("single_completions", single),
        ("mixed_prompts", mixed),
        ("different_scales", sources),
    ],
)
def test_each_fault_is_found_and_nothing_else(tmp_path: Path, kind: str, change: Callable[[Rows], Rows]) -> None:
    assert kinds(report_on(tmp_path, change(healthy(groups_per_step=None)), group="group")) == [kind]


def test_a_giant_group_is_found(tmp_path: Path) -> None:
    rows = [{"group": row["group"], "reward": row["reward"]} for row in giant(healthy(groups_per_step=None))]
    assert kinds(report_on(tmp_path, rows)) == ["giant_group"]


def test_a_prompt_that_comes_twice_in_a_step_is_found_where_prompts_name_the_groups(tmp_path: Path) -> None:
    rows = [{name: row[name] for name in ("prompt", "reward", "step")} for row in healthy()]
    assert kinds(report_on(tmp_path, rows)) == []
    doubled = [{**row, "prompt": "Prompt 0" if row["prompt"] == "Prompt 1" else row["prompt"]} for row in rows]
    assert kinds(report_on(tmp_path, doubled)) == ["duplicate_prompts"]
    # In another step it is another visit.
    later = [{**row, "prompt": "Prompt 0" if row["prompt"] == "Prompt 9" else row["prompt"]} for row in rows]
    assert kinds(report_on(tmp_path, later)) == []


def test_reward_columns_are_compared(tmp_path: Path) -> None:
    rows = [{**row, "style": 50 * row["reward"] * (number % 3), "format": 1} for number, row in enumerate(healthy())]
    assert kinds(report_on(tmp_path, rows, reward=["reward", "style"])) == ["different_scales"]
    assert kinds(report_on(tmp_path, rows, reward=["reward", "style"], weights=[1, 0.02])) == []
    assert kinds(report_on(tmp_path, rows, reward=["reward", "format"])) == ["constant_reward"]


def test_steps_of_one_group_are_found(tmp_path: Path) -> None:
    report = report_on(tmp_path, healthy(groups_per_step=1))
    assert kinds(report) == ["one_group_per_step"]
    # As it says: the rule gives 0 to dead groups there, and its other form does not.
    rules = {rule.name: rule for rule in report.rules}
    assert rules["ebpo"].relative == 0
    assert rules['ebpo, normalize="scale"'].relative != 0


def test_dead_groups_are_warned_of_above_the_share(tmp_path: Path) -> None:
    rewards = draw_rewards(np.random.default_rng(0), np.repeat([0.0, 0.5], [14, 10]), 16)
    rollouts = read_rollouts(write_lines(tmp_path / "dead.jsonl", rows_of(rewards)))
    assert kinds(diagnose(rollouts, **OPTIONS)) == ["dead_groups"]
    assert kinds(diagnose(rollouts, max_dead=0.6, **OPTIONS)) == []
    with pytest.raises(ValueError, match=r"max_dead=1.5"):
        diagnose(rollouts, max_dead=1.5)


def rollouts_of(rewards: np.ndarray, groups_per_step: int) -> Rollouts:
    groups = np.repeat(np.arange(len(rewards)), rewards.shape[1])
    flat = rewards.reshape(-1)
    return Rollouts("plain", flat, {"reward": flat}, groups, "group", None, groups // groups_per_step, has_steps=True)


def test_rules_are_what_the_library_computes_step_by_step() -> None:
    rewards = draw_rewards(np.random.default_rng(1), np.array([0, 0.5, 1, 0.4, 0, 0.6, 0.5, 1]), 16)
    rules = {rule.name: rule for rule in diagnose(rollouts_of(rewards, 4), **OPTIONS).rules}
    assert set(rules) >= {"ebpo", 'ebpo, normalize="scale"', "grpo", "dr_grpo", "rloo", "reinforce_pp", "james_stein"}
    dead = rewards.min(axis=1) == rewards.max(axis=1)
    failed, passed = dead & (rewards[:, 0] == 0), dead & (rewards[:, 0] == 1)
    ebpo, scale = ebpo_core.EBPO(), ebpo_core.EBPO(normalize="scale")
    expected = {
        "ebpo": np.concatenate([ebpo(step) for step in np.split(rewards, 2)]),
        'ebpo, normalize="scale"': np.concatenate([scale(step) for step in np.split(rewards, 2)]),
        "reinforce_pp": np.concatenate(
            [ebpo_core.advantages(step, method="reinforce_pp") for step in np.split(rewards, 2)]
        ),
        "grpo": ebpo_core.advantages(rewards, method="grpo"),
    }
    for name, scores in expected.items():
        rule = rules[name]
        assert rule.failed is not None
        assert rule.passed is not None
        assert rule.failed.mean == pytest.approx(scores[failed].mean(), abs=1e-12)
        assert rule.failed.lowest == pytest.approx(scores[failed].min(), abs=1e-12)
        assert rule.passed.highest == pytest.approx(scores[passed].max(), abs=1e-12)
        assert rule.relative == pytest.approx(np.abs(scores[dead]).mean() / np.abs(scores[~dead]).mean())
    assert rules["grpo"].relative == rules["rloo"].relative == 0
    assert rules['ebpo, normalize="scale"'].failed.highest < 0 < rules['ebpo, normalize="scale"'].passed.lowest


def test_a_step_counts_its_informative_groups() -> None:
    rewards = np.array(
        [[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1], [0, 1, 1, 0], [1, 0, 1, 0]], dtype=float
    )
    step = diagnose(rollouts_of(rewards, 3), **OPTIONS).step
    assert step.groups == 3
    assert step.informative == 2  # 1 and 3
    squares = np.array([0.75, 1, 1])
    assert step.effective == pytest.approx((1 + squares.sum() ** 2 / (squares**2).sum()) / 2)
