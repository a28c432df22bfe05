"""Rows of a JSON Lines, Parquet or CSV file as plain dicts, in and out, without the ``datasets`` package."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ebpo_core.files import write_bytes, write_text

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
WRITABLE = (".jsonl", ".parquet")

Row = dict[str, Any]


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """Read a data file by its suffix; ``.json`` is an array of objects or JSON Lines, ``.csv`` gives text only.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: An unknown suffix, no rows, or a line that is not an object.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{str(path)!r}: no such data file")
    if file.suffix == ".parquet":
        import pyarrow.parquet as parquet  # type: ignore[import-untyped, unused-ignore]

        rows: list[Any] = parquet.read_table(file).to_pylist()
    elif file.suffix == ".csv":
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    elif file.suffix in (".jsonl", ".json"):
        text = file.read_text(encoding="utf-8")
        try:
            if file.suffix == ".json" and text.lstrip().startswith("["):
                rows = json.loads(text)
            else:
                rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is not JSON Lines: {error}") from error
    else:
        raise ValueError(f"{str(path)!r}: a data file must end in one of {', '.join(SUFFIXES)}")
    if not rows:
        raise ValueError(f"{str(path)!r} holds no rows")
    wrong = next((number for number, row in enumerate(rows, start=1) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise ValueError(f"{str(path)!r}, row {wrong}: expected an object with a field 'prompt'")
    return rows


def check_writable(path: str | os.PathLike[str]) -> Path:
    """The path of a data file to be written, known to be possible before hours of work go into its content."""
    file = Path(path).expanduser()
    if file.suffix not in WRITABLE:
        raise ValueError(f"output={str(path)!r}: must end in {' or '.join(WRITABLE)}")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def write_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as JSON Lines or Parquet; a reader sees the old file or the new one, never half of one."""
    file = check_writable(path)
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet as parquet

        content = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), content)
        write_bytes(file, content.getvalue().to_pybytes())
    else:
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file
