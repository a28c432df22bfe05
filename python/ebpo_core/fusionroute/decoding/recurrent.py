"""The fallback for experts with recurrent layers (convolutions, linear attention): lazy too, but for whole batches.

A recurrent state cannot be advanced for some rows only, so the expert runs on all rows when any selects it, over the
columns it missed, padding included, exactly as stock decoding would.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ebpo_core.fusionroute.compat import CACHE
from ebpo_core.fusionroute.experts.expert import Expert

from .history import TokenHistory


class ColumnExpert:
    """Same interface as :class:`~.lazy.LazyExpert`; ``synced`` counts columns, the same for all rows."""

    def __init__(self, expert: Expert, batch_size: int) -> None:
        self.expert = expert
        self.cache = DynamicCache(config=expert.config)
        self.synced = 0
        self.forwarded = [0] * batch_size
        self.runs: list[int] = []

    def logits(self, history: TokenHistory, rows: Sequence[int], ends: Sequence[int], keep: int) -> Tensor:
        """Bring the batch up to its last column; return the rows' logits, ``[rows, keep, V]``, aligned at ``ends``."""
        device = self.expert.device
        new = history.columns - self.synced
        # A row's end is its last column or earlier: shift each row so that its end stands at the right.
        behind = [history.lengths[row] - end for row, end in zip(rows, ends, strict=True)]
        kept = min(new, keep + max(behind))
        out = self.expert(
            input_ids=history.ids[:, self.synced :].to(device),
            attention_mask=history.mask.long().to(device),
            position_ids=history.positions[:, self.synced :].to(device),
            use_cache=True,
            logits_to_keep=kept,
            **{CACHE: self.cache},
        )
        counts = history.mask[:, self.synced :].sum(1).tolist()
        self.forwarded = [done + count for done, count in zip(self.forwarded, counts, strict=True)]
        self.synced = history.columns
        self.runs.append(new)
        logits: Tensor = out.logits[torch.tensor(rows, device=device)]
        if not any(behind):
            return logits[:, -keep:]
        columns = kept - torch.tensor(behind, device=device)[:, None] + torch.arange(-keep, 0, device=device)
        return logits[torch.arange(len(behind), device=device)[:, None], columns.clamp(min=0)]

    def take(self, rows: Sequence[int]) -> None:
        self.forwarded = [self.forwarded[row] for row in rows]
        if self.synced:
            self.cache.reorder_cache(torch.tensor(list(rows), device=self.expert.device))  # type: ignore[arg-type]

    def shorten(self, history: TokenHistory) -> None:
        """A recurrent state cannot be rolled back: start anew unless it has not seen what is taken back."""
        if self.synced > history.columns:
            self.evict()

    def keep(self, lengths: Sequence[int]) -> None:  # noqa: ARG002 -- the interface of LazyExpert
        """Start anew: what some rows have seen is padding now (or the reverse), and a state cannot forget it."""
        self.evict()

    def evict(self) -> None:
        self.cache = DynamicCache(config=self.expert.config)
        self.synced = 0

    @property
    def nbytes(self) -> int:
        return sum(_bytes_of(layer) for layer in self.cache.layers)

    @property
    def empty(self) -> bool:
        return self.synced == 0


def _bytes_of(layer: Any) -> int:
    """All tensors a layer of transformers' cache holds, directly or in a dict of states."""
    tensors: list[Tensor] = []
    for value in vars(layer).values():
        parts = value.values() if isinstance(value, dict) else [value]
        tensors += [part for part in parts if isinstance(part, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)
