"""Rows of a data set, in and out: JSON Lines, JSON, Parquet and CSV files, saved data sets, folders, hub ids.

Files are read without the ``datasets`` library; everything else needs it. :func:`read_rows` gives plain dicts one after
another, :func:`load_rows` the same as a ``datasets.Dataset``.
"""

from __future__ import annotations

import csv
import json
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebpo_core.files import write_bytes, write_text

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping

    from datasets import Dataset

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
WRITABLE = (".jsonl", ".parquet")

# Configurations of hub data sets that have several.
_CONFIGS = {
    "openai/gsm8k": "main",
    "open-r1/DAPO-Math-17k-Processed": "all",
    "Hothan/OlympiadBench": "OE_TO_maths_en_COMP",
}
_ARROW_ROWS = 1000

Row = dict[str, Any]


def read_rows(name: str | os.PathLike[str], *, split: str | None = None, config: str | None = None) -> Iterator[Row]:
    """The rows of a data set, read as they are asked for.

    Args:
        name: A ``.jsonl``, ``.json`` (a list of objects, or one object a line), ``.parquet`` or ``.csv`` file (text
            only); a folder written by ``save_to_disk`` or holding such files as a data set's repository does; or a hub
            id.
        split: Of a folder or a hub id; needed where there are several.
        config: The hub data set's configuration; known for GSM8K ("main"), OlympiadBench ("OE_TO_maths_en_COMP") and
            DAPO-Math-17k-Processed ("all").

    Raises:
        ValueError: Nothing is there, a file of another kind, a line that is no object, no rows at all, or several
            splits and none named.
        ImportError: A library that this needs is not installed.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if split is not None or config is not None:
            raise ValueError(f"{path}: a file has no splits or configurations; leave out split={split!r}, {config=}")
        rows = _file_rows(path, str(path))
    else:
        data = _dataset(str(name), str(name), split, config, whole=False)
        # As Arrow tables: cells as they are stored, no image decoded.
        tables = data.with_format("arrow").iter(batch_size=_ARROW_ROWS)
        rows = chain.from_iterable(table.to_pylist() for table in tables)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{name}: holds no rows")
    return chain([first], rows)


def load_rows(
    argument: str, name: str, split: str = "train", size: int | None = None, *, config: str | None = None
) -> Dataset:
    """The rows of a data set as a ``datasets.Dataset``.

    Args:
        argument: What the user calls ``name``, for messages.
        name: As for :func:`read_rows`.
        split: Of a data set that has splits.
        size: How many of the first rows; all by default.
        config: As for :func:`read_rows`.

    Raises:
        ValueError, ImportError: As :func:`read_rows`.
    """
    path, label = Path(name).expanduser(), f"{argument}={name!r}"
    if not path.is_file():
        data = _dataset(name, label, split, config, whole=True)
    elif path.suffix == ".parquet":
        (dataset,) = _datasets_library(label, "Dataset")
        data = dataset.from_parquet(str(path))
    else:
        (dataset,) = _datasets_library(label, "Dataset")
        rows = list(_file_rows(path, label))
        # Named by all rows: the library's own `from_list` looks at the first alone.
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row.get(name) for row in rows] for name in names}
        try:
            data = dataset.from_dict(columns)
        except (TypeError, ValueError, OverflowError) as error:  # pyarrow's, too, which names no column
            raise ValueError(f"{label}: {_mixed(columns)} ({error})") from error
    if not len(data):
        raise ValueError(f"{label}: holds no rows")
    return data if size is None else data.select(range(min(size, len(data))))


def _mixed(columns: Mapping[str, list[Any]]) -> str:
    """What keeps values from being columns: the first whose rows hold values of several kinds, and where it changes."""
    for name, values in columns.items():
        kinds: dict[type[Any], int] = {}
        for number, value in enumerate(values):
            kinds.setdefault(type(value), number)
        kinds.pop(type(None), None)
        if len(kinds) > 1 and set(kinds) != {int, float}:
            found = ", ".join(f"{kind.__name__} (row {number})" for kind, number in kinds.items())
            return f"column {name!r} holds values of several kinds, {found}: give it one kind in all rows"
    return "values that no column can hold: give each column one kind in all rows"


def check_writable(path: str | os.PathLike[str]) -> Path:
    """The path of a data file to be written, known to be possible before hours of work go into its content."""
    file = Path(path).expanduser()
    if file.suffix not in WRITABLE:
        raise ValueError(f"output={str(path)!r}: must end in {' or '.join(WRITABLE)}")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def write_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]], schema: Any = None) -> Path:
    """Write rows as JSON Lines or Parquet; a reader sees the old file or the new one, never half of one.

    Args:
        path: Ends in ``.jsonl`` or ``.parquet``.
        rows: With the same columns each.
        schema: pyarrow's, of a Parquet file; by default that of the rows.

    Raises:
        ValueError: Another suffix.
        ImportError: pyarrow is not installed.
    """
    file = check_writable(path)
    if file.suffix == ".jsonl":
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return file
    pyarrow, parquet = _pyarrow(file)
    content = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows], schema=schema), content)
    write_bytes(file, content.getvalue().to_pybytes())
    return file


# ------------------------------------------------------------------------------------------------------------ one file


def _file_rows(path: Path, label: str) -> Iterator[Row]:
    """The rows of a file by its suffix."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{label}: a data file must end in one of {', '.join(SUFFIXES)}")
    rows = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv}[path.suffix](path, label)
    try:
        yield from rows
    except UnicodeDecodeError as error:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        remedy = "it is compressed by gzip: unpack it first" if packed else f"expected text in UTF-8 ({error})"
        raise ValueError(f"{label}: {remedy}") from error


