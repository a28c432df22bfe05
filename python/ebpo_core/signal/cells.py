"""Cells of a table of rollouts as numbers, steps and codes: whatever JSON and Parquet can hold, or an error by name."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from reprlib import repr as shortened
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebpo_core.inputs import MAX_REWARD

Vector = NDArray[np.float64]
Codes = NDArray[np.int64]


def read_rewards(rows: Sequence[Mapping[str, Any]], column: str) -> Vector:
    """(N,) rewards of one column; NaN where there is none. A list in a cell holds the rewards of tokens, and is summed.

    Raises:
        ValueError: A cell is no number, is infinite, or is larger than ``MAX_REWARD``.
    """
    return np.array([_reward(row.get(column), column, number) for number, row in enumerate(rows, 1)])


def _reward(value: Any, column: str, number: int) -> float:
    where = f"row {number}, {column}={shortened(value)}"
    try:
        reward = _sum(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: expected a number, or null for a completion that could not be scored; "
            "name another column with reward="
        ) from error
    except OverflowError:  # of an integer, or of a sum
        reward = math.inf
    if math.isinf(reward):
        raise ValueError(f"{where}: rewards are finite; mend the reward function")
    if abs(reward) > MAX_REWARD:
        raise ValueError(f"{where}: its magnitude must be at most {MAX_REWARD:g}; mend the reward function")
    return reward


def _sum(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, (list, tuple)):
        return math.fsum(map(_sum, value))
    return float(value)


def read_steps(values: Sequence[Any], column: str) -> Codes:
    """(N,) codes of steps, in rising order.

    Raises:
        ValueError: A value is no whole number, or does not fit into 64 bits.
    """
    numbers = []
    for row, value in enumerate(values, 1):
        try:
            number = int(value)
            whole = isinstance(value, str) or number == value
        except (TypeError, ValueError, OverflowError):
            number, whole = 0, False
        if not whole or not -(2**63) <= number < 2**63:
            raise ValueError(
                f"column {column!r}: steps are whole numbers of at most 64 bits, and row {row} has {shortened(value)}; "
                "name another with step="
            )
        numbers.append(number)
    return np.unique(np.array(numbers, dtype=np.int64), return_inverse=True)[1].reshape(-1)


def token(value: Any) -> Hashable:
    """A value that can be compared and hashed; messages become their JSON text, and NaN is missing, as None is."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, (str, int, float, bool, bytes)) or value is None:
        return value
    return json.dumps(value, sort_keys=True, default=str)


def codes_of(values: Sequence[Hashable]) -> Codes:
    """Codes of values, from 0 in the order of first appearance."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(value, len(known)) for value in values], dtype=np.int64)
