"""One problem with its reference answer, and rows of problems for TRL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Problem:
    """A problem as it is trained on or evaluated.

    Attributes:
        id: Unique within its data set: the set's own id where it has one, else "<source>/<row>".
        prompt: What the model is asked, with the instruction that says how to state the answer.
        answer: The reference answer, bare (no solution around it).
        topic: The set's own label (MATH's subject, OlympiadBench's subfield), or None.
        level: The set's own label of difficulty, e.g. "5", or None.
        source: The data set: its hub id, or the file's name.
    """

    id: str
    prompt: str
    answer: str
    topic: str | None
    level: str | None
    source: str


def with_instruction(question: str, instruction: str | None) -> str:
    """A question and the instruction, a blank line between them; the question alone where there is no instruction."""
    return f"{question.strip()}\n\n{instruction}" if instruction else question.strip()


def to_rows(
    problems: Iterable[Problem], *, conversational: bool = True, system: str | None = None
) -> list[dict[str, Any]]:
    """Rows for TRL's trainers: ``Dataset.from_list(to_rows(problems))``.

    Args:
        problems: From :func:`ebpo_core.data.read`.
        conversational: Prompts as message lists, to which TRL applies the model's chat template; else as plain text,
            for base models.
        system: A system message before each prompt; needs ``conversational``.

    Returns:
        One row per problem with ``prompt``, ``answer`` (what :func:`ebpo_core.rewards.math_reward` reads), ``topic``,
        ``level``, ``id`` and ``source``.
    """
    if system is not None and not conversational:
        raise ValueError(f"system={system!r}: a plain prompt has no system message; put it into the prompt")
    return [
        {
            "prompt": messages(problem, system) if conversational else problem.prompt,
            "answer": problem.answer,
            "topic": problem.topic,
            "level": problem.level,
            "id": problem.id,
            "source": problem.source,
        }
        for problem in problems
    ]


def messages(problem: Problem, system: str | None = None) -> list[dict[str, str]]:
    """A problem's prompt as a conversation."""
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": problem.prompt}]
