"""Sequence selection: every expert answers in full, then one answer is picked for each prompt.

Two ways to score the answers, with the same signature: :func:`reward_scores` calls a reward function, a verifier or a
reward model, as the paper's baseline does; :func:`likelihood_scores` needs no judge of rightness and takes the answer
that a given language model finds most likely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ebpo_core.evaluation import Completion
from ebpo_core.rewards.text import RewardFunction


class Selection(NamedTuple):
    """The answer picked for one prompt, the index of the expert that wrote it, and the scores of all experts."""

    response: Completion
    expert: int
    scores: tuple[float, ...]


Scores = Callable[[Sequence[str], Sequence[Completion]], Sequence[float]]
"""From prompts and as many answers to as many scores, the higher the better."""


def select_sequences(
    prompts: Sequence[str], responses: Sequence[Sequence[Completion]], scores: Scores
) -> list[Selection]:
    """The best answer to each prompt; of equal scores the first expert's.

    Args:
        prompts: B texts.
        responses: for each of n experts its B answers, see :func:`ebpo_core.evaluation.complete`.
        scores: called once for each expert.

    Returns:
        B selections.

    Raises:
        ValueError: no experts, answers or scores that are not one for each prompt, or a score that is NaN.
    """
    if not responses or any(len(answers) != len(prompts) for answers in responses):
        raise ValueError(
            f"responses holds {[len(answers) for answers in responses]} answers of the experts: "
            f"expected those of at least one expert, {len(prompts)} each, one for each prompt"
        )
    table = [[float(score) for score in scores(prompts, answers)] for answers in responses]
    for expert, row in enumerate(table):
        if len(row) != len(prompts) or any(map(math.isnan, row)):
            raise ValueError(
                f"scores gave {len(row)} values to {len(prompts)} answers of expert {expert}, "
                f"{sum(map(math.isnan, row))} of them NaN: expected one number for each answer"
            )
    picked = []
    for prompt in range(len(prompts)):
        of_prompt = tuple(row[prompt] for row in table)
        best = max(range(len(of_prompt)), key=of_prompt.__getitem__)
        picked.append(Selection(responses[best][prompt], best, of_prompt))
    return picked


def reward_scores(reward: RewardFunction, **columns: Sequence[Any]) -> Scores:
    """Scores by a reward function in TRL's signature, ``reward(prompts=, completions=, **columns) -> list[float]``.

    With a verifier that knows the right answers this is an oracle: what a perfect judge of whole answers could reach.

    Args:
        reward: such as :func:`ebpo_core.rewards.text.exact_match`.
        columns: what it wants beside the texts, one value for each prompt, such as ``answer``.
    """

    def scores(prompts: Sequence[str], responses: Sequence[Completion]) -> list[float]:
        return reward(prompts=list(prompts), completions=[response.text for response in responses], **columns)

    return scores


def likelihood_scores(
    model: Any, tokenizer: PreTrainedTokenizerBase, *, per_token: bool = False, batch_size: int = 256
) -> Scores:
    """Scores by ``log p(answer | prompt)`` under ``model``, summed over the answer's tokens; no oracle is asked.

    Sums favour short answers; ``per_token=True`` divides by the number of tokens. An answer without tokens scores 0.
    """

    def scores(prompts: Sequence[str], responses: Sequence[Completion]) -> list[float]:
        encoded = tokenizer(list(prompts))["input_ids"]
        totals: list[float] = []
        for start in range(0, len(prompts), batch_size):
            pairs = list(zip(encoded, responses, strict=True))[start : start + batch_size]
            answers = [_ids(response) for _, response in pairs]
            prompt_ids = [ids for ids, _ in pairs]
            sums = _log_likelihoods(model, tokenizer, list(zip(prompt_ids, answers, strict=True)))
            lengths = [max(1, len(answer)) if per_token else 1 for answer in answers]
            totals += [total / length for total, length in zip(sums.tolist(), lengths, strict=True)]
        return totals

    return scores


def _ids(response: Completion) -> tuple[int, ...]:
    if response.ids is None:
        raise ValueError(f"an answer without token ids ({response.text[:80]!r}): draw it with a model in this process")
    return response.ids


def _log_likelihoods(
    model: Any, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Tensor:
    """The sums of log p over the second part of each pair, given its first: ``[B]`` float32."""
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.full((len(pairs), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    answers = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(pairs):
        # Padding on the right: without position_ids, a model counts positions from the first column.
        ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        mask[row, : len(prompt) + len(answer)] = 1
        answers[row, len(prompt) : len(prompt) + len(answer)] = True
    ids, mask, answers = (tensor.to(model.device) for tensor in (ids, mask, answers))
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    model.train(training)
    each = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    sums: Tensor = each.masked_fill(~answers[:, 1:], 0.0).sum(-1)
    return sums
