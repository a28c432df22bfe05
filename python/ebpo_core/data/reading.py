"""From a file, a folder or a hub id to problems."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebpo_core.data.formats import FORMATS, Format, detect
from ebpo_core.data.problem import BOXED, Problem
from ebpo_core.data.rows import read_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def read(
    name_or_path: str | Path,
    format: str = "auto",  # noqa: A002  the name that users know from pandas and datasets
    *,
    split: str | None = None,
    config: str | None = None,
    instruction: str | None = BOXED,
    keep_duplicates: bool = False,
) -> list[Problem]:
    """Read a data set in one of the forms of ``FORMATS``.

    Args:
        name_or_path: A file, a folder or a hub id, as :func:`ebpo_core.data.read_rows` takes it.
        format: A key of ``FORMATS``, or "auto" to tell it by the columns.
        split, config: As for :func:`ebpo_core.data.read_rows`.
        instruction: What is asked after each question; None for the bare question. Forms whose prompts are whole keep
            theirs.
        keep_duplicates: Keep every row of a file in which prompts were repeated on purpose (oversampling).

    Returns:
        Problems in the order of the rows. Of forms whose sets repeat rows (verl's and DAPO's; DAPO's a hundred
        times), the first row of each prompt, with a warning that counts the others; with ``keep_duplicates`` every row,
        with "#2", "#3", ... after an id that is repeated. Their prompts that occur with different answers are left out,
        with a warning. Other forms keep every row. Ids are the set's own, or "<source>/<number>" where it has none or
        uses one twice. Rows without anything to verify, such as NuminaMath's proofs, are left out, with a warning.

    Raises:
        ValueError: Nothing is there, the form is unknown or ambiguous, a row lacks a question or an answer, or
            several splits are there and none was named.
        ImportError: A library that this needs is not installed.
    """
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format={format!r}: not one of {['auto', *FORMATS]}")
    path = Path(name_or_path).expanduser()
    source = path.stem if path.is_file() else path.name if path.is_dir() else str(name_or_path)
    rows = read_rows(name_or_path, split=split, config=config)
    first = next(rows)
    form = FORMATS[detect(set(first), first, str(name_or_path)) if format == "auto" else format]
    try:
        left_out: list[int] = []
        problems = _problems(form, chain([first], rows), source, instruction, left_out)
        result = _distinct(problems, source, keep_duplicates) if form.repeats else list(problems)
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


def _distinct(problems: Iterable[Problem], source: str, keep_duplicates: bool) -> list[Problem]:
    """The first of each prompt, or all of it, without prompts whose answers differ."""
    first: dict[str, Problem] = {}
    rows: list[Problem] = []
    conflicting: set[str] = set()
    for problem in problems:
        if first.setdefault(problem.text, problem).answer != problem.answer:
            conflicting.add(problem.text)
        rows.append(problem)
    if conflicting:
        warnings.warn(
            f"{source}: {len(conflicting)} prompts left out, which occur with different answers "
            f"(the first: {next(iter(sorted(conflicting)))[:80]!r})",
            stacklevel=3,
        )
    rows = [problem for problem in rows if problem.text not in conflicting]
    if keep_duplicates:
        times: Counter[tuple[str, str]] = Counter()
        for row, problem in enumerate(rows):
            times[problem.id, problem.text] += 1
            if (time := times[problem.id, problem.text]) > 1:
                rows[row] = replace(problem, id=f"{problem.id}#{time}")
        return rows
    kept = [problem for problem in rows if problem is first[problem.text]]
    if len(kept) < len(rows):
        warnings.warn(
            f"{source}: {len(rows) - len(kept)} of {len(rows)} rows left out, which repeat a prompt; each of the "
            f"{len(kept)} prompts is read once (keep_duplicates=True keeps them all)",
            stacklevel=3,
        )
    return kept
