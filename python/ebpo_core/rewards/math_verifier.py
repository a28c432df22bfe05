"""Scores of completions against reference answers, 1.0 or 0.0, and NaN where the reference itself cannot be scored."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import threading
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from ebpo_core.rewards.extraction import final_answer, reference_answer
from ebpo_core.rewards.limits import refusal
from ebpo_core.rewards.numerals import UnreadableError
from ebpo_core.rewards.pool import VerifierPoolError, WorkerPool
from ebpo_core.rewards.presets import PRESETS, Preset
from ebpo_core.rewards.reading import read
from ebpo_core.rewards.simple import decided
from ebpo_core.rewards.text import completion_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ebpo_core.rewards.nodes import Node
    from ebpo_core.rewards.pool import Outcome

logger = logging.getLogger(__name__)

ROUTES = ("fast", "math_verify", "no_answer", "refused", "timeouts", "errors", "unscorable")
_MAX_KNOWN_REFERENCES = 100_000
_LIVE: weakref.WeakSet[MathVerifier] = weakref.WeakSet()


class Verdict(NamedTuple):
    """A completion's score, and why.

    ``score`` is 1.0, 0.0, or NaN; ``route`` is the counter of :attr:`MathVerifier.metrics` it went into; ``answer`` is
    the final answer it stated, None where it stated none.
    """

    score: float
    route: str
    answer: str | None


class MathVerifier:
    """Verifies the final answers of completions; a context manager that owns a pool of processes.

    Each completion takes one route, counted under ``verifier/<route>``:

    ============  ======  ==================================================================================
    route         score   when
    ============  ======  ==================================================================================
    fast          0 or 1  numbers, words or an equal reading decided it, in this process; or it cannot be read
    math_verify   0 or 1  Math-Verify decided it, in a worker process
    no_answer     0       the completion states no final answer
    refused       0       its answer is too long, too deep or too large to be read
    timeouts      0       no verdict within ``timeout``; the worker was killed and replaced
    errors        0       Math-Verify raised, or two workers died of the answer
    unscorable    NaN     the reference is empty, refused, or cannot be read by Math-Verify
    ============  ======  ==================================================================================

    A pool that cannot work raises :class:`VerifierPoolError`; it never scores. Processes start when the first answer
    needs them. May be used from any thread and from several at once, after a fork, and pickled (a copy starts with
    counters at zero and processes of its own).

    Args:
        preset: "strict", for rewards, or "lenient", to compare with the numbers of other graders: what counts as the
            same answer, see :mod:`ebpo_core.rewards.presets`.
        workers: Processes, or None for the cores of this machine, at most 4.
        timeout: Seconds of wall time that one answer may take in a worker.
        memory_mb: Memory that a worker may take beyond what its libraries need, on Linux.
        math_verify: False for numbers and texts only: no process is started, ``x+1`` is not ``1+x``, and every
            reference that is not empty can be scored. Rewards then differ, so this is never chosen for you.
        after: Only what follows the last occurrence of this text counts, e.g. "</think>"; without it there is no
            answer.

    Raises:
        ValueError: An argument out of its range.
        ImportError: Math-Verify is wanted and not installed.
    """

    def __init__(
        self,
        *,
        preset: str = "strict",
        workers: int | None = None,
        timeout: float = 5.0,
        memory_mb: int = 1024,
        math_verify: bool = True,
        after: str | None = None,
    ) -> None:
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r}: choose one of {', '.join(PRESETS)}")
        if workers is None:
            workers = min(4, os.cpu_count() or 1)
        for name, value in (("workers", workers), ("memory_mb", memory_mb)):
            if not (isinstance(value, int) and value > 0):
                raise ValueError(f"{name}={value!r}: give a positive integer")
        if not (isinstance(timeout, (int, float)) and 0 < timeout < math.inf):
            raise ValueError(f"timeout={timeout!r}: give a positive number of seconds")
        if after == "":
            raise ValueError("after='': give the text that ends the reasoning, or None")
        if math_verify and importlib.util.find_spec("math_verify") is None:
            raise ImportError(
                'Math-Verify is not installed: pip install "ebpo-core[math]", or pass math_verify=False to compare '
                "numbers and texts only"
            )
        self._options: dict[str, Any] = {
            "preset": preset,
            "workers": workers,
            "timeout": float(timeout),
            "memory_mb": memory_mb,
            "math_verify": math_verify,
            "after": after,
        }
        self.preset: Preset = PRESETS[preset]
        self.math_verify = math_verify
        self.after = after
        self.pool = WorkerPool(workers, float(timeout), memory_mb)
        self._counts: Counter[str] = Counter()
        self._references: dict[str, bool] = {}
        self._lock = threading.Lock()
        _LIVE.add(self)

    def __enter__(self) -> MathVerifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._options,)

    def close(self) -> None:
        """End the processes. Scoring that needs none still works; scoring that does raises."""
        self.pool.close()

    @property
    def metrics(self) -> dict[str, float]:
        """Counts since this verifier was made.

        ``verifier/answers`` is the sum over the routes above, ``verifier/restarts`` the processes that were replaced.
        """
        with self._lock:
            counts = {f"verifier/{route}": float(self._counts[route]) for route in ROUTES}
        return {"verifier/answers": sum(counts.values()), **counts, "verifier/restarts": float(self.pool.restarts)}

    def score(self, completions: Sequence[Any], answers: Sequence[Any]) -> list[float]:
        """Scores of completions (N,) against reference answers (N,): 1.0, 0.0, or NaN for a reference that cannot be
        scored.

        Args:
            completions: Texts, or message lists in the conversational form.
            answers: References: texts or numbers, bare (``42``, ``\\frac{1}{2}``) or a solution that ends with
                ``\\boxed{...}``, ``#### ...`` or ``Answer: ...``. None and NaN cannot be scored.

        Raises:
            ValueError: Lengths differ.
            TypeError: A reference is neither text nor number, such as a dict.
            VerifierPoolError: The pool cannot work. Nothing was counted.
        """
        return [verdict.score for verdict in self.verdicts(completions, answers)]

    def verdicts(self, completions: Sequence[Any], answers: Sequence[Any]) -> list[Verdict]:
        """As :meth:`score`, with the route and the final answer of each completion."""
        if len(completions) != len(answers):
            raise ValueError(
                f"completions and answers: {len(completions)} and {len(answers)}; give one reference per completion"
            )
        stated = [self._stated(completion_text(completion)) for completion in completions]
        references = [reference_answer(answer) for answer in answers]
        scorable = self._scorable(references)
        verdicts: list[Verdict | None] = [None] * len(stated)
        pairs: list[tuple[str, str]] = []
        rows: list[int] = []
        for row, (answer, reference) in enumerate(zip(stated, references, strict=True)):
            if not scorable[reference]:
                verdicts[row] = Verdict(math.nan, "unscorable", answer)
            elif answer is None:
                verdicts[row] = Verdict(0.0, "no_answer", None)
            elif (reason := refusal(answer)) is not None:
                logger.debug("answer %.40r refused: %s", answer, reason)
                verdicts[row] = Verdict(0.0, "refused", answer)
            else:
                equal = self._decided(reference, answer)
                if equal is None and self.math_verify:
                    pairs.append((reference, answer))
                    rows.append(row)
                else:
                    verdicts[row] = Verdict(float(bool(equal)), "fast", answer)
        for row, outcome in zip(rows, self._judged(pairs), strict=True):
            if outcome.equal is None:
                logger.info("answer %.80r not judged: %s", stated[row], outcome.reason)
            route = {"": "math_verify", "timeout": "timeouts", "error": "errors"}[outcome.failure]
            verdicts[row] = Verdict(float(bool(outcome.equal)), route, stated[row])
        result = [verdict for verdict in verdicts if verdict is not None]
        with self._lock:
            self._counts.update(verdict.route for verdict in result)
        return result

    def scorable(self, answers: Sequence[Any]) -> list[bool]:
        """Flags of the references that can be scored: the check of a data set before it is trained on. Counts nothing.

        False for what is neither text nor number as well, which :meth:`score` raises for.
        """
        references = [_reference_or_nothing(answer) for answer in answers]
        known = self._scorable(references)
        return [known[reference] for reference in references]

    def groups(self, answers: Sequence[str | None]) -> list[int | None]:
        """Answers (N,) by meaning, for a vote: the place of the first one that each is equal to, None for None.

        An answer that cannot be read is equal to its own text only. Counts nothing.

        Raises:
            VerifierPoolError: The pool cannot work.
        """
        first: dict[str, int] = {}
        for place, answer in enumerate(answers):
            if answer is not None:
                first.setdefault(answer, place)
        waiting = list(first)
        meaning: dict[str, int] = {}
        while waiting:
            # One round for each group: what equals the first that has none yet joins it.
            leader, *others = waiting
            meaning[leader] = first[leader]
            same = self._equal_to(leader, others)
            meaning.update((answer, first[leader]) for answer, equal in zip(others, same, strict=True) if equal)
            waiting = [answer for answer, equal in zip(others, same, strict=True) if not equal]
        return [None if answer is None else meaning[answer] for answer in answers]

    def _equal_to(self, leader: str, others: Sequence[str]) -> list[bool]:
        if refusal(leader) is not None:
            return [False] * len(others)
        found: list[bool | None] = [
            False if refusal(answer) is not None else self._decided(leader, answer) for answer in others
        ]
        open_ = [place for place, equal in enumerate(found) if equal is None and self.math_verify]
        for place, outcome in zip(open_, self._judged([(leader, others[place]) for place in open_]), strict=True):
            found[place] = bool(outcome.equal)
        return [bool(equal) for equal in found]

    def _decided(self, reference: str, answer: str) -> bool | None:
        """Verdicts that need no symbolic library; None for the rest."""
        try:
            truth, given = read(reference), read(answer)
        except UnreadableError as reason:
            logger.debug("answer %.40r cannot be read: %s", answer, reason)
            return False
        return True if truth == given else decided(truth, given, self.preset)

    def _judged(self, pairs: Sequence[tuple[str, str]]) -> list[Outcome]:
        """Math-Verify's verdicts on references and answers, in the worker processes; each pair is asked for once."""
        distinct = list(dict.fromkeys(pairs))
        outcomes = self.pool.run(
            [{"reference": one, "answer": other, "preset": self.preset.name} for one, other in distinct]
        )
        found = dict(zip(distinct, outcomes, strict=True))
        return [found[pair] for pair in pairs]

    def reward(self, completions: Sequence[Any], answer: Sequence[Any] | None = None, **columns: Any) -> list[float]:
        """This verifier as a reward function in TRL's signature; see :func:`ebpo_core.rewards.math_reward`."""
        from ebpo_core.rewards.rewards import reward_with

        return reward_with(self, completions, answer, **columns)

    def _stated(self, text: str) -> str | None:
        if self.after is not None:
            _, found, text = text.rpartition(self.after)
            if not found:
                return None
        return final_answer(text)

    def _scorable(self, references: Sequence[str]) -> dict[str, bool]:
        """Flags, True where a reference can be scored, whatever the completions are.

        Asked before any answer is looked at: were it asked for wrong answers only, what is left of an unreadable
        reference's group would be its right answers.
        """
        known: dict[str, bool] = {}
        asked: list[str] = []
        for reference in dict.fromkeys(references):
            if reference in self._references:
                known[reference] = self._references[reference]
                continue
            node = _readable(reference)
            if node is None or not self.math_verify or node.kind == "words" or _is_number(node):
                known[reference] = node is not None
            else:
                asked.append(reference)
        outcomes = self.pool.run([{"reference": reference, "preset": self.preset.name} for reference in asked])
        for reference, outcome in zip(asked, outcomes, strict=True):
            known[reference] = bool(outcome.equal)
            if not outcome.equal:
                logger.warning("reference answer %.80r cannot be scored %s", reference, outcome.reason)
        with self._lock:
            if len(self._references) > _MAX_KNOWN_REFERENCES:
                self._references.clear()
            # A timeout may be the machine's fault: asked again next time.
            self._references.update(
                (reference, known[reference])
                for reference, outcome in zip(asked, outcomes, strict=True)
                if outcome.failure != "timeout"
            )
        return known


def _reference_or_nothing(answer: Any) -> str:
    try:
        return reference_answer(answer)
    except TypeError:
        return ""


def _readable(reference: str) -> Node | None:
    try:
        return read(reference) if reference and refusal(reference) is None else None
    except UnreadableError:
        return None


def _is_number(node: Node) -> bool:
    return node.number is not None and not node.members


def _rebuild(options: dict[str, Any]) -> MathVerifier:
    return MathVerifier(**options)


def _after_fork() -> None:
    for verifier in list(_LIVE):
        verifier._lock = threading.Lock()  # it may have been held by a thread that the child does not have
        verifier.pool.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

__all__ = ["ROUTES", "MathVerifier", "Verdict", "VerifierPoolError"]
