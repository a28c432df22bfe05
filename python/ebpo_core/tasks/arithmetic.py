"""Chat-formatted arithmetic for models that were already trained: "What is 37 + 58?".

Topics are the operations, levels the digits of both operands. The reward looks at the last number of the answer, so a
model may reason before it answers, but listing candidates wins nothing: one number counts, and it has to be right.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ebpo_core.rewards.text import completion_text
from ebpo_core.tasks.splits import check_choice, draws, split_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from datasets import Dataset

    from ebpo_core.data.rows import Row

TOPICS: dict[str, str] = {"add": "+", "sub": "-", "mul": "*"}
LEVELS: tuple[int, ...] = (1, 2, 3)
INSTRUCTION = "Answer with one integer."

# Only the end of an answer is read; what a number may look like there is decided below.
_TAIL = 256
_NUMERAL = re.compile(r"[\w.,]*\d[\w.,]*")
_PLAIN = re.compile(r"[0-9]{1,12}|[0-9]{1,3}(?:,[0-9]{3}){1,3}")


def solve(topic: str, left: int, right: int) -> int:
    """The answer to one question about two non-negative integers."""
    if topic == "add":
        return left + right
    return left - right if topic == "sub" else left * right


def problem_key(topic: str, left: int, right: int) -> str:
    """A problem's identity; the two orders of a sum or a product are one problem."""
    operands = (left, right) if topic == "sub" else sorted((left, right))
    return f"{topic} {operands[0]} {operands[1]}"


def generate(
    size: int, seed: int, split: str, *, topics: Sequence[str] = tuple(TOPICS), levels: Sequence[int] = LEVELS
) -> Iterator[Row]:
    """Draw ``size`` problems, the (topic, level) clusters taking turns; rows with the columns of :func:`dataset`.

    A problem whose answer is one of its operands is never drawn: an answer that repeats the question must not win.
    """
    check_choice("topics", topics, list(TOPICS))
    check_choice("levels", levels, LEVELS)
    check_choice("split", [split], ["train", "test"])
    for rng, topic, level in draws(f"arithmetic {split} {seed}", size, topics, levels):
        while True:
            left, right = (rng.randint(10 ** (level - 1), 10**level - 1) for _ in range(2))
            answer = solve(topic, left, right)
            if answer not in (left, right) and split_of(problem_key(topic, left, right)) == split:
                break
        question = f"What is {left} {TOPICS[topic]} {right}? {INSTRUCTION}"
        yield {
            "prompt": [{"role": "user", "content": question}],
            "answer": answer,
            "topic": topic,
            "level": level,
        }


def dataset(
    size: int = 6000,
    *,
    seed: int = 0,
    split: str = "train",
    topics: Sequence[str] = tuple(TOPICS),
    levels: Sequence[int] = LEVELS,
) -> Dataset:
    """A conversational data set of arithmetic questions.

    Args:
        size: Rows; every (topic, level) cluster gets an equal share.
        seed: Same seed, same rows.
        split: "train" or "test"; no problem is in both, for any seeds.
        topics: Some of "add", "sub" and "mul".
        levels: Some of 1, 2, 3: the digits of both operands.

    Returns:
        A ``datasets.Dataset`` with columns ``prompt`` (a list of one user message), ``answer``, ``topic``, ``level``.
    """
    from datasets import Dataset

    return Dataset.from_list(list(generate(size, seed, split, topics=topics, levels=levels)))


def final_integer(text: str) -> int | None:
    """The last number of an answer, if it is an integer in plain form.

    The last run of digits, letters, dots and commas that holds a digit is taken, without dots and commas at its ends
    (a sentence stops there). It must be ASCII digits, with or without commas between thousands, so ``19.5``, ``1e3``,
    ``19a``, ``1,23``, ``1_000`` and other alphabets' digits are no integers; nor is an earlier number taken in their
    place. A "-" directly before it is its sign, unless it follows a letter, a digit or a closing bracket (``12-5``).

    Returns:
        The integer, or None where the answer has no number or ends on one that is not an integer. Never raises.
    """
    tail = text[-_TAIL:]
    numerals = list(_NUMERAL.finditer(tail))
    if not numerals:
        return None
    match = numerals[-1]
    numeral = match[0].strip(".,")
    if _PLAIN.fullmatch(numeral) is None:
        return None
    value = int(numeral.replace(",", ""))
    before = tail[: match.start() + match[0].index(numeral)]
    signed = before[-1:] in ("-", "\N{MINUS SIGN}") and not (before[-2:-1].isalnum() or before[-2:-1] in (")", "]"))
    return -value if signed else value


def reward(
    prompts: Sequence[Any],  # noqa: ARG001
    completions: Sequence[Any],
    *,
    answer: Sequence[int],
    **_: Any,
) -> list[float]:
    """1.0 where the last number of the completion is the right integer, else 0.0; in TRL's signature."""
    return [
        float(final_integer(completion_text(completion)) == int(truth))
        for completion, truth in zip(completions, answer, strict=True)
    ]
