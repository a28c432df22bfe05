"""Supervised warm-up on generated solutions: reinforcement learning has to start from a policy that succeeds at times.

Policy gradients learn nothing from a policy that never earns a reward; every public recipe starts from a model that
was trained before. This stands in for that training on the mini-countdown task.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from ebpo_core.tasks.countdown import generate
from ebpo_core.tasks.supervised import encode, fit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ebpo_core.data.rows import Row


def encode_batch(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of mini-countdown and their solutions, as :func:`~ebpo_core.tasks.supervised.encode` gives them."""
    return encode(tokenizer, [row["prompt"] for row in rows], [f" {row['answer']}" for row in rows])


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    steps: int = 300,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train ``model`` in place on fresh solutions of training problems, by cross-entropy on the answers.

    AdamW (0.9, 0.98), linear learning-rate warm-up over a sixth of the steps and linear decay to a tenth, gradient norm
    clipped at 1. ``on_step(step, loss)`` is called after each step.

    Returns:
        The loss of each step, in nats per answer token.
    """
    problems = generate(steps * batch_size, seed, "train")
    return fit(
        model,
        (encode_batch(list(islice(problems, batch_size)), tokenizer) for _ in range(steps)),
        steps=steps,
        rise=max(1, steps // 6),
        learning_rate=learning_rate,
        weight_decay=0.01,
        on_step=on_step,
    )
