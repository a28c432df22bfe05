"""Rollouts: rewards with their groups, read from what trainers and evaluations leave on the disk."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ebpo_core.data.rows import read_rows
from ebpo_core.evaluation.journal import read_journal
from ebpo_core.inputs import MAX_REWARD
from ebpo_core.signal.cells import Codes, Vector, codes_of, read_rewards, read_steps, token
from ebpo_core.signal.layouts import SAMPLES, Layout, Row, find_layout

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
        kept = self.steps > self.steps.max() - min(count, len(self.steps))
        return replace(
            self,
            rewards=self.rewards[kept],
            columns={name: values[kept] for name, values in self.columns.items()},
            groups=codes_of(self.groups[kept].tolist()),
            prompts=None if self.prompts is None else codes_of(self.prompts[kept].tolist()),
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
        return replace(self, steps=self.groups // min(groups, len(self.groups)))


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
            that is neither a finite number nor missing; a file that is given twice, also through its folder.
    """
    named = {"group": group, "rewards": tuple(reward), "prompt": prompt, "step": step, "source": source}
    if len(weights) not in (0, len(reward)):
        raise ValueError(f"weights={list(weights)}: give one for each of reward={list(reward)}")
    for weight in weights:
        if not abs(weight) <= MAX_REWARD:  # nor NaN
            raise ValueError(f"weights={list(weights)}: expected finite numbers of magnitude up to {MAX_REWARD:g}")
    if len(set(reward)) < len(reward):
        raise ValueError(f"reward={list(reward)}: a column is named twice; name it once, with the sum of its weights")
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    files = [file for path in given for file in find_files(path)]
    twice = [file for file, times in Counter(file.resolve() for file in files).items() if times > 1]
    if twice:
        raise ValueError(f"paths: {str(twice[0])!r} is given twice, and its rows would count twice; give it once")
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
                (token(row.get("prompt")), token(row.get("completion")), [row.get(n) for n in rewards])
                for row in content
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
        if place.exists():
            raise ValueError(f"{str(path)!r} is a pipe or a device: write it to a .jsonl file first")
        raise FileNotFoundError(f"{str(path)!r}: no such file or folder")
    if (place / "samples.jsonl").is_file():
        return [place / "samples.jsonl"]
    folder = place / "completions" if (place / "completions").is_dir() else place
    # SkyRL puts a file of metrics beside its rollouts.
    names = [file for file in folder.iterdir() if file.suffix in (".jsonl", ".parquet") and file.is_file()]
    names = [file for file in names if file.name != "aggregated_results.jsonl"]
    if not names:
        raise FileNotFoundError(f"{str(folder)!r} holds no .jsonl or .parquet file: give the file itself")
    return sorted(
        names, key=lambda file: [(part.isdecimal(), int(part) if part.isdecimal() else part) for part in _parts(file)]
    )


def _parts(file: Path) -> list[str]:
    return [part for part in re.split(r"(\d+)", file.stem) if part]


def _read_file(file: Path, named: Mapping[str, Any]) -> tuple[Layout, list[Row]]:
    if file.suffix == ".jsonl":
        with file.open("rb") as lines:
            start = lines.readline(1 << 12)  # of any file: it may be neither text nor in lines
        if b'"format": "ebpo-core/' in start:
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
        session, output = (str(row.get("step")), key[1], key[2]), int(key[3])
        if session not in last or output >= last[session][0]:
            last[session] = output, {**row, "uid": key[1]}
    yield from (row for _, row in last.values())


def _collect(rows: Sequence[Row], layout: Layout, weights: Sequence[float], notes: Sequence[str]) -> Rollouts:
    """Rows as arrays."""
    factors = list(weights) or [1.0] * len(layout.rewards)
    columns = {name: weight * read_rewards(rows, name) for name, weight in zip(layout.rewards, factors, strict=True)}
    stacked = np.stack(list(columns.values()))
    # As TRL adds them: a function that returned None adds nothing, and where all did there is no reward.
    rewards = np.where(np.isnan(stacked).all(axis=0), np.nan, np.nansum(stacked, axis=0))
    large = np.flatnonzero(np.abs(rewards) > MAX_REWARD)
    if large.size:
        raise ValueError(
            f"row {large[0] + 1}: its rewards add up to {rewards[large[0]]}, with weights={factors}; the magnitude "
            f"must be at most {MAX_REWARD:g}"
        )

    steps = np.zeros(len(rows), dtype=np.int64)
    if layout.step is not None:
        steps = read_steps([row.get(layout.step) for row in rows], layout.step)
    keys: list[Hashable] = []
    for number, (row, at) in enumerate(zip(rows, steps.tolist(), strict=True), 1):
        name = token(row.get(layout.group))
        if name is None:
            raise ValueError(
                f"row {number}, {layout.group}={row.get(layout.group)}: each row needs its group; name another column"
            )
        keys.append((at, name))
    prompt = layout.prompt
    return Rollouts(
        form=layout.form,
        rewards=rewards,
        columns=columns,
        groups=codes_of(keys),
        group_column=layout.group,
        prompts=None if prompt is None else codes_of([token(row.get(prompt)) for row in rows]),
        steps=steps,
        has_steps=layout.step is not None,
        sources=None if layout.source is None else [str(row.get(layout.source)) for row in rows],
        notes=tuple(notes),
    )
