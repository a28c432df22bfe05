"""Requests to a sampling back end, and the loop that makes those that are missing and writes down the answers.

Every sample has a seed of its own, made from the run's seed, the problem's id and the sample's index. So a sample does
not depend on which others were drawn beside it or before it: a run that was killed and started again draws what an
unbroken run would have drawn, as far as the back end's arithmetic is the same in another batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from ebpo_core.data import Problem
from ebpo_core.data.problem import Prompt
from ebpo_core.evaluation.journal import Journal
from ebpo_core.evaluation.scoring import Scorer

KIND = "samples"
KEY = ("problem", "sample")


@dataclass(frozen=True)
class SamplingOptions:
    """Every parameter of sampling; nothing is inherited from a model's generation config.

    Attributes:
        max_new_tokens: Longest completion, in tokens.
        temperature: Divides the logits; 0 takes the most likely token, so that every sample of a problem is the same.
        top_p: Smallest set of likeliest tokens with this probability together; 1 keeps all.
        top_k: Likeliest tokens to keep; 0 keeps all.
        seed: Of the run, see :func:`sample_seed`.
    """

    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: expected at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: expected a finite number, at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected a number in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: expected at least 0 (0 keeps all tokens)")


def sample_seed(seed: int, problem: str, sample: int) -> int:
    """The seed of one sample, in 0..2^31 - 1, which every server takes."""
    digest = hashlib.blake2b(f"{seed}\0{problem}\0{sample}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


class Request(NamedTuple):
    """One sample to draw."""

    problem: Problem
    prompt: Prompt
    sample: int
    seed: int


class Completion(NamedTuple):
    """One answer.

    Attributes:
        text: Without special tokens.
        finish_reason: "stop", "length", or a server's own word for why it ended.
        tokens: How many there are, the end-of-sequence token included; None where a server does not say.
        ids: The tokens themselves, of a model in this process.
    """

    text: str
    finish_reason: str = "stop"
    tokens: int | None = None
    ids: tuple[int, ...] | None = None


Batch = list[tuple[Request, Completion]]


class Backend(Protocol):
    """Draws samples."""

    def settings(self) -> dict[str, Any]:
        """Settings that decide a sample beside the prompt and its seed; JSON-safe."""

    def generate(self, requests: Sequence[Request]) -> Generator[Batch, None, None]:
        """Draw all requests and hand them over as they are done, in any order and in lists of any length."""


def run_settings(
    backend: Backend, options: SamplingOptions, scorer: Scorer, problems: str, prompt_format: Any
) -> dict[str, Any]:
    """The header's settings: two runs may share a file if and only if these are equal.

    The number of samples is not among them, so that a finished file can be extended.
    """
    return {
        "problems": problems,
        "prompt": asdict(prompt_format),
        "backend": backend.settings(),
        "sampling": asdict(options),
        "scorer": scorer.name,
        "preset": scorer.preset,
    }


def missing_requests(
    problems: Sequence[Problem],
    samples: int,
    journal: Journal,
    options: SamplingOptions,
    form: Callable[[Prompt], Prompt],
) -> list[Request]:
    """The samples 0..samples - 1 of each problem that the journal does not hold."""
    if samples < 1:
        raise ValueError(f"samples={samples}: expected at least 1")
    return [
        Request(problem, form(problem.prompt), sample, sample_seed(options.seed, problem.id, sample))
        for problem in problems
        for sample in range(samples)
        if (problem.id, sample) not in journal
    ]


def collect(
    requests: Sequence[Request],
    backend: Backend,
    scorer: Scorer,
    journal: Journal,
    on_progress: Callable[[int], None] | None = None,
) -> int:
    """Draw, score and write down ``requests``; each is on disk before the next is waited for.

    Returns:
        How many samples were drawn. ``on_progress`` is called with the count so far.
    """
    done = 0
    # Closed in any case, so that a back end's threads end when the scorer raises or the user interrupts.
    with closing(backend.generate(requests)) as batches:
        for batch in batches:
            scores = scorer.score([request.problem for request, _ in batch], [answer.text for _, answer in batch])
            journal.append(
                {
                    "problem": request.problem.id,
                    "sample": request.sample,
                    "seed": request.seed,
                    "text": completion.text,
                    "answer": scored.answer,
                    "score": scored.score,
                    "finish_reason": completion.finish_reason,
                    "tokens": completion.tokens,
                }
                for (request, completion), scored in zip(batch, scores, strict=True)
            )
            done += len(batch)
            if on_progress is not None:
                on_progress(done)
    return done
