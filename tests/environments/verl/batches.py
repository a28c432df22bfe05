"""Batches as verl makes them, from a seed, and the NumPy twin's opinion of them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from verl import DataProto

LONGEST = 6


def uid(*what: object) -> str:
    """An id of a uuid4's form that depends on ``what`` alone."""
    digest = hashlib.md5(repr(what).encode(), usedforsecurity=False).hexdigest()
    return "-".join((digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:]))


def batch(seed: int, prompts: int = 5, completions: int = 4, dtype: torch.dtype = torch.float32) -> DataProto:
    """Rows of each prompt in turn, outcome rewards in {0, 0.5, 1} at the last response token, lengths from 1 on."""
    rng = np.random.default_rng(seed)
    rows = prompts * completions
    lengths = rng.integers(1, LONGEST + 1, rows)
    mask = torch.from_numpy((np.arange(LONGEST) < lengths[:, None]).astype(np.int64))
    rewards = rng.choice([0.0, 0.5, 1.0], rows, p=[0.6, 0.1, 0.3])
    rewards[:completions] = 0.0  # a saturated group in every batch
    scores = torch.zeros(rows, LONGEST, dtype=dtype)
    scores[torch.arange(rows), torch.from_numpy(lengths - 1)] = torch.from_numpy(rewards).to(dtype)
    ids = np.array([uid(seed, m) for m in range(prompts) for _ in range(completions)], dtype=object)
    return DataProto.from_dict(tensors={"token_level_rewards": scores, "response_mask": mask}, non_tensors={"uid": ids})


def with_padding(data: DataProto, rows: int, seed: int = 0) -> DataProto:
    """``data`` and, after it, rows marked as ``upsample_batch_to_divisible_size`` marks its own."""
    ids = np.array(["pad" + hashlib.md5(bytes([seed]), usedforsecurity=False).hexdigest()] * rows, dtype=object)
    zeros = torch.zeros(rows, data.batch["response_mask"].shape[1])
    padding = DataProto.from_dict(
        tensors={"token_level_rewards": zeros, "response_mask": zeros.to(torch.int64)}, non_tensors={"uid": ids}
    )
    return DataProto.concat([data, padding])


def twins_advantages(twin: Any, data: DataProto, mask: Any = None) -> np.ndarray:
    """What ``twin``, a ``reference.EBPO``, makes of ``data``, ``(B, T)`` float64; the batch enters its prior."""
    answered = data.batch["response_mask"].numpy()
    rewards = data.batch["token_level_rewards"].double().sum(-1).numpy()
    valid = answered.any(-1) if mask is None else mask
    return twin(rewards, data.non_tensor_batch["uid"].astype(str), mask=valid)[:, None] * answered
