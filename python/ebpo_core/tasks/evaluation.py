"""pass@1 by sampling: the share of sampled completions that earn the full reward, per topic and level."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

from ebpo_core.rewards.text import RewardFunction, completion_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Any],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> list[Any]:
    """One sampled completion per prompt, in TRL's form: text for text prompts, a message list for conversations.

    Every sampling parameter is given here, so that nothing is inherited from the model's generation config.
    """
    import torch
    from transformers import GenerationConfig

    conversational = not isinstance(prompts[0], str)
    if conversational:
        texts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
        encoded = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    else:
        encoded = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    encoded = {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}
    generation = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        disable_compile=True,
    )
    with torch.no_grad():
        ids = model.generate(  # type: ignore[operator]
            **encoded, generation_config=generation
        )
    answers = tokenizer.batch_decode(ids[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return [[{"role": "assistant", "content": answer}] for answer in answers] if conversational else answers


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
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

    Seeded: the same model gets the same score, and the generators of torch are left as they were found.
    ``on_batch(done, total)`` is called after each batch of completions.
    """
    import torch

    rows = [index for index in range(len(dataset)) for _ in range(completions_per_prompt)]
    columns = {name: dataset[name] for name in dataset.column_names}
    earned: list[float] = []
    samples: list[Sample] = []
    training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            given = {name: [values[row] for row in batch] for name, values in columns.items()}
            prompts = given.pop("prompt")
            completions = sample_completions(
                model, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=temperature
            )
            scores = reward(prompts=prompts, completions=completions, **given)
            _check_scored(scores, prompts)
            earned.extend(scores)
            samples.extend(
                Sample(prompt_text(prompt), completion_text(completion), score)
                for prompt, completion, score in zip(prompts, completions, scores, strict=True)
            )
            if on_batch is not None:
                on_batch(len(earned), len(rows))
    model.train(training)
    passed = [float(score >= 1) for score in earned]
    clusters: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row, outcome in zip(rows, passed, strict=True):
        topic, level = (str(columns[name][row]) if name in columns else "" for name in ("topic", "level"))
        clusters[topic, level].append(outcome)
    per_prompt = [
        sum(passed[start : start + completions_per_prompt]) / completions_per_prompt
        for start in range(0, len(passed), completions_per_prompt)
    ]
    mean = sum(per_prompt) / len(per_prompt)
    variance = sum((share - mean) ** 2 for share in per_prompt) / max(1, len(per_prompt) - 1)
    return Evaluation(
        pass_at_1=mean,
        standard_error=math.sqrt(variance / len(per_prompt)),
        completions=len(passed),
        clusters={key: sum(values) / len(values) for key, values in sorted(clusters.items())},
        samples=samples,
    )


def _check_scored(scores: Sequence[float | None], prompts: Sequence[Any]) -> None:
    """A reward of NaN or None means that the reference cannot be scored, which is not the model's failure."""
    for score, prompt in zip(scores, prompts, strict=True):
        if score is None or math.isnan(score):
            raise ValueError(
                f"the reward of the held-out prompt {prompt_text(prompt)!r} is {score}: its reference answer cannot be "
                "scored; leave such rows out of the data"
            )


def prompt_text(prompt: Any) -> str:
    """A prompt as one line of text, whether it is text or a list of messages."""
    return prompt if isinstance(prompt, str) else " ".join(str(message.get("content", "")) for message in prompt)