def _jsonl(path: Path, label: str) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:  # Windows' editors begin a file with a byte order mark
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{label}, line {number}: not JSON Lines ({error})") from error
                yield _object(row, f"{label}, line {number}")


def _json(path: Path, label: str) -> Iterator[Row]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError as error:
        raise ValueError(f"{label}: nested too deeply ({error})") from error
    except ValueError:  # no single value: one object a line
        yield from _jsonl(path, label)
        return
    if not isinstance(content, list):
        raise ValueError(f"{label}: a .json data file holds a list of objects, this one a {type(content).__name__}")
    for number, row in enumerate(content):
        yield _object(row, f"{label}, element {number}")


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object, found a {type(row).__name__}")
    return row


def _csv(path: Path, label: str) -> Iterator[Row]:
    with path.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines)
        try:
            for row in reader:
                if None in row:
                    raise ValueError(f"{label}, line {reader.line_num}: more fields than the header has names")
                yield row
        except csv.Error as error:
            raise ValueError(f"{label}, line {reader.line_num}: not CSV ({error})") from error


def _parquet(path: Path, label: str) -> Iterator[Row]:
    pyarrow, parquet = _pyarrow(label)
    try:
        with parquet.ParquetFile(path) as file:
            # Batch by batch: DAPO's file holds 1.8 million rows of which one in a hundred is kept.
            for batch in file.iter_batches(batch_size=_ARROW_ROWS):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{label}: pyarrow cannot read it as Parquet ({error})") from error


def _pyarrow(label: Any) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f'{label}: Parquet needs pyarrow: pip install "ebpo-core[train]"') from error
    return pyarrow, pyarrow.parquet


# -------------------------------------------------------------------------------------------------- folders and hub ids


def _dataset(name: str, label: str, split: str | None, config: str | None, *, whole: bool) -> Any:
    """One split of a folder or of a hub's data set; with ``whole`` a set without splits is every split."""
    path = Path(name).expanduser()
    here = path.is_dir()
    if not here and (path.suffix in SUFFIXES or path.is_absolute() or name.count("/") > 1):
        raise ValueError(f"{label}: no such file or folder")
    load_from_disk, load_dataset = _datasets_library(label, "load_from_disk", "load_dataset")
    if here and any((path / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
        if config is not None:
            raise ValueError(f"{label}: config={config!r}: a saved data set has no configurations; leave it out")
        data = load_from_disk(str(path))
        if not isinstance(data, dict) and split is not None and not whole:
            raise ValueError(f"{label}: split={split!r}: this data set was saved without splits; leave it out")
    else:
        try:
            # The library finds a split by its name, or a part of one by its own syntax: "train[:1000]".
            data = load_dataset(str(path) if here else name, config or _CONFIGS.get(name), split=split)
        except (FileNotFoundError, ConnectionError) as error:
            raise ValueError(
                f"{label}: neither a file nor a folder here, nor a data set that the hub gave us ({error})"
            ) from error
    if not isinstance(data, dict):
        return data
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split not in data:
        raise ValueError(f"{label}: split={split!r}: name one of {list(data)}")
    return data[split]


def _datasets_library(label: str, *names: str) -> list[Any]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'{label}: this needs the datasets library: pip install "ebpo-core[train]"') from error
    return [getattr(datasets, name) for name in names]
