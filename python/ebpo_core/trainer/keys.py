"""Checks of the keys that come from columns of the dataset: the columns exist, and rows of a prompt agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_columns(columns: Sequence[str], present: Sequence[str] | None) -> None:
    """Raise ValueError for a column that the dataset lacks; a stream may not know its columns (None)."""
    missing = [column for column in columns if present is not None and column not in present]
    if missing:
        raise ValueError(
            f"ebpo_keys={list(columns)!r}: the dataset has no column {missing[0]!r}; it has {sorted(present or [])}"
        )


def keys_of_groups(keys: Sequence[Any], size: int, columns: Sequence[str]) -> list[Any]:
    """One key per group of ``size`` consecutive rows, whose keys must agree."""
    for start in range(0, len(keys), size):
        odd = next((row for row in range(start, start + size) if keys[row] != keys[start]), None)
        if odd is not None:
            raise ValueError(
                f"ebpo_keys={list(columns)!r}: completions {start} and {odd} of one prompt have the keys "
                f"{keys[start]!r} and {keys[odd]!r}; a key must be the prompt's, not the completion's"
            )
    return list(keys[::size])
