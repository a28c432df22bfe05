"""Keys and values of one expert when every row of the batch has its own length: the lazy cache of attention layers.

A row that does not select an expert leaves no hole in that expert's cache. Row ``b``'s token at position ``p`` lies in
column ``p - base`` of the row's slot, so a row is as long as the tokens that were really forwarded for it, and a later
selection forwards the missing ones as one chunk. Slots are shared copy-on-write: beam search reorders rows without
moving a byte until two rows that share a slot diverge.
"""

# ruff: noqa: ARG002 -- transformers fixes the signatures
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .columns import Chunk, Columns, RaggedLayer


class RaggedCache(Cache):
    """The cache that ``forward`` of an expert gets. Prepared for a :class:`Chunk` by :meth:`begin`.

    Args:
        windows: per layer, how many positions a query sees (itself included), None for all; see :func:`windows_of`.
        batch_size: rows B.
    """

    def __init__(self, windows: Sequence[int | None], batch_size: int) -> None:
        self.columns = {window: Columns(window) for window in windows}
        self.layers: list[Any]
        super().__init__(layers=[RaggedLayer(self.columns[window]) for window in windows])
        self.lengths = [0] * batch_size
        self._slots: list[int | None] = [None] * batch_size

    # ------------------------------------------------------------------------------------------------------ one run

    def begin(self, chunk: Chunk) -> None:
        """Make room for the chunk and tell the layers where its keys go. ``lengths`` change in :meth:`finish`."""
        for layer in self.layers:
            layer.thaw()
        slots = self._own_slots(chunk.rows)
        for group in self.columns.values():
            group.fit(self._layers_of(group), slots, chunk.ends, self._slot_lengths())
            group.place(chunk, slots)
        self._chunk = chunk

    @property
    def uniform(self) -> bool:
        """True if the rows of the chunk lie alike, so that transformers' own masks (or none) are right."""
        return self._chunk.uniform and all(len(set(group.chunk_bases)) == 1 for group in self.columns.values())

    def finish(self) -> None:
        """The chunk went through: count its tokens, and give back what no later query will look at."""
        for row, end in zip(self._chunk.rows, self._chunk.ends, strict=True):
            self.lengths[row] = end
        for group in self.columns.values():
            group.shrink(self._layers_of(group), self._slot_lengths())

    def _layers_of(self, group: Columns) -> list[RaggedLayer]:
        return [layer for layer in self.layers if layer.columns is group]

    def _slot_lengths(self) -> dict[int, int]:
        """Tokens of each slot in use; of the shortest row where several share one."""
        lengths: dict[int, int] = {}
        for slot, length in zip(self._slots, self.lengths, strict=True):
            if slot is not None:
                lengths[slot] = min(length, lengths.get(slot, length))
        return lengths

    def mask(self, window: int | None, positions: Tensor, dtype: torch.dtype | None) -> Tensor:
        """The attention mask, ``[rows, 1, queries, columns]``: bool, or additive of ``dtype`` for eager attention.

        Args:
            window: one of the windows given at construction.
            positions: ``[rows, queries]`` int64, the queries' places in their rows (columns are compared by place, as
                transformers does, not by rotary position).
            dtype: of the additive mask; None for a bool mask.
        """
        group = self.columns[window]
        device = positions.device
        bases = torch.tensor(group.chunk_bases, device=device)[:, None]
        places = (bases + torch.arange(group.first, group.last, device=device))[:, None, :]
        queries = positions[:, :, None]
        seen = places <= queries
        if window is not None:
            seen &= places > queries - window
        seen = seen[:, None]
        if dtype is None:
            return seen
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)

    # ------------------------------------------------------------------------------------------------- whole batches

    def take(self, rows: Sequence[int]) -> None:
        """Let the batch be ``rows`` of what it was: reorders, selects and repeats; nothing is copied now."""
        self.lengths = [self.lengths[row] for row in rows]
        self._slots = [self._slots[row] for row in rows]

    def shorten(self, row: int, length: int) -> None:
        """Forget all but a row's first ``length`` tokens; a row that a window has dropped too much of starts anew."""
        if length >= self.lengths[row]:
            return
        slot = self._slots[row]
        kept = slot is not None and all(group.remembers(slot, length) for group in self.columns.values())
        self.lengths[row] = length if kept else 0
        if not self.lengths[row]:
            self._slots[row] = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated on the device."""
        return sum(layer.nbytes for layer in self.layers)

    def _own_slots(self, rows: list[int]) -> list[int]:
        """A slot of its own for each row: new ones for new rows, copies where rows share one."""
        users = Counter(slot for slot in self._slots if slot is not None)
        free = iter(slot for slot in range(len(self._slots) + len(users)) if slot not in users)
        copies: list[tuple[int, int]] = []
        for row in rows:
            slot = self._slots[row]
            if slot is not None and users[slot] == 1:
                continue
            new = next(free)
            if slot is not None:
                users[slot] -= 1
                copies.append((slot, new))
            self._slots[row] = new
        slots = [slot for slot in (self._slots[row] for row in rows) if slot is not None]
        highest = max(slot for slot in self._slots if slot is not None)
        for layer in self.layers:
            layer.copy_slots(copies, highest + 1, len(self._slots))
        for group in self.columns.values():
            group.bases += [0] * (highest + 1 - len(group.bases))
            for row, slot in zip(rows, slots, strict=True):
                if self.lengths[row] == 0:
                    group.bases[slot] = 0
            for old, new in copies:
                group.bases[new] = group.bases[old]
        return slots

    # ------------------------------------------------------------- what transformers asks when it builds masks itself

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the chunk; asked for only when all rows cover the same positions."""
        return self._chunk.starts[0]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        group = self.layers[layer_idx].columns
        return group.last - group.first, group.first + group.chunk_bases[0]

    @property
    def is_sliding(self) -> list[bool]:
        return [layer.columns.window is not None for layer in self.layers]

    @property
    def is_compileable(self) -> bool:
        return False


def windows_of(config: Any) -> list[int | None] | None:
    """Per layer, how many positions a query sees (None: all); None for the whole model if a layer keeps other state.

    Convolutions, linear attention and other recurrent states cannot be kept row by row; see ``recurrent.py``.
    """
    windows: list[int | None] = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicLayer:
            windows.append(None)
        elif type(layer) is DynamicSlidingWindowLayer:
            windows.append(int(layer.sliding_window))
        else:
            return None
    return windows
