"""The demo's models: a small Llama trained a little on everything, and one expert for each domain trained from it.

A plain loop in torch, not a trainer: this stands in for the models that a user of FusionRoute already has. Every step
sees fresh problems of the training split, so nothing is seen twice but by chance.
"""

from __future__ import annotations

import copy
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from ebpo_core.tasks import supervised, tiny_model

from .domains import DOMAINS, KINDS, generate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from ebpo_core.data import Problem

# Addition is learned after a plateau, whose length depends on the seed. A wide start and a strong decay of the weights
# (instead of 0.02 and 0.01) kept it below 400 steps on three of three seeds.
INITIALIZER_RANGE = 0.06
WEIGHT_DECAY = 0.3


class Course(NamedTuple):
    """Length and speed of a training."""

    steps: int
    batch_size: int
    learning_rate: float


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int = 96, layers: int = 2, heads: int = 4, seed: int = 0
) -> LlamaForCausalLM:
    """A Llama with random float32 weights; the defaults give 191,000 parameters. torch's generator stays as it was."""
    return tiny_model.build_model(
        tokenizer,
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        seed=seed,
        intermediate_size=2 * hidden_size,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=False,
    )


def encode(
    problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Problems and their answers, as :func:`ebpo_core.tasks.supervised.encode` gives them."""
    return supervised.encode(tokenizer, [problem.text for problem in problems], [p.answer for p in problems])


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: Iterator[Problem],
    course: Course,
    *,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train ``model`` in place by cross-entropy on the answers; the model is in eval mode afterwards.

    AdamW (0.9, 0.98; weight decay 0.3), learning rate rising linearly over a tenth of the steps and falling linearly
    to a tenth, gradient norm clipped at 1. ``on_step(step, loss)`` is called after each step.

    Returns:
        The loss of each step, in nats per answer token.

    Raises:
        ValueError: ``problems`` ran out.
    """
    steps, batch_size, learning_rate = course

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for step in range(1, steps + 1):
            batch = list(islice(problems, batch_size))
            if len(batch) < batch_size:
                raise ValueError(f"problems ran out in step {step} of {steps}: expected {batch_size} for each step")
            yield encode(batch, tokenizer)

    losses = supervised.fit(
        model,
        batches(),
        steps=steps,
        rise=max(1, steps // 10),
        learning_rate=learning_rate,
        weight_decay=WEIGHT_DECAY,
        on_step=on_step,
    )
    model.eval()  # type: ignore[no-untyped-call]
    return losses


def train_base(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    course: Course,
    *,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train a fresh model in place on all kinds of problems; returns the loss of each step."""
    problems = generate(course.steps * course.batch_size, seed, "train", KINDS)
    return train(model, tokenizer, problems, course, on_step=on_step)


def train_expert(
    base: LlamaForCausalLM,
    domain: str,
    tokenizer: PreTrainedTokenizerBase,
    course: Course,
    *,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
) -> LlamaForCausalLM:
    """A copy of ``base`` trained on one domain, on single questions and on pairs; it sees no mixed problem.

    Raises:
        ValueError: a domain that there is not.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain={domain!r}: choose one of {list(DOMAINS)}")
    expert = copy.deepcopy(base)
    problems = generate(course.steps * course.batch_size, seed, "train", (domain, f"{domain} pair"))
    train(expert, tokenizer, problems, course, on_step=on_step)
    return expert
