"""pass@1 of a loaded model: the share of sampled completions that earn the full reward, per topic and level."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from ebpo_core.evaluation.estimators import mean_and_error
from ebpo_core.evaluation.local_model import LocalModel
from ebpo_core.evaluation.problems import from_rows
from ebpo_core.evaluation.sampling import Request, SamplingOptions, sample_seed
from ebpo_core.evaluation.scoring import PASSING, RewardScorer, whole_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ebpo_core.data.rows import Row
    from ebpo_core.rewards.text import RewardFunction


class Sample(NamedTuple):
    """One sampled completion and what it earned."""

    prompt: str
    completion: str
    reward: float


class Evaluation(NamedTuple):
    """pass@1 of a policy.

    ``pass_at_1`` is over everything and ``clusters`` per (topic, level), each a share of rewards >= 1. The
    ``standard_error`` takes prompts, not completions, for the independent draws.
    """

    pass_at_1: float
    standard_error: float
    completions: int
    clusters: dict[tuple[str, str], float]
    samples: list[Sample]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Row],
    reward: RewardFunction,
    *,
    max_new_tokens: int,
    completions_per_prompt: int = 4,
    batch_size: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Sample ``completions_per_prompt`` answers to every prompt of ``dataset`` and score them.

    Args:
        model, tokenizer: A loaded causal language model.
        dataset: Rows with a ``prompt``, a ``datasets.Dataset`` for one; the other columns go to the reward function.
        reward: In TRL's signature, ``reward(prompts, completions, **columns)``.
        max_new_tokens: Where an answer that does not end is cut.
        completions_per_prompt: Of each prompt.
        batch_size: Completions drawn at once; the result does not depend on it but for rounding.
        temperature: Of the sampling, which nothing truncates.
        seed: The same model gets the same score, and torch's generators are not touched.
        on_batch: Called with the number of completions so far and that of all, after each batch.

    Raises:
        ValueError: A row without a prompt, or a reference answer that cannot be scored.
    """
    problems = from_rows(dataset)
    options = SamplingOptions(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    backend = LocalModel(model, options, tokenizer=tokenizer, batch_size=batch_size)
    scorer = RewardScorer(reward, whole_text, "the reward function")
    requests = [
        Request(problem, problem.prompt, sample, sample_seed(seed, problem.id, sample))
        for problem in problems
        for sample in range(completions_per_prompt)
    ]
    samples: list[Sample] = []
    for batch in backend.generate(requests):
        scores = scorer.score([request.problem for request, _ in batch], [answer.text for _, answer in batch])
        samples += [
            Sample(request.problem.text, answer.text, scored.score)
            for (request, answer), scored in zip(batch, scores, strict=True)
        ]
        if on_batch is not None:
            on_batch(len(samples), len(requests))
    # Right answers among those of each prompt, in the order of the prompts.
    n = completions_per_prompt
    shares = [
        sum(sample.reward >= PASSING for sample in samples[start : start + n]) / n
        for start in range(0, len(samples), n)
    ]
    clusters: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for problem, share in zip(problems, shares, strict=True):
        clusters[problem.topic or "", problem.level or ""].append(share)
    mean, error = mean_and_error(shares)
    return Evaluation(
        pass_at_1=mean,
        standard_error=0.0 if math.isnan(error) else error,
        completions=len(samples),
        clusters={key: sum(values) / len(values) for key, values in sorted(clusters.items())},
        samples=samples,
    )
