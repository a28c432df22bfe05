"""From a file, a folder or a hub id to problems."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebpo_core.data.formats import FORMATS, Format, detect
from ebpo_core.data.problem import BOXED, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from datasets import Dataset

SUFFIXES = (".jsonl", ".json", ".parquet")

# Configurations for sets that have several, and the form where columns alone would not tell it from others.
_CONFIGS = {
    "openai/gsm8k": "main",
    "open-r1/DAPO-Math-17k-Processed": "all",
    "Hothan/OlympiadBench": "OE_TO_maths_en_COMP",
}
_ARROW_ROWS = 1000


def read(
    name_or_path: str | Path,
    format: str = "auto",  # noqa: A002  the name that users know from pandas and datasets
    *,
    split: str | None = None,
    config: str | None = None,
    instruction: str | None = BOXED,
) -> list[Problem]:
    """Read a data set in one of the forms of ``FORMATS``.

    Args:
        name_or_path: A ``.jsonl``, ``.json`` (a list of objects) or ``.parquet`` file; a folder written by
            ``save_to_disk`` or holding such files as a data set's repository does; or a hub id.
        format: A key of ``FORMATS``, or "auto" to tell it by the columns.
        split: Of a folder or a hub id; needed where there are several.
        config: The hub data set's configuration; known for GSM8K ("main"), OlympiadBench ("OE_TO_maths_en_COMP") and
            DAPO-Math-17k-Processed ("all").
        instruction: What is asked after each question; None for the bare question. Forms whose prompts are whole keep
            theirs.

    Returns:
        Problems in the order of the rows. In forms whose sets repeat rows (DAPO's does, about a hundred times), the
        first of each prompt; prompts that occur with different answers are left out, with a warning. Ids are the set's
        own, or "<source>/<number>" where it has none or uses one twice. Rows without anything to verify, such as
        NuminaMath's proofs, are left out, with a warning.

    Raises:
        ValueError: Nothing is there, the form is unknown or ambiguous, a row lacks a question or an answer, or
            several splits are there and none was named.
        ImportError: A library that this needs is not installed.
    """
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format={format!r}: not one of {['auto', *FORMATS]}")
    rows, source = _rows(name_or_path, split, config)
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{name_or_path}: no rows")
    form = FORMATS[detect(set(first), first, str(name_or_path)) if format == "auto" else format]
    try:
        left_out: list[int] = []
        problems = _problems(form, chain([first], rows), source, instruction, left_out)
        result = _distinct(problems, source) if form.repeats else list(problems)
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{name_or_path}: columns {sorted(first)} do not fit format={format!r} ({type(error).__name__}: {error})"
        ) from error
    if left_out:
        warnings.warn(
            f"{source}: {len(left_out)} rows left out, in which nothing can be verified (the first: row {left_out[0]})",
            stacklevel=2,
        )
    if len({problem.id for problem in result}) < len(result):
        # Some sets number each of their parts from 1.
        result = [replace(problem, id=f"{source}/{number}") for number, problem in enumerate(result)]
    return result


def _problems(
    form: Format, rows: Iterable[dict[str, Any]], source: str, instruction: str | None, left_out: list[int]
) -> Iterator[Problem]:
    """The problems in rows; numbers of rows that the form leaves out are added to ``left_out``."""
    for number, row in enumerate(rows):
        if form.leaves_out(row):
            left_out.append(number)
        else:
            yield form.problem(row, number, source, instruction)


def _distinct(problems: Iterable[Problem], source: str) -> list[Problem]:
    """The first of each prompt, without prompts whose answers differ."""
    kept: dict[str, Problem] = {}
    conflicting: set[str] = set()
    for problem in problems:
        first = kept.setdefault(problem.prompt, problem)
        if first.answer != problem.answer:
            conflicting.add(problem.prompt)
    if conflicting:
        warnings.warn(
            f"{source}: {len(conflicting)} prompts left out, which occur with different answers "
            f"(the first: {next(iter(sorted(conflicting)))[:80]!r})",
            stacklevel=3,
        )
    return [problem for prompt, problem in kept.items() if prompt not in conflicting]


def _rows(name_or_path: str | Path, split: str | None, config: str | None) -> tuple[Iterable[dict[str, Any]], str]:
    path = Path(name_or_path).expanduser()
    if path.is_file():
        if split is not None or config is not None:
            raise ValueError(f"{path}: a file has no splits or configurations; leave out split={split!r}, {config=}")
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: a data file must end in one of {SUFFIXES}")
        return {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}[path.suffix](path), path.stem
    if path.is_dir():
        return _dataset_rows(_folder(path, split, config)), path.name
    if path.suffix in SUFFIXES or path.is_absolute() or str(name_or_path).count("/") > 1:
        raise ValueError(f"{path}: no such file or folder")
    name = str(name_or_path)
    return _dataset_rows(_hub(name, split, config)), name


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _object(json.loads(line), f"{path}, line {number}")


def _json(path: Path) -> Iterator[dict[str, Any]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, list):
        raise ValueError(f"{path}: a .json data file holds a list of objects, this one a {type(content).__name__}")
    for number, row in enumerate(content):
        yield _object(row, f"{path}, element {number}")


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object, found a {type(row).__name__}")
    return row


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(f'{path}: reading Parquet needs pyarrow: pip install "ebpo-core[train]"') from error
    with ParquetFile(path) as file:
        # Batch by batch: DAPO's file holds 1.8 million rows of which one in a hundred is kept.
        for batch in file.iter_batches(batch_size=_ARROW_ROWS):
            yield from batch.to_pylist()


def _folder(path: Path, split: str | None, config: str | None) -> Dataset:
    load_from_disk, load_dataset = _datasets_library(str(path), "load_from_disk", "load_dataset")
    saved = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    if saved and config is not None:
        raise ValueError(f"{path}: config={config!r}: a saved data set has no configurations; leave it out")
    return _one_split(load_from_disk(str(path)) if saved else load_dataset(str(path), config), str(path), split)


def _hub(name: str, split: str | None, config: str | None) -> Dataset:
    (load_dataset,) = _datasets_library(name, "load_dataset")
    try:
        data = load_dataset(name, config or _CONFIGS.get(name))
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"{name}: neither a file nor a folder here, nor a data set that the hub gave us ({error})"
        ) from error
    return _one_split(data, name, split)


def _one_split(data: Any, name: str, split: str | None) -> Any:
    if not isinstance(data, dict):
        if split is not None:
            raise ValueError(f"{name}: split={split!r}: this data set was saved without splits; leave it out")
        return data
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split not in data:
        raise ValueError(f"{name}: split={split!r}: name one of {list(data)}")
    return data[split]


def _dataset_rows(data: Dataset) -> Iterator[dict[str, Any]]:
    # As Arrow tables: cells as they are stored, no image decoded.
    for table in data.with_format("arrow").iter(batch_size=_ARROW_ROWS):
        yield from table.to_pylist()


def _datasets_library(name: str, *functions: str) -> list[Any]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f'{name}: folders and hub ids need the datasets library: pip install "ebpo-core[train]"'
        ) from error
    return [getattr(datasets, function) for function in functions]
