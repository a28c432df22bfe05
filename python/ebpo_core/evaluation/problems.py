"""Problems to sample answers to: the built-in tasks, data files, and the benchmarks that ``ebpo_core.data`` reads."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebpo_core.data import BOXED, Problem, read, read_rows, to_rows
from ebpo_core.data.problem import Prompt, messages
from ebpo_core.data.rows import SUFFIXES, Row
from ebpo_core.tasks.loading import BUILT_IN


def _check_prompt(prompt: Any, number: int) -> Prompt:
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, Sequence) and prompt and all(isinstance(part, dict) and "role" in part for part in prompt):
        return [dict(part) for part in prompt]
    raise ValueError(f"row {number}: prompt={prompt!r} is neither text nor a list of messages with role and content")


def from_rows(rows: Iterable[Row]) -> list[Problem]:
    """Problems of rows with a ``prompt`` column; ``id``, ``topic`` and ``level`` are used if they are there.

    A row without ``id`` is named by a digest of its content, a repeated row by that and a number. A topic or level
    that is not there is "".

    Raises:
        ValueError: A row without a usable prompt, or two with one ``id``.
    """
    problems: list[Problem] = []
    seen: Counter[str] = Counter()
    for number, row in enumerate(rows, start=1):
        if "prompt" not in row:
            raise ValueError(f"row {number} has no column 'prompt' among {sorted(row)}: rename one")
        prompt = _check_prompt(row["prompt"], number)
        if row.get("id") is not None:
            name = str(row["id"])
            if seen[name]:
                raise ValueError(f"row {number}: id={name!r} was there before; ids must be unique")
        else:
            content = json.dumps(row, sort_keys=True, default=str).encode()
            name = hashlib.blake2b(content, digest_size=8).hexdigest()
        seen[name] += 1
        if seen[name] > 1:
            name = f"{name}-{seen[name]}"
        topic, level = ("" if row.get(key) is None else str(row[key]) for key in ("topic", "level"))
        problems.append(Problem(name, prompt, row.get("answer"), topic, level, str(row.get("source") or ""), row))
    return problems


def load_problems(
    task: str,
    *,
    size: int | None = None,
    seed: int = 0,
    split: str | None = None,
    topics: Sequence[str] | None = None,
    levels: Sequence[int] | None = None,
    format: str | None = None,  # noqa: A002 -- the name that ebpo_core.data uses
    instruction: bool = True,
) -> list[Problem]:
    """Load the problems of a task.

    Args:
        task: "countdown" or "arithmetic"; a data file with a ``prompt`` column; or what :func:`ebpo_core.data.read`
            takes.
        size: Problems to generate for a built-in task (600 by default), or the first ones to keep of another.
        seed: Of the generated problems.
        split: Of a built-in task ("test" by default) or of what :func:`ebpo_core.data.read` reads.
        topics: Of a built-in task; all by default.
        levels: Of a built-in task; all by default.
        format: The format for :func:`ebpo_core.data.read`; by default a file with a ``prompt`` column is taken as it
            is, and anything else is read with "auto".
        instruction: Whether :func:`ebpo_core.data.read` adds its instruction to bare questions.

    Raises:
        ValueError, FileNotFoundError: An unknown name, an unreadable file, or arguments the task cannot use.
    """
    if size is not None and size < 1:
        raise ValueError(f"size={size}: expected at least 1")
    if task in BUILT_IN:
        if format is not None:
            raise ValueError(f"format={format!r}: the built-in task {task!r} has none")
        chosen: dict[str, Any] = {"topics": topics, "levels": levels}
        clusters = {name: values for name, values in chosen.items() if values}
        return from_rows(BUILT_IN[task].generate(600 if size is None else size, seed, split or "test", **clusters))
    if topics or levels:
        raise ValueError(f"task={task!r}: topics and levels choose among the clusters of {', '.join(BUILT_IN)}")
    path = Path(task).expanduser()
    if format is None and path.suffix in SUFFIXES:
        rows = list(read_rows(path))
        if "prompt" in rows[0]:
            return from_rows(rows[:size])
    found = read(task, format or "auto", split=split, instruction=BOXED if instruction else None)
    return from_rows(to_rows(found[:size], conversational=False))


@dataclass(frozen=True)
class PromptFormat:
    """The form in which a text prompt is put to a model; lists of messages stay as they are.

    Attributes:
        template: Text around the prompt, ``{prompt}`` in it standing for the prompt.
        system: A system message; makes a chat of the prompt.
        chat: Send the prompt as a user message, for models with a chat template.
    """

    template: str = "{prompt}"
    system: str | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        if "{prompt}" not in self.template:
            raise ValueError(f"template={self.template!r}: must hold {{prompt}}")

    def __call__(self, prompt: Prompt) -> Prompt:
        if not isinstance(prompt, str):
            return prompt
        text = self.template.replace("{prompt}", prompt)
        return messages(text, self.system) if self.chat or self.system is not None else text


def fingerprint(problems: Sequence[Problem]) -> str:
    """16 hex digits over the ids and prompts, whatever their order: whether two runs were over the same set."""
    digests = sorted(
        hashlib.blake2b(json.dumps([problem.id, problem.prompt]).encode(), digest_size=16).digest()
        for problem in problems
    )
    return hashlib.blake2b(b"".join(digests), digest_size=8).hexdigest()
