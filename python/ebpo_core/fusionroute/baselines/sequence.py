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
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ebpo_core.rewards.text import RewardFunction


class Response(NamedTuple):
    """One answer: its text without special tokens, and its token ids, the end-of-sequence token included if it came."""

    text: str
    ids: tuple[int, ...]


class Selection(NamedTuple):
    """The answer picked for one prompt, the index of the expert that wrote it, and the scores of all experts."""

    response: Response
    expert: int
    scores: tuple[float, ...]


Scores = Callable[[Sequence[str], Sequence[Response]], Sequence[float]]
"""From prompts and as many answers to as many scores, the higher the better."""


def write_responses(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float | None = None,
    batch_size: int = 256,
    on_batch: Callable[[int, int], None] | None = None,
    **options: Any,
) -> list[Response]:
    """Answers by ``model.generate``, in batches with left padding; the model's own generation config is not used.

    Args:
        model: any causal language model of transformers.
        tokenizer: has to know a padding and an end-of-sequence token.
        prompts: plain texts.
        max_new_tokens: where an answer that does not end is cut.
        temperature: None for greedy answers, else samples at this temperature, by torch's generator, not truncated.
        batch_size: prompts at once.
        on_batch: called with the number of answers so far and that of all prompts, after each batch.
        options: to ``generate``, such as ``complementary=False`` of a FusionRoute model; no fields of GenerationConfig.
    """
    sampling = {"do_sample": False} if temperature is None else {"do_sample": True, "temperature": temperature}
    if temperature is not None:
        sampling |= {"top_k": 0, "top_p": 1.0}
    generation = GenerationConfig(  # type: ignore[no-untyped-call]
        **sampling,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        disable_compile=True,
    )
    training = model.training
    model.eval()
    responses: list[Response] = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        encoded = tokenizer(batch, padding=True, padding_side="left", return_tensors="pt").to(model.device)
        with torch.no_grad():
            ids = model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                generation_config=generation,
                **options,
            )
        for row in ids[:, encoded["input_ids"].shape[1] :].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            text = tokenizer.decode(row[:end], skip_special_tokens=True)
            responses.append(Response(str(text), tuple(row[:end])))
        if on_batch is not None:
            on_batch(len(responses), len(prompts))
    model.train(training)
    return responses


def select_sequences(
    prompts: Sequence[str], responses: Sequence[Sequence[Response]], scores: Scores
) -> list[Selection]:
    """The best answer to each prompt; of equal scores the first expert's.

    Args:
        prompts: B texts.
        responses: for each of n experts its B answers, see :func:`write_responses`.
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

    def scores(prompts: Sequence[str], responses: Sequence[Response]) -> list[float]:
        return reward(prompts=list(prompts), completions=[response.text for response in responses], **columns)

    return scores


def likelihood_scores(
    model: Any, tokenizer: PreTrainedTokenizerBase, *, per_token: bool = False, batch_size: int = 256
) -> Scores:
    """Scores by ``log p(answer | prompt)`` under ``model``, summed over the answer's tokens; no oracle is asked.

    Sums favour short answers; ``per_token=True`` divides by the number of tokens. An answer without tokens scores 0.
    """

    def scores(prompts: Sequence[str], responses: Sequence[Response]) -> list[float]:
        encoded = tokenizer(list(prompts))["input_ids"]
        totals: list[float] = []
        for start in range(0, len(prompts), batch_size):
            pairs = list(zip(encoded, responses, strict=True))[start : start + batch_size]
            sums = _log_likelihoods(model, tokenizer, [(ids, response.ids) for ids, response in pairs])
            lengths = [max(1, len(response.ids)) if per_token else 1 for _, response in pairs]
            totals += [total / length for total, length in zip(sums.tolist(), lengths, strict=True)]
        return totals

    return scores


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
