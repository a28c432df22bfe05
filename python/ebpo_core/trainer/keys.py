"""Keys of prompts, from columns of the dataset and a hash of the prompt; what can be checked before training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from datasets import Dataset

from ebpo_core.keys import Key, key_of_row, path_of


def key_of_example(columns: Sequence[str], track_prompts: bool, row: Mapping[str, Any]) -> Any:
    """The key of a row: the values of ``columns``, and with ``track_prompts`` a hash of its prompt after them.

    Raises:
        ValueError: the row lacks a column, or its prompt.
        TypeError: the prompt holds what JSON does not, such as an image.
    """
    key = key_of_row(columns, row, "ebpo_keys") if columns else ()
    if not track_prompts:
        return key
    if "prompt" not in row:
        raise ValueError(f"ebpo_track_prompts=True: a row has no 'prompt', only {sorted(map(str, row))}")
    parents = () if key is None else key if isinstance(key, tuple) else (key,)
    return (*parents, hash_of_prompt(row["prompt"]))


def hash_of_prompt(prompt: Any) -> str:
    """16 hexadecimal digits that stand for a prompt, text or messages: BLAKE2b of its JSON.

    Among a million prompts two differ and share a hash with a probability of 3e-8.
    """
    try:
        text = json.dumps(prompt, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"ebpo_track_prompts=True: a prompt is no text or messages that JSON can hold ({error}): give the dataset "
            "a column with an id of each prompt, and name it in ebpo_keys"
        ) from None
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def check_dataset(
    columns: Sequence[str],
    dataset: Any,
    max_keys: int | None = None,
    known: Iterable[Key] = (),
    *,
    turns: int = 0,
    track_prompts: bool = False,
) -> None:
    """Refuse a dataset whose keys a later batch would be refused for.

    A stream, and a dataset that makes its rows when they are read (``set_transform``), cannot be looked through: of
    these the names of the columns are checked, where they are known, and the rest when a batch is scored.

    Args:
        columns: ``ebpo_keys``; a dot reaches into a column of mappings.
        dataset: the trainer's.
        max_keys: most keys that it may have, parents and ``known`` ones included; None for any number.
        known: keys of the prior that training starts from.
        turns: most turns of a completion, each of which is a key under the prompt's.
        track_prompts: ``ebpo_track_prompts``: each prompt has a key.

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
    numbers = range(1, turns + 1)
    read = dict.fromkeys([*fields, *(["prompt"] if track_prompts else [])])
    for row, key in _distinct_keys(columns, track_prompts, dataset.select_columns(list(read))):
        path = path_of(key, f"ebpo_keys={list(columns)!r}: the key of row {row}")
        paths.update(tuple(path[:depth]) for depth in range(len(path) + 1))
        paths.update((*path, number) for number in numbers)
    paths.discard(())
    if max_keys is not None and len(paths) > max_keys:
        whose = "the dataset and the prior together have" if known else "the dataset has"
        options = f"ebpo_keys={list(columns)!r}" + (", ebpo_track_prompts=True" if track_prompts else "")
        besides = "parents and turns included" if turns else "parents included"
        raise ValueError(
            f"{options}: {whose} {len(paths)} keys, {besides}, more than "
            f"ebpo_max_keys={max_keys}: raise ebpo_max_keys, or name columns with fewer values"
        )


def _distinct_keys(columns: Sequence[str], track_prompts: bool, dataset: Any) -> Iterator[tuple[int, Any]]:
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
            yield row, key_of_example(columns, track_prompts, dict(zip(batch, values, strict=True)))


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
