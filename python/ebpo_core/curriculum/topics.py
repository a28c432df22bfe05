"""Topic labels of problems: from a column, from a function, or from a model that is asked for one of nine labels.

The labels are those of EBPO's appendix A (arXiv 2602.05165), which had a language model annotate each problem. A reply
that is not exactly one of the labels gives no label: it is counted and never guessed at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from ebpo_core.data import Problem
from ebpo_core.evaluation.journal import Journal
from ebpo_core.evaluation.sampling import Request
from ebpo_core.evaluation.server import ServerModel
from ebpo_core.rewards.text import load_reward

PAPER_TOPICS: tuple[str, ...] = (
    "Algebra & Number Theory",
    "Calculus & Analysis",
    "Geometry & Trigonometry",
    "Discrete Mathematics",
    "Probability & Statistics",
    "Linear Algebra",
    "Applied Mathematics & Word Problems",
    "Physics & Chemistry",
    "Advanced Mathematics",
)

UNLABELLED = "unlabelled"
KIND = "topics"
MAX_REPLY_TOKENS = 32
LONGEST_PROBLEM = 8000

INSTRUCTION = (
    "You sort mathematics problems by topic. The topics are:\n{labels}\n"
    "Reply with exactly one of these topics, spelled as above, and nothing else. Do not solve the problem."
)

LabelFunction = Callable[[dict[str, Any]], "str | None"]


def parse_label(reply: str, labels: Sequence[str] = PAPER_TOPICS) -> str | None:
    """The label that a reply consists of, or None.

    Upper and lower case and runs of white space do not matter; one pair of quotes, asterisks or backticks around the
    reply and one full stop after it are allowed. A label inside a longer text is not taken, nor one that is cut short.
    """
    text = re.sub(r"\s+", " ", reply).strip().removesuffix(".").strip()
    for mark in ("**", '"', "'", "`", "*"):
        if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
            text = text[len(mark) : -len(mark)].strip().removesuffix(".")
            break
    return next((label for label in labels if label.casefold() == text.casefold()), None)


def column_topics(problems: Sequence[Problem], column: str) -> list[str]:
    """The values of a column as labels, :data:`UNLABELLED` where it is empty.

    Raises:
        ValueError: No problem has that column.
    """
    if not any(column in problem.row for problem in problems):
        raise ValueError(f"column {column!r}: the data has {sorted(problems[0].row) if problems else 'no rows'}")
    values = [problem.row.get(column) for problem in problems]
    return [UNLABELLED if value is None or str(value).strip() == "" else str(value) for value in values]


def function_topics(problems: Sequence[Problem], function: str | LabelFunction) -> list[str]:
    """The labels that a function of a row, or the one at ``module:function``, gives; None is :data:`UNLABELLED`.

    Raises:
        TypeError: It returns something that is neither text nor None.
    """
    label: Any = load_reward(function) if isinstance(function, str) else function
    topics = []
    for problem in problems:
        value = label(dict(problem.row))
        if not isinstance(value, str | None):
            raise TypeError(f"{function!r} returned {value!r} for problem {problem.id!r}: expected text or None")
        topics.append(value or UNLABELLED)
    return topics


def label_messages(problem: Problem, labels: Sequence[str] = PAPER_TOPICS) -> list[dict[str, str]]:
    """The chat that asks for a problem's topic; a very long problem is cut."""
    listed = "\n".join(f"- {label}" for label in labels)
    return [
        {"role": "system", "content": INSTRUCTION.format(labels=listed)},
        {"role": "user", "content": f"Problem:\n{problem.text[:LONGEST_PROBLEM]}\n\nTopic:"},
    ]


def label_settings(model: ServerModel, problems: str, labels: Sequence[str] = PAPER_TOPICS) -> dict[str, Any]:
    """The settings of a labels' journal: its model, its question, and which problems it is about."""
    return {"problems": problems, "backend": model.settings(), "labels": list(labels), "instruction": INSTRUCTION}


def server_topics(
    problems: Sequence[Problem],
    model: ServerModel,
    journal: Journal,
    labels: Sequence[str] = PAPER_TOPICS,
    on_progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Ask a server's model for the topic of each problem that the journal does not have yet.

    Args:
        problems: The problems.
        model: With sampling options of temperature 0 and about :data:`MAX_REPLY_TOKENS` tokens.
        journal: Of kind :data:`KIND` and key ``("problem",)``: each reply is kept as it came, so an interrupted run
            asks nothing twice and a person can look at what was not understood.
        labels: The labels allowed.
        on_progress: Called with the number of replies so far.

    Returns:
        A label a problem, or :data:`UNLABELLED`.
    """
    requests = [
        Request(problem, label_messages(problem, labels), 0, 0) for problem in problems if (problem.id,) not in journal
    ]
    done = 0
    with closing(model.generate(requests)) as batches:
        for batch in batches:
            journal.append(
                {
                    "problem": request.problem.id,
                    "reply": completion.text,
                    "label": parse_label(completion.text, labels),
                }
                for request, completion in batch
            )
            done += len(batch)
            if on_progress is not None:
                on_progress(done)
    return [journal.records[problem.id,]["label"] or UNLABELLED for problem in problems]
