"""Rewards for any data set with an ``answer`` column, and the loading of a reward function by its dotted path.

Every function has TRL's signature, ``reward(prompts, completions, **columns) -> list[float]``. Model text is only
compared or read by a strict grammar; it is never evaluated.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from ebpo_core.tasks.expressions import parse_integer

RewardFunction = Callable[..., list[float]]


def completion_text(completion: Any) -> str:
    """The text of a completion as TRL hands it over: plain text, or a list of messages in the conversational form.

    Only what the assistant said counts, and of a message's content parts only those of type "text".
    """
    if isinstance(completion, str):
        return completion
    parts: list[str] = []
    for message in completion:
        if message.get("role", "assistant") != "assistant":
            continue
        content = message.get("content") or ""
        if isinstance(content, str):
            parts.append(content)
        else:
            parts.extend(part.get("text") or "" for part in content if part.get("type") == "text")
    return "".join(parts)


def exact_match(
    prompts: Sequence[Any],  # noqa: ARG001
    completions: Sequence[Any],
    *,
    answer: Sequence[Any],
    **_: Any,
) -> list[float]:
    """1.0 where the completion, stripped of surrounding white space, is the answer's text."""
    return [
        float(completion_text(completion).strip() == str(truth).strip())
        for completion, truth in zip(completions, answer, strict=True)
    ]


def integer_match(
    prompts: Sequence[Any],  # noqa: ARG001
    completions: Sequence[Any],
    *,
    answer: Sequence[Any],
    **_: Any,
) -> list[float]:
    """1.0 where the whole completion is one integer, and the answer's integer."""
    scores: list[float] = []
    for completion, truth in zip(completions, answer, strict=True):
        value = parse_integer(completion_text(completion))
        scores.append(float(value is not None and value == parse_integer(str(truth))))
    return scores


NAMED_REWARDS: dict[str, RewardFunction] = {"exact": exact_match, "integer": integer_match}


def load_reward(path: str) -> RewardFunction:
    """The reward function at ``package.module:function`` (or with a dot), or one of "exact" and "integer".

    Raises:
        ValueError: Nothing is found at ``path``.
        TypeError: What is found is not callable.
    """
    if path in NAMED_REWARDS:
        return NAMED_REWARDS[path]
    module_name, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"reward={path!r}: no such function ({error}); give package.module:function, importable from here "
            f"(PYTHONPATH=. adds this directory), or one of {sorted(NAMED_REWARDS)}"
        ) from error
    if not callable(function):
        raise TypeError(f"reward={path!r}: a {type(function).__name__} is not a function")
    return function  # type: ignore[no-any-return]
