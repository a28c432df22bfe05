"""Rollouts: rewards with their groups, read from what trainers and evaluations leave on the disk."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebpo_core.data.rows import read_rows
from ebpo_core.evaluation.journal import read_journal
from ebpo_core.signal.layouts import SAMPLES, Layout, Row, find_layout

Vector = NDArray[np.float64]
Codes = NDArray[np.int64]

# A key of verl 0.9: the prompt's uid, the number of the session, and that of the session's output.
_VERL_KEY = re.compile(r"(.+)_(\d+)_(\d+)", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Rollouts:
    """N scored completions in M groups. Codes count from 0 in the order of first appearance.

    Attributes:
        form: What wrote them, see :class:`~ebpo_core.signal.layouts.Layout`.
        rewards: (N,) float64; NaN where a completion could not be scored.
        columns: The rewards by column, weighted, each (N,) float64; ``rewards`` is their sum.
        groups: (N,) int64 codes.
        group_column: Where they came from, for messages.
        prompts: (N,) int64 codes of the prompts' texts, or None where the file has none.
        steps: (N,) int64 codes of the training steps, in rising order; all 0 where the file has none.
        has_steps: False where the file has no steps.
        sources: (N,) labels, or None.
        notes: What the reader did that its user should know, in sentences.
    """

    form: str
    rewards: Vector
    columns: dict[str, Vector]
    groups: Codes
    group_column: str
    prompts: Codes | None
    steps: Codes
    has_steps: bool
    sources: list[str] | None = None
    notes: tuple[str, ...] = ()

    def last_steps(self, count: int) -> Rollouts:
        """Only the last ``count`` steps.

        Raises:
            ValueError: ``count`` is less than 1, or the file has no steps.
        """
        if count < 1:
            raise ValueError(f"last={count}: expected at least 1 step")
        if not self.has_steps:
            raise ValueError(
                f"last={count}: these rollouts have no steps; name their column with step=, or leave it out"
            )
        kept = self.steps > self.steps.max() - count
        return replace(
            self,
            rewards=self.rewards[kept],
            columns={name: values[kept] for name, values in self.columns.items()},
            groups=_recode(self.groups[kept]),
            prompts=None if self.prompts is None else _recode(self.prompts[kept]),
            steps=self.steps[kept] - self.steps[kept].min(),
            sources=None if self.sources is None else [self.sources[row] for row in np.flatnonzero(kept)],
        )

    def in_steps_of(self, groups: int) -> Rollouts:
        """The groups in their order, so many a step, as a trainer would see them.

        Raises:
            ValueError: ``groups`` is less than 1, or the rollouts have steps already.
        """
        if groups < 1:
            raise ValueError(f"groups_per_step={groups}: expected at least 1")
        if self.has_steps:
            raise ValueError(f"groups_per_step={groups}: these rollouts have steps of their own; leave it out")
        return replace(self, steps=self.groups // groups)


def read_rollouts(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    group: str | None = None,
    reward: Sequence[str] = (),
    weights: Sequence[float] = (),
    prompt: str | None = None,
    step: str | None = None,
    source: str | None = None,
) -> Rollouts:
    """Read rewards and groups from files, or from the folders that trainers write them to.

    Args:
        paths: One or more ``.jsonl`` or ``.parquet`` files or folders: TRL's output directory or its ``completions``,
            verl's ``rollout_data_dir``, the output of ``ebpo eval``, a folder of such files. Files are taken in the
            order of the numbers in their names.
        group: The column whose equal values are a group. Where it is found by itself, see
            :func:`~ebpo_core.signal.layouts.find_layout`.
        reward: The columns of rewards; a list in a cell (rewards of tokens) is added up.
        weights: One for each of ``reward``; all 1 by default.
        prompt: The column of the prompt.
        step: The column of the training step.
        source: The column of the data set or environment.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: Nothing is in it that can be read, files of several forms, a column that is not there, or a reward
            that is neither a finite number nor missing.
    """
    named = {"group": group, "rewards": tuple(reward), "prompt": prompt, "step": step, "source": source}
    if len(weights) not in (0, len(reward)):
        raise ValueError(f"weights={list(weights)}: give one for each of reward={list(reward)}")
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    files = [file for path in given for file in find_files(path)]
    layout: Layout | None = None
    rows: list[Row] = []
    repeated = 0
    previous: list[Any] = []
    for file in files:
        found, content = _read_file(file, named)
        if layout is not None and found != layout:
            raise ValueError(f"{str(file)!r} is read by other columns than {str(files[0])!r}: give files of one form")
        layout = found
        if layout.form == "trl":
            # TRL writes its table at each log, so a batch that serves for several steps is in several files.
            rewards = layout.rewards
            batch = [
                (_token(row["prompt"]), _token(row["completion"]), [row.get(n) for n in rewards]) for row in content
            ]
            if batch == previous:
                repeated += 1
                continue
            previous = batch
        rows.extend(content)
    if layout is None:
        raise ValueError("paths=[]: give at least one file or folder")
    notes = [f"{repeated} tables repeat the batch of the one before and were left out"] if repeated else []
    return _collect(rows, layout, list(weights), notes)


def find_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files of rollouts at a path: itself, or what is in the folder.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: It is a pickle.
    """
    place = Path(path).expanduser()
    if place.suffix in (".pkl", ".pickle", ".pt"):
        raise ValueError(
            f"{str(path)!r} is a pickle, which could run code of its own and is not opened; SkyRL writes JSON Lines "
            "too, with trainer.dump_eval_results=true"
        )
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise FileNotFoundError(f"{str(path)!r}: no such file or folder")
    if (place / "samples.jsonl").is_file():
        return [place / "samples.jsonl"]
    folder = place / "completions" if (place / "completions").is_dir() else place
    # SkyRL puts a file of metrics beside its rollouts.
    names = [file for file in folder.iterdir() if file.suffix in (".jsonl", ".parquet")]
    names = [file for file in names if file.name != "aggregated_results.jsonl"]
    if not names:
        raise FileNotFoundError(f"{str(folder)!r} holds no .jsonl or .parquet file: give the file itself")
    return sorted(
        names, key=lambda file: [(part.isdigit(), int(part) if part.isdigit() else part) for part in _parts(file)]
    )


