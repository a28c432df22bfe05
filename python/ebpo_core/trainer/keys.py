"""Checks of the keys that come from columns of the dataset: before training what is known, and that prompts agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any

from datasets import Dataset

from ebpo_core.keys import Key, key_of_row, path_of


def check_dataset(columns: Sequence[str], dataset: Any, max_keys: int | None = None, known: Iterable[Key] = ()) -> None:
    """Refuse a dataset whose keys a later batch would be refused for.

    A stream, and a dataset that makes its rows when they are read (``set_transform``), cannot be looked through: of
    these the names of the columns are checked, where they are known, and the rest when a batch is scored.

    Args:
        columns: ``ebpo_keys``, at least one; a dot reaches into a column of mappings.
        dataset: the trainer's.
        max_keys: most keys that it may have, parents and ``known`` ones included; None for any number.
        known: keys of the prior that training starts from.

    Raises:
        ValueError: a column that is not there, or too many keys.
        TypeError: a value that no key can hold, such as a float.
    """
    present = getattr(dataset, "column_names", None)
    fields = [column if present is None or column in present else column.split(".")[0] for column in columns]
    missing = [column for column, field in zip(columns, fields, strict=True) if present and field not in present]
    if missing:
        raise ValueError(
            f"ebpo_keys={list(columns)!r}: the dataset has no column {missing[0]!r}; it has {sorted(present or [])}"
        )
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return
    paths = {tuple(path_of(key)) for key in known}
    for row, key in _distinct_keys(columns, dataset.select_columns(list(dict.fromkeys(fields)))):
        path = path_of(key, f"ebpo_keys={list(columns)!r}: the key of row {row}")
        paths.update(tuple(path[:depth]) for depth in range(len(path) + 1))
    paths.discard(())
    if max_keys is not None and len(paths) > max_keys:
        whose = "the dataset and the prior together have" if known else "the dataset has"
        raise ValueError(
            f"ebpo_keys={list(columns)!r}: {whose} {len(paths)} keys, parents included, more than "
            f"ebpo_max_keys={max_keys}: raise ebpo_max_keys, or name columns with fewer values"
        )


def _distinct_keys(columns: Sequence[str], dataset: Any) -> Iterator[tuple[int, Any]]:
    """Rows and their keys; rows with the values of an earlier one are passed over, which are nearly all of them."""
    seen: set[Any] = set()
    rows = count()
    for batch in dataset.with_format(None).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            row = next(rows)
            if not any(isinstance(value, (list, dict)) for value in values):  # which have no hash
                if values in seen:
                    continue
                seen.add(values)
            yield row, key_of_row(columns, dict(zip(batch, values, strict=True)), "ebpo_keys")


def keys_of_groups(keys: Sequence[Any], size: int, columns: Sequence[str]) -> list[Any]:
    """One key per group of ``size`` consecutive rows, whose keys must agree. TypeError for what is no key."""
    for start in range(0, len(keys), size):
        path_of(keys[start], f"ebpo_keys={list(columns)!r}: the key of completion {start}")
        odd = next((row for row in range(start, start + size) if keys[row] != keys[start]), None)
        if odd is not None:
            raise ValueError(
                f"ebpo_keys={list(columns)!r}: completions {start} and {odd} of one prompt have the keys "
                f"{keys[start]!r} and {keys[odd]!r}; a key must be the prompt's, not the completion's"
            )
    return list(keys[::size])
