"""A tiny model that solves some of the problems that a test evaluates it on, for there to be something to measure."""

from __future__ import annotations

from pathlib import Path

import torch

from ebpo_core.models import load_model
from ebpo_core.tasks import countdown
from ebpo_core.tasks.tiny_model import build_tokenizer, save_tiny_model
from ebpo_core.tasks.warmup import encode_batch

LOSS = 0.3
"""Nats per answer token at which training stops: well short of knowing the answers by heart."""

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"


def partly_trained(folder: Path, split: str, size: int) -> str:
    """Save a model that has half memorised the built-in problems ``countdown`` of this split and size."""
    save_tiny_model(folder, hidden_size=48, layers=2)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    model, _ = load_model(str(folder))
    ids, mask, labels = encode_batch(list(countdown.generate(size, 0, split)), tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loss = torch.tensor(torch.inf)
    while loss > LOSS:
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return str(folder)
