"""Rewards of prompts whose difficulty is known, and files of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def draw_rates(rng: np.random.Generator, prompts: int, zero: float, one: float, a: float, b: float) -> Array:
    """(prompts,) success rates: 0 with probability ``zero``, 1 with ``one``, else Beta(a, b)."""
    where = rng.random(prompts)
    return np.where(where < zero, 0.0, np.where(where < zero + one, 1.0, rng.beta(a, b, prompts)))


def draw_rewards(rng: np.random.Generator, rates: Array, size: int) -> Array:
    """(prompts, size) rewards of 0 and 1."""
    return (rng.random((len(rates), size)) < rates[:, None]).astype(float)


def rows_of(rewards: Iterable[Iterable[float]], groups_per_step: int | None = None) -> list[dict[str, Any]]:
    """A row a completion, with its prompt, an id of it, and a step where ``groups_per_step`` is given."""
    rows = []
    for number, group in enumerate(rewards):
        step = {} if groups_per_step is None else {"step": number // groups_per_step}
        about = {**step, "group": f"g{number}", "prompt": f"Prompt {number}"}
        rows.extend({**about, "reward": float(reward)} for reward in group)
    return rows


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def healthy(seed: int = 0, groups: int = 24, size: int = 8, groups_per_step: int | None = 8) -> list[dict[str, Any]]:
    """Rows with nothing wrong: prompts of medium difficulty."""
    rng = np.random.default_rng(seed)
    return rows_of(draw_rewards(rng, draw_rates(rng, groups, 0.05, 0.05, 2, 2), size), groups_per_step)
