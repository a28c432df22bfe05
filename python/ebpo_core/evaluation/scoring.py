"""From completions to scores and extracted answers: a task's own reward, a reward function by its path, or a verifier.

No model text is evaluated here; what a reward function of one's own does with it is its author's matter.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ebpo_core.data import Problem
from ebpo_core.rewards.extraction import last_boxed
from ebpo_core.rewards.text import RewardFunction, load_reward
from ebpo_core.tasks.arithmetic import final_integer
from ebpo_core.tasks.loading import BUILT_IN

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

Extract = Callable[[str], "str | None"]

PASSING = 1.0
"""A sample is right if its score is at least this, the full reward."""


class Scored(NamedTuple):
    """A sample's score, and the answer that votes in maj@k (None: no answer was found)."""

    score: float
    answer: str | None


class Scorer(ABC):
    """Scores samples. A context manager, since a verifier may hold worker processes.

    Attributes:
        name: What the header of the samples calls it.
        preset: What counts as the same answer; None where a reward decides that alone.
    """

    name: str
    preset: str | None = None

    def unscorable(self, problems: Sequence[Problem]) -> list[str]:  # noqa: ARG002
        """The ids of the problems that cannot be scored, asked for before anything is sampled: none, for most."""
        return []

    @abstractmethod
    def score(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Scored]:
        """The score of each completion, in order."""

    def grouped(self, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Records of samples, with one spelling for all answers to a problem that vote together in maj@k."""
        return list(records)

    @property
    def metrics(self) -> dict[str, float]:
        """Counts of a verifier, time-outs and errors among them."""
        return {}

    def __enter__(self) -> Self:
        return self

    def __exit__(  # noqa: B027 -- most hold nothing
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def whole_text(text: str) -> str | None:
    """The completion without white space at its ends and with single spaces: answers that are nothing but an answer."""
    return " ".join(text.split()) or None


def last_integer(text: str) -> str | None:
    """The last number of the completion, if it is a plain integer (see ``ebpo_core.tasks.arithmetic``)."""
    value = final_integer(text)
    return None if value is None else str(value)


def boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` without white space; None without a closed box."""
    return "".join((last_boxed(text) or "").split()) or None


EXTRACTORS: dict[str, Extract] = {"text": whole_text, "integer": last_integer, "boxed": boxed}


def load_extractor(name: str) -> Extract:
    """The extractor called ``name``, or the function at ``module:function`` (text in, text or None out)."""
    if name in EXTRACTORS:
        return EXTRACTORS[name]
    if ":" not in name:
        raise ValueError(f"extract={name!r}: choose one of {', '.join(EXTRACTORS)}, or give module:function")
    return load_reward(name)  # type: ignore[return-value]  # loads any function


class RewardScorer(Scorer):
    """Scores with a reward function in TRL's signature, ``reward(prompts, completions, **columns)``.

    Args:
        reward: Returns one number a completion; None (as TRL allows for "cannot be scored") is an error here, since an
            evaluation must not leave problems out.
        extract: What the completion answers, for maj@k.
        name: What the header of the samples calls it.
    """

    def __init__(self, reward: RewardFunction, extract: Extract, name: str) -> None:
        self.reward, self.extract, self.name = reward, extract, name

    def score(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Scored]:
        """Scores in the order of ``completions``; messages are handed over where the prompt is a list of messages."""
        if not problems:
            return []
        columns = sorted({name for problem in problems for name in problem.row} - {"prompt"})
        given: dict[str, list[Any]] = {name: [problem.row.get(name) for problem in problems] for name in columns}
        shaped = [
            text if isinstance(problem.prompt, str) else [{"role": "assistant", "content": text}]
            for problem, text in zip(problems, completions, strict=True)
        ]
        scores = self.reward(prompts=[problem.prompt for problem in problems], completions=shaped, **given)
        if len(scores) != len(completions):
            raise ValueError(f"{self.name} returned {len(scores)} scores for {len(completions)} completions")
        for problem, score in zip(problems, scores, strict=True):
            if score is None or not math.isfinite(score):
                raise ValueError(
                    f"{self.name} returned {score!r} for problem {problem.id!r} ({problem.text[:80]!r}): its reference "
                    "answer cannot be scored; leave such rows out of the data"
                )
        return [Scored(float(score), self.extract(text)) for score, text in zip(scores, completions, strict=True)]


class MathScorer(Scorer):
    """Scores against the ``answer`` column with :class:`ebpo_core.rewards.MathVerifier` in its worker processes.

    Args:
        extract: What votes in maj@k; None takes the final answer that the completion states.
        name: What the header of the samples calls it.
        preset: The verifier's.
        **options: The verifier's others.
    """

    def __init__(
        self, extract: Extract | None = None, name: str = "math", preset: str = "strict", **options: Any
    ) -> None:
        from ebpo_core.rewards import MathVerifier

        self.extract, self.name = extract, name
        self.preset = preset
        self.verifier = MathVerifier(preset=preset, **options)

    def unscorable(self, problems: Sequence[Problem]) -> list[str]:
        """The ids of the problems whose ``answer`` is missing, of a wrong type, or cannot be read by the verifier."""
        known = self.verifier.scorable([problem.row.get("answer") for problem in problems])
        return [problem.id for problem, fine in zip(problems, known, strict=True) if not fine]

    def score(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Scored]:
        """1.0 where the completion's final answer equals the problem's, else 0.0.

        Raises:
            ValueError: A problem cannot be scored, see :meth:`unscorable`.
        """
        verdicts = self.verifier.verdicts(completions, [problem.row.get("answer") for problem in problems])
        bad = [problem.id for problem, verdict in zip(problems, verdicts, strict=True) if math.isnan(verdict.score)]
        if bad:
            raise ValueError(unscorable_rows(bad))
        return [
            Scored(float(verdict.score), verdict.answer if self.extract is None else self.extract(text))
            for verdict, text in zip(verdicts, completions, strict=True)
        ]

    def grouped(self, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Records in which answers of one meaning, right or wrong, are written as the first of them."""
        places: dict[str, list[int]] = {}
        for place, record in enumerate(records):
            places.setdefault(record["problem"], []).append(place)
        result = list(records)
        for mine in places.values():
            answers = [records[place]["answer"] for place in mine]
            for place, first in zip(mine, self.verifier.groups(answers), strict=True):
                result[place] = {**records[place], "answer": None if first is None else answers[first]}
        return result

    @property
    def metrics(self) -> dict[str, float]:
        """Counts of the verifier, time-outs and errors among them."""
        return dict(self.verifier.metrics)

    def __enter__(self) -> Self:
        self.verifier.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.verifier.__exit__(kind, error, trace)


def unscorable_rows(names: Sequence[str]) -> str:
    """The message about problems that cannot be scored: their number and the first ids."""
    return (
        f"{len(names)} problems have no 'answer' that the math scorer can read: {', '.join(names[:5])}"
        f"{', ...' if len(names) > 5 else ''}; correct these rows or leave them out"
    )


def load_scorer(name: str | None, task: str, extract: str | None = None, preset: str | None = None) -> Scorer:
    """The scorer for a task.

    Args:
        name: "math", "exact", "integer" or ``module:function``; None takes a built-in task's own reward, or "math".
        task: As for ``load_problems``.
        extract: "text", "integer", "boxed" or ``module:function``; None takes what fits the scorer: the task's own form
            of an answer, the final answer that the verifier read, or the whole text.
        preset: Of the math scorer, "strict" by default.

    Raises:
        ValueError: A preset for another scorer, or a name that nothing has.
    """
    math_scorer = name == "math" or (name is None and task not in BUILT_IN)
    if preset is not None and not math_scorer:
        raise ValueError(f"preset={preset!r}: only the math scorer has presets; leave it out, or take scorer='math'")
    if name is None and task in BUILT_IN:
        default = {"countdown": "text", "arithmetic": "integer"}[task]
        return RewardScorer(BUILT_IN[task].reward, load_extractor(extract or default), f"{task} ({extract or default})")
    if math_scorer:
        chosen = preset or "strict"
        if extract is None:
            return MathScorer(preset=chosen)
        return MathScorer(load_extractor(extract), f"math ({extract})", chosen)
    default = "integer" if name == "integer" else "text"
    return RewardScorer(load_reward(str(name)), load_extractor(extract or default), f"{name} ({extract or default})")
