"""One problem with its reference answer, and rows of problems for TRL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ebpo_core.data.rows import Row

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."

Prompt = str | list[dict[str, str]]
"""Text to be continued, or a list of chat messages with role and content."""


@dataclass(frozen=True)
class Problem:
    """A problem as it is trained on or evaluated.

    Attributes:
        id: Unique within its data set: the set's own id where it has one, else "<source>/<row>" or a digest.
        prompt: What the model is asked, with the instruction that says how to state the answer.
        answer: The reference answer, bare (no solution around it); None where the reward needs none.
        topic: The set's own label (MATH's subject, OlympiadBench's subfield), or None.
        level: The set's own label of difficulty, e.g. "5", or None.
        source: The data set: its hub id, or the file's name.
        row: Every column of the row with this prompt, for rewards that read more; empty where a published form of
            another shape was read.
    """

    id: str
    prompt: Prompt
    answer: Any = None
    topic: str | None = None
    level: str | None = None
    source: str = ""
    row: Row = field(default_factory=dict, repr=False)

    @property
    def text(self) -> str:
        """The prompt as one text, without the roles of its messages."""
        return prompt_text(self.prompt)


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text; the contents of a list of messages are joined by newlines."""
    return prompt if isinstance(prompt, str) else "\n".join(str(message.get("content", "")) for message in prompt)


def messages(prompt: Prompt, system: str | None = None) -> list[dict[str, str]]:
    """A text as a conversation of one user message, behind a system message if one is given.

    Raises:
        ValueError: The prompt is a conversation already.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"prompt={prompt!r}: a conversation already; give text")
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": prompt}]


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
            "prompt": messages(problem.prompt, system) if conversational else problem.prompt,
            "answer": problem.answer,
            "topic": problem.topic,
            "level": problem.level,
            "id": problem.id,
            "source": problem.source,
        }
        for problem in problems
    ]
