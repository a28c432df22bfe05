"""Mini-countdown: combine every given number once, with the allowed operators, into a target.

A prompt reads ``[+-] 3 7 12 = 22 :`` and ``3 + 7 + 12`` is a right answer. Topics are the operator sets, levels are how
many numbers there are, so a data set has topics x levels clusters of differing difficulty, which is the setting of
clustered sampling in EBPO (arXiv 2602.05165, section 3.4). Precedence is that of ordinary arithmetic, and any
expression that reaches the target counts, not only the one the generator had in mind.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from ebpo_core.rewards.text import completion_text
from ebpo_core.tasks.expressions import parse_expression
from ebpo_core.tasks.splits import check_choice, draws, split_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from datasets import Dataset

    from ebpo_core.data.rows import Row

TOPICS: dict[str, str] = {"add": "+-", "mul": "+-*"}
LEVELS: tuple[int, ...] = (2, 3, 4)
LARGEST_NUMBER = 12
LARGEST_TARGET = 99
MAX_COMPLETION_TOKENS = 2 * max(LEVELS)
"""Tokens of the longest answer, its end-of-sequence token included."""


def problem_key(topic: str, numbers: Sequence[int], target: int) -> str:
    """A problem's identity, in whatever order its numbers are given."""
    return f"{topic} {sorted(numbers)} {target}"


def generate_problem(rng: random.Random, topic: str, level: int, split: str) -> Row:
    """Draw one problem of a split: a random expression whose value lies in 0..99, its numbers shuffled.

    Returns:
        A row with the columns of :func:`dataset`; ``answer`` is the expression that it was made from.
    """
    operators = TOPICS[topic]
    while True:
        numbers = [rng.randint(1, LARGEST_NUMBER) for _ in range(level)]
        answer = str(numbers[0])
        for number in numbers[1:]:
            answer += f" {rng.choice(operators)} {number}"
        parsed = parse_expression(answer)
        if parsed is None or not 0 <= parsed.value <= LARGEST_TARGET:
            continue
        rng.shuffle(numbers)
        if split_of(problem_key(topic, numbers, parsed.value)) == split:
            return {
                "prompt": f"[{operators}] {' '.join(map(str, numbers))} = {parsed.value} :",
                "answer": answer,
                "numbers": numbers,
                "target": parsed.value,
                "operators": operators,
                "topic": topic,
                "level": level,
            }


def generate(
    size: int, seed: int, split: str, *, topics: Sequence[str] = tuple(TOPICS), levels: Sequence[int] = LEVELS
) -> Iterator[Row]:
    """Draw ``size`` problems, the clusters taking turns, so that they are equally frequent.

    Problems are drawn independently and can repeat: at level 2 there are only a few hundred.
    """
    check_choice("topics", topics, list(TOPICS))
    check_choice("levels", levels, LEVELS)
    check_choice("split", [split], ["train", "test"])
    for rng, topic, level in draws(f"countdown {split} {seed}", size, topics, levels):
        yield generate_problem(rng, topic, level, split)


def dataset(
    size: int = 6000,
    *,
    seed: int = 0,
    split: str = "train",
    topics: Sequence[str] = tuple(TOPICS),
    levels: Sequence[int] = LEVELS,
) -> Dataset:
    """A data set of mini-countdown problems.

    Args:
        size: Rows; every (topic, level) cluster gets an equal share.
        seed: Same seed, same rows.
        split: "train" or "test"; no problem is in both, for any seeds.
        topics: Some of "add" ({+, -}) and "mul" ({+, -, *}).
        levels: Some of 2, 3, 4: how many numbers a problem has.

    Returns:
        A ``datasets.Dataset`` with columns ``prompt``, ``answer`` (one solution), ``numbers``, ``target``,
        ``operators``, ``topic`` and ``level``.
    """
    from datasets import Dataset

    return Dataset.from_list(list(generate(size, seed, split, topics=topics, levels=levels)))


def is_solution(text: str, numbers: Sequence[int], target: int, operators: str) -> bool:
    """True for an expression that uses each number once, only the operators allowed, and equals ``target``."""
    parsed = parse_expression(text)
    return (
        parsed is not None
        and parsed.value == target
        and parsed.operators <= set(operators)
        and sorted(parsed.numbers) == sorted(numbers)
    )


def reward(
    prompts: Sequence[Any],  # noqa: ARG001
    completions: Sequence[Any],
    *,
    numbers: Sequence[Sequence[int]],
    target: Sequence[int],
    operators: Sequence[str],
    **_: Any,
) -> list[float]:
    """1.0 where the completion solves its problem, else 0.0; a reward function in TRL's signature."""
    problems = zip(completions, numbers, target, operators, strict=True)
    return [
        float(is_solution(completion_text(completion), given, value, allowed))
        for completion, given, value, allowed in problems
    ]
