"""Layouts of files of rollouts: the columns of rewards, groups, prompts and steps, by the framework that wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]

REWARDS = ("reward", "score", "rewards", "scores", "correct", "is_correct", "accuracy", "acc")
PROMPTS = ("prompt", "question", "input")
GROUPS = ("group", "group_id", "uid", "prompt_id", "problem_id", "question_id", "problem", *PROMPTS)
STEPS = ("step", "global_step")
SOURCES = ("data_source", "source")


class Layout(NamedTuple):
    """Names of the columns of a file.

    Attributes:
        form: What wrote the file: "trl", "verl", "skyrl", "samples" (``ebpo eval``, ``ebpo curriculum``) or "plain".
        rewards: One or more columns, which are added up.
        group: The column whose values are the groups of a step.
        prompt: The column of the prompt's text, or None.
        step: The column of the training step, or None. Equal groups of two steps are two groups.
        source: The column that says which data set or environment a prompt came from, or None.
    """

    form: str
    rewards: tuple[str, ...]
    group: str
    prompt: str | None = None
    step: str | None = None
    source: str | None = None


SAMPLES = Layout("samples", ("score",), "problem")


def find_layout(rows: Sequence[Row], where: str, named: Mapping[str, Any], known: Layout | None = None) -> Layout:
    """The layout of rows by their columns; what the caller has named stands.

    * TRL's completions tables: ``step, prompt, completion``, one column a reward function, columns of ``log_extra``,
      ``advantage``. Every column of numbers beside these is taken for a reward.
    * verl's rollout dump: ``input, output, gts, score, step`` and ``uid`` from version 0.9 on.
    * SkyRL's evaluation dump: ``input_prompt, output_response, score, ..., data_source``.
    * Anything else: the first of ``REWARDS``; of ``GROUPS`` the first in which a value occurs twice.

    Args:
        rows: At least one.
        where: The file, for messages.
        named: Fields of :class:`Layout` by the caller's word; None or empty where the caller has named nothing.
        known: The layout, where something else than the columns tells it.

    Raises:
        ValueError: A named column is not there, or none could be found for rewards or groups.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))  # a row may lack what it has no value for
    given = {field: value for field, value in named.items() if value not in (None, ())}
    for field, value in given.items():
        missing = [name for name in ([value] if isinstance(value, str) else value) if name not in columns]
        if missing:
            argument = field.removesuffix("s")  # `rewards`, which the caller names one by one
            raise ValueError(f"{argument}={missing[0]!r}: {where} has no such column; it has {', '.join(columns)}")
    found = set(columns)
    if known is not None:
        layout = known
    elif {"step", "prompt", "completion", "advantage"} <= found:
        layout = Layout("trl", _numeric(rows, columns), "prompt", "prompt", "step")
    elif {"input", "output", "score", "step"} <= found:
        group = "uid" if "uid" in found else "input"
        layout = Layout("verl", ("score",), group, "input", "step", _first(SOURCES, found))
    elif {"input_prompt", "output_response", "score"} <= found:
        layout = Layout("skyrl", ("score",), "input_prompt", "input_prompt", None, _first(SOURCES, found))
    else:
        reward = _first(REWARDS, found)
        layout = Layout(
            "plain",
            () if reward is None else (reward,),
            given.get("group") or _repeating(rows, found),
            _first(PROMPTS, found),
            _first(STEPS, found),
            _first(SOURCES, found),
        )
    layout = layout._replace(**given)
    if not layout.rewards:
        raise ValueError(f"{where}: no column of rewards was recognised; name one with reward=: {', '.join(columns)}")
    if not layout.group:
        raise ValueError(
            f"{where}: no column tells which completions belong to one prompt; name one with group=: "
            f"{', '.join(columns)}"
        )
    return layout


def _first(names: Sequence[str], found: set[str]) -> str | None:
    return next((name for name in names if name in found), None)


def _numeric(rows: Sequence[Row], columns: Sequence[str]) -> tuple[str, ...]:
    """Columns of TRL's table that a reward function can have filled: numbers, or None in every row."""
    others = {"step", "prompt", "completion", "advantage", "ebpo_advantage"}
    names = [name for name in columns if name not in others]
    return tuple(name for name in names if all(isinstance(row.get(name), (float, int, type(None))) for row in rows))


def _repeating(rows: Sequence[Row], found: set[str]) -> str:
    """The first column of ``GROUPS`` in which a value occurs twice, else the first that is there, else ""."""
    present = [name for name in GROUPS if name in found]
    for name in present:
        values = [str(row.get(name)) for row in rows]
        if len(set(values)) < len(values):
            return name
    return present[0] if present else ""