def _parts(file: Path) -> list[str]:
    return [part for part in re.split(r"(\d+)", file.stem) if part]


def _read_file(file: Path, named: Mapping[str, Any]) -> tuple[Layout, list[Row]]:
    if file.suffix == ".jsonl":
        with file.open(encoding="utf-8") as lines:
            start = lines.readline()
        if '"format": "ebpo-core/' in start:
            records: list[Row] = list(read_journal(file, "samples")[1])
            if not records:
                raise ValueError(f"{str(file)!r} holds no sample yet: wait for the first")
            return find_layout(records, str(file), named, SAMPLES), records
    rows: list[Row] = list(read_rows(file))
    layout = find_layout(rows, str(file), named)
    if layout.form == "verl" and layout.group == "uid" and not named["group"]:
        rows = list(_verl_sessions(rows))
    return layout, rows


def _verl_sessions(rows: Sequence[Row]) -> Iterator[Row]:
    """Rows of verl 0.9 with the prompt's part of their key as ``uid``; of a session's outputs, the last alone."""
    last: dict[tuple[str, str, str], tuple[int, Row]] = {}
    for row in rows:
        key = _VERL_KEY.fullmatch(str(row.get("uid")))
        if key is None:  # of another version, or of somebody's own: the ids are the groups
            yield from rows
            return
        session, output = (str(row["step"]), key[1], key[2]), int(key[3])
        if session not in last or output >= last[session][0]:
            last[session] = output, {**row, "uid": key[1]}
    yield from (row for _, row in last.values())


def _collect(rows: Sequence[Row], layout: Layout, weights: Sequence[float], notes: Sequence[str]) -> Rollouts:
    """Rows as arrays."""
    factors = list(weights) or [1.0] * len(layout.rewards)
    columns = {
        name: weight * np.array([_number(row.get(name), name, number) for number, row in enumerate(rows, 1)])
        for name, weight in zip(layout.rewards, factors, strict=True)
    }
    stacked = np.stack(list(columns.values()))
    # As TRL adds them: a function that returned None adds nothing, and where all did there is no reward.
    rewards = np.where(np.isnan(stacked).all(axis=0), np.nan, np.nansum(stacked, axis=0))

    steps = np.zeros(len(rows), dtype=np.int64)
    if layout.step is not None:
        steps = _steps([row.get(layout.step) for row in rows], layout.step)
    keys: list[Hashable] = []
    for number, (row, at) in enumerate(zip(rows, steps.tolist(), strict=True), 1):
        if row.get(layout.group) is None:
            raise ValueError(f"row {number}, {layout.group}=None: each row needs its group; name another column")
        keys.append((at, _token(row[layout.group])))
    prompt = layout.prompt
    return Rollouts(
        form=layout.form,
        rewards=rewards,
        columns=columns,
        groups=_codes(keys),
        group_column=layout.group,
        prompts=None if prompt is None else _codes([_token(row.get(prompt)) for row in rows]),
        steps=steps,
        has_steps=layout.step is not None,
        sources=None if layout.source is None else [str(row.get(layout.source)) for row in rows],
        notes=tuple(notes),
    )


def _number(value: Any, column: str, number: int) -> float:
    """One reward; NaN for None. A list holds the rewards of tokens."""
    if value is None:
        return math.nan
    if isinstance(value, (list, tuple)):
        return math.fsum(_number(one, column, number) for one in value)
    try:
        reward = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"row {number}, {column}={value!r}: expected a number, or null for a completion that could not be scored; "
            "name another column with reward="
        ) from error
    if math.isinf(reward):
        raise ValueError(f"row {number}, {column}={value!r}: rewards are finite; mend the reward function")
    return reward


def _steps(values: Sequence[Any], column: str) -> Codes:
    try:
        numbers = [int(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"column {column!r}: steps are whole numbers ({error}); name another with step=") from error
    return np.unique(np.array(numbers, dtype=np.int64), return_inverse=True)[1].reshape(-1)


def _token(value: Any) -> Hashable:
    """A value that can be compared and hashed, of what JSON and Parquet give: messages become their JSON text."""
    if isinstance(value, (str, int, float, bool, bytes)) or value is None:
        return value
    return json.dumps(value, sort_keys=True, default=str)


def _codes(values: Sequence[Hashable]) -> Codes:
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(value, len(known)) for value in values], dtype=np.int64)


def _recode(codes: Codes) -> Codes:
    return _codes(codes.tolist())
