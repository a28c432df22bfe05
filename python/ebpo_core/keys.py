"""Keys of groups (topics, levels, environments): as a caller passes them, as the core reads them, and out of columns.

A key is a string or an integer, or a tuple of them, whose prefixes are its parents: ``("algebra", 3)`` is under
``"algebra"``, which is under the root ``()``. None stands for the root. A key of one part and its tuple are one key,
and so are keys that Python calls equal: True is 1.

The core is given the tuple, of plain strings and integers: the string ``"3"`` and the number 3 stay apart.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ebpo_core import _core
from ebpo_core.inputs import Groups, array_of, is_tensor

Part: TypeAlias = "str | int"
Key: TypeAlias = "str | int | tuple[str | int, ...]"
Path: TypeAlias = "tuple[str | int, ...]"


class Keys(NamedTuple):
    """The keys of a batch as the core reads them: the distinct ones, and for each group an index into them.

    ``prompts`` holds the prompt of each group where several groups are of one, its turns; else None.
    """

    paths: list[Path]
    of_group: NDArray[np.uint32]
    prompts: NDArray[np.uint32] | None = None

    def of_groups(self) -> tuple[Key, ...]:
        """The key of each group."""
        keys = [key_of(path) for path in self.paths]
        return tuple(keys[index] for index in self.of_group)


def path_of(key: Any, name: str = "key") -> Path:
    """A key as the core reads it; None and ``()`` are the root. Raises TypeError naming the argument."""
    if type(key) is str:
        return (key,)
    if key is None:
        return ()
    return tuple(_part(part, key, name) for part in (key if isinstance(key, tuple) else (key,)))


def key_of(path: Path) -> Key:
    """The key that a path stands for: ``()`` for the root, the part itself for one part."""
    return path[0] if len(path) == 1 else path


def _part(part: Any, key: Any, name: str) -> str | int:
    if isinstance(part, str):
        return str.__str__(part)  # its characters: str() of an enumeration's member is its name
    try:
        return int(operator.index(part.item() if isinstance(part, np.bool_) else part))
    except (TypeError, RuntimeError):  # torch has the other one for a tensor without data
        raise TypeError(
            f"{name} is {key!r}, which holds a {type(part).__name__}: expected a string, an int, a bool, a tuple of "
            "them, or None for the root; name anything else with str()"
        ) from None


def read_keys(keys: Any, groups: Groups, rows: int) -> Keys | None:
    """Keys of a batch of ``rows`` rewards: one per row, or one per group where ``groups`` is a group size.

    Raises TypeError for what is no key, ValueError for a wrong number of them and for a group with two.
    """
    if keys is None:
        return None
    if type(keys) is not list:
        keys = _list_of(keys)
    by_group = isinstance(groups, int)
    expected = rows // groups if isinstance(groups, int) else rows
    if len(keys) != expected:
        what = "one per group, which is a row of the matrix" if by_group else "one per reward"
        raise ValueError(f"keys has length {len(keys)}, expected {expected}: pass {what}")
    rows_of_first, codes = _core.codes_of_keys(keys)
    # Different objects may name one key: "algebra" and ("algebra",), a number and a tensor of it.
    found = [(key,) if type(key := keys[row]) is str else path_of(key, f"keys[{row}]") for row in rows_of_first]
    paths = dict.fromkeys(found)
    if len(paths) < len(found):
        index = {path: place for place, path in enumerate(paths)}
        codes = np.array([index[path] for path in found], dtype=np.uint32)[codes]
    return Keys(list(paths), codes if isinstance(groups, int) else _of_group(codes, keys, *groups))


def _list_of(keys: Any) -> list[Any]:
    if isinstance(keys, (str, bytes, Mapping)):
        raise TypeError(f"keys={keys!r}: expected one key per reward (or per group of a matrix), as a list or an array")
    if is_tensor(keys):
        keys = array_of("keys", keys)
    if isinstance(keys, np.ndarray) and keys.ndim != 1:
        raise ValueError(
            f"keys has shape {keys.shape}: expected one dimension; pass keys of several parts as a list of tuples"
        )
    if hasattr(keys, "to_pylist"):  # a column of Arrow, whose items are objects of its own
        return list(keys.to_pylist())
    return keys.tolist() if isinstance(keys, np.ndarray) else list(keys)


def _of_group(codes: NDArray[np.uint32], keys: list[Any], groups: NDArray[np.uint32], count: int) -> NDArray[np.uint32]:
    """The key of each group, which all its rows must share."""
    first = np.zeros(count, dtype=np.int64)
    first[groups[::-1]] = np.arange(len(groups))[::-1]  # of several rows the one assigned last stays: the first
    of_group = codes[first]
    wrong = np.flatnonzero(of_group[groups] != codes)
    if wrong.size:
        row, other = int(wrong[0]), int(first[groups[wrong[0]]])
        raise ValueError(
            f"keys[{row}] is {keys[row]!r} and keys[{other}] is {keys[other]!r}, but both rows are of one group: "
            "give every completion of a prompt the key of the prompt"
        )
    return of_group


def read_columns(value: Any, name: str) -> tuple[str, ...]:
    """Names of the columns that make up a key, from general to special: one name or a list of them; ``()`` for None.

    Raises:
        TypeError: anything else; names the argument.
    """
    columns = [] if value is None else [value] if isinstance(value, str) else value
    if (
        not isinstance(columns, Sequence)
        or isinstance(columns, bytes)
        or not all(isinstance(column, str) and column for column in columns)
    ):
        raise TypeError(
            f"{name}={value!r}: expected the name of a column of the data set, or a list of names, from general to "
            "special"
        )
    return tuple(columns)


def key_of_row(columns: Sequence[str], row: Mapping[str, Any], name: str) -> Any:
    """The key that the values of ``columns`` make up, from general to special, up to the first None.

    Args:
        columns: Names of columns. A dot reaches into a column of mappings (``extra_info.level``), unless a column has
            that very name. A single column may hold lists, each of which is a path.
        row: Columns to values.
        name: The option that named the columns, for the errors.

    Raises:
        ValueError: the row lacks a column.
    """
    values = [_reach(row, column, name) for column in columns]
    if len(values) == 1 and not isinstance(values[0], (list, tuple)):
        return values[0]
    parts = list(values[0]) if len(values) == 1 else values
    end = next((depth for depth, part in enumerate(parts) if part is None), len(parts))
    return tuple(parts[:end])


def _reach(row: Any, column: str, name: str) -> Any:
    for part in [column] if column in row else column.split("."):
        if not isinstance(row, Mapping) or part not in row:
            has = f", only {sorted(map(str, row))}" if isinstance(row, Mapping) else f" in {row!r}"
            raise ValueError(f"{name} names {column!r}, and a row has no {part!r}{has}")
        row = row[part]
    return row.item() if isinstance(row, np.generic) else row
