"""Reward functions around :class:`MathVerifier`: one in TRL's signature, one in verl's.

Both share verifiers that are made when first needed and closed when the program ends. The functions themselves hold
nothing, so they can be pickled and used after a fork.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from ebpo_core.rewards.math_verifier import ROUTES, MathVerifier

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_shared: dict[tuple[tuple[str, Any], ...], MathVerifier] = {}


def shared_verifier(**options: Any) -> MathVerifier:
    """This process's verifier with these options (those of :class:`MathVerifier`)."""
    key = tuple(sorted(options.items()))
    if key not in _shared:
        # Two threads may get here at once; the loser's verifier has started nothing yet and is dropped.
        _shared.setdefault(key, MathVerifier(**options))
    return _shared[key]


def math_reward(completions: Sequence[Any], answer: Sequence[Any] | None = None, **columns: Any) -> list[float]:
    """1.0 where a completion's final answer is the reference's, else 0.0; a reward function for TRL's trainers.

    NaN where the reference cannot be scored, which is what TRL makes of a reward function's None. Takes all that TRL
    passes; where it passes ``log_metric``, the counts of this batch are logged under ``verifier/``. For other options
    than the defaults, make a :class:`MathVerifier` and pass its :meth:`~MathVerifier.reward`.

    Args:
        completions: (N,) texts or message lists.
        answer: (N,) reference answers; the column ``solution`` is taken where there is no ``answer``.
        columns: The data set's other columns, and what else the trainer passes.

    Raises:
        ValueError: The data set has neither column.
    """
    return reward_with(shared_verifier(), completions, answer, **columns)


def reward_with(
    verifier: MathVerifier,
    completions: Sequence[Any],
    answer: Sequence[Any] | None,
    *,
    solution: Sequence[Any] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float]:
    """:func:`math_reward` with a given verifier."""
    references = solution if answer is None else answer
    if references is None:
        raise ValueError(
            f"answer: the data set has neither an 'answer' nor a 'solution' column, only {sorted(columns)}; rename one"
        )
    verdicts = verifier.verdicts(completions, references)
    if log_metric is not None:
        counts = Counter(verdict.route for verdict in verdicts)
        for route in ROUTES:
            log_metric(f"verifier/{route}", float(counts[route]))
    return [verdict.score for verdict in verdicts]


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,  # noqa: ARG001  verl passes it
    *,
    unscorable: float | None = None,
    preset: str = "strict",
    workers: int = 1,
    timeout: float = 5.0,
    math_verify: bool = True,
    after: str | None = None,
    **_: Any,
) -> dict[str, Any]:
    """A completion's score in verl's signature (``reward.custom_reward_function``, whose ``reward_kwargs`` are the
    options).

    Args:
        data_source: Names the row's data set in an error; every data set is scored alike.
        solution_str: The completion.
        ground_truth: The reference answer.
        extra_info: Unused.
        unscorable: The score for a reference that cannot be scored. None raises: verl has no such thing as a missing
            reward, and most of its estimators would turn a NaN into a NaN loss.
        preset: As for :class:`MathVerifier`.
        workers: As for :class:`MathVerifier`, in each of verl's reward workers, of which there are several.
        timeout: As for :class:`MathVerifier`.
        math_verify: As for :class:`MathVerifier`.
        after: As for :class:`MathVerifier`.

    Returns:
        ``score`` (0.0 or 1.0), ``acc`` (the same) and ``pred``, the final answer in the completion ("" for none).

    Raises:
        ValueError: The reference cannot be scored, and ``unscorable`` is None.
    """
    verifier = shared_verifier(preset=preset, workers=workers, timeout=timeout, math_verify=math_verify, after=after)
    (verdict,) = verifier.verdicts([solution_str], [ground_truth])
    score = verdict.score
    if math.isnan(score):
        if unscorable is None:
            raise ValueError(
                f"ground_truth={str(ground_truth)[:80]!r} of data_source={data_source!r} cannot be scored; drop such "
                "rows beforehand (MathVerifier.scorable finds them), or set reward_kwargs.unscorable to their score"
            )
        score = float(unscorable)
    return {"score": score, "acc": score, "pred": verdict.answer or ""}
