"""Supervised training of a small model in place, for the demos' base models and experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED_LABEL = -100


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and labels, ``[rows, longest]`` int64 each, padded on the right.

    Answers, which follow their prompts as they are, and the end-of-sequence token are labelled, the rest is -100.
    """
    texts = [f"{prompt}{answer}{tokenizer.eos_token}" for prompt, answer in zip(prompts, answers, strict=True)]
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    labels = ids.masked_fill(mask == 0, IGNORED_LABEL)
    for row, prompt in enumerate(tokenizer(list(prompts))["input_ids"]):
        labels[row, : len(prompt)] = IGNORED_LABEL
    return ids, mask, labels


def fit(
    model: PreTrainedModel,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    *,
    steps: int,
    rise: int,
    learning_rate: float,
    weight_decay: float,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train ``model`` in place by cross-entropy; it is in training mode afterwards.

    AdamW (0.9, 0.98), learning rate rising linearly over ``rise`` steps and falling linearly to a tenth, gradient norm
    clipped at 1. ``on_step(step, loss)`` is called after each step.

    Args:
        model: Any causal LM.
        batches: Token ids, attention mask and labels of each step, ``[B, S]`` int64 each.
        steps: How many batches there are.
        rise: Steps of the learning rate's rise; at least 1.
        learning_rate: At its peak.
        weight_decay: AdamW's.
        on_step: Called with the number of steps done and the last one's loss.

    Returns:
        The loss of each step, in nats per labelled token.
    """
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay)

    def scale(step: int) -> float:
        return (step + 1) / rise if step < rise else 1 - 0.9 * (step - rise) / max(1, steps - rise)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    losses: list[float] = []
    model.train()
    for step, batch in enumerate(batches, start=1):
        ids, mask, labels = (tensor.to(model.device) for tensor in batch)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step, losses[-1])
    return losses
