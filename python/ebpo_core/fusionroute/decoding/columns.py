"""The memory of a lazy cache: where each row's tokens lie, and the buffers of one layer."""

# ruff: noqa: ARG002 -- transformers fixes the signatures
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

_FIRST_COLUMNS = 64  # smallest allocation
ROLLBACK = 64  # columns a windowed layer keeps beyond its window, so that rejected drafts can be cropped


class Chunk(NamedTuple):
    """One run of an expert: for each of ``rows``, the tokens at ``starts[i] .. ends[i] - 1``."""

    rows: list[int]
    starts: list[int]
    ends: list[int]

    @property
    def longest(self) -> int:
        return max(end - start for start, end in zip(self.starts, self.ends, strict=True))

    @property
    def uniform(self) -> bool:
        """True if all rows cover the same positions, as a stock batch without padding does."""
        return len(set(self.starts)) == 1 and len(set(self.ends)) == 1


class Columns:
    """The columns of all layers of one window: position p of a slot lies in column ``p - bases[slot]``."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.capacity = 0
        self.bases: list[int] = []
        self.first = self.last = 0  # columns the chunk's queries may look at
        self.chunk_bases: list[int] = []

    def remembers(self, slot: int, length: int) -> bool:
        """True if a row cut to ``length`` would still hold all that its next query may look at."""
        return self.window is None or self.bases[slot] <= max(0, length - self.window + 1)

    def fit(self, layers: list[RaggedLayer], slots: list[int], ends: list[int], live: dict[int, int]) -> None:
        """Room for the chunk: a windowed layer first drops what no query will see again."""

        def needed() -> int:
            return max(end - self.bases[slot] for slot, end in zip(slots, ends, strict=True))

        if needed() <= self.capacity:
            return
        self._drop(layers, live)
        if needed() > self.capacity:
            self.capacity = max(needed(), _FIRST_COLUMNS, self.capacity + self.capacity // 2)

    def shrink(self, layers: list[RaggedLayer], live: dict[int, int]) -> None:
        """After a chunk much longer than the window (a prompt), keep the window and free the rest."""
        if self.window is None:
            return
        small = _FIRST_COLUMNS + 2 * (self.window + ROLLBACK)
        if self.capacity < 2 * small:
            return
        self._drop(layers, live)
        capacity = max(small, max(length - self.bases[slot] for slot, length in live.items()))
        if capacity < self.capacity:
            self.capacity = capacity
            for layer in layers:
                layer.cut(capacity)

    def _drop(self, layers: list[RaggedLayer], live: dict[int, int]) -> None:
        """Move what a later query may look at (and some for rollback) to each slot's first columns."""
        if self.window is None:
            return
        keep = self.window - 1 + ROLLBACK
        shifts = [max(0, live.get(slot, 0) - base - keep) for slot, base in enumerate(self.bases)]
        if any(shifts):
            self.bases = [base + shift for base, shift in zip(self.bases, shifts, strict=True)]
            for layer in layers:
                layer.shift(shifts)

    def place(self, chunk: Chunk, slots: list[int]) -> None:
        """Turn the chunk into the indices that every layer of this window uses."""
        bases = self.chunk_bases = [self.bases[slot] for slot in slots]
        seen = 0 if self.window is None else self.window - 1
        self.first = (
            0
            if self.window is None
            else min(max(0, start - seen - base) for start, base in zip(chunk.starts, bases, strict=True))
        )
        self.last = max(end - base for end, base in zip(chunk.ends, bases, strict=True))
        contiguous = slots == list(range(slots[0], slots[0] + len(slots)))
        self.slots: list[int] | slice = slice(slots[0], slots[0] + len(slots)) if contiguous else slots
        starts = [start - base for start, base in zip(chunk.starts, bases, strict=True)]
        lengths = [end - start for start, end in zip(chunk.starts, chunk.ends, strict=True)]
        self.span: slice | None = None
        self.cells: tuple[list[int], ...] | None = None
        if len(set(starts)) == 1 and len(set(lengths)) == 1:
            self.span = slice(starts[0], starts[0] + lengths[0])
        else:
            # Rows are aligned at the right end of the chunk; what stands left of a shorter one is padding.
            width = max(lengths)
            cells = [
                (i, width - length + step, slot, start + step)
                for i, (slot, start, length) in enumerate(zip(slots, starts, lengths, strict=True))
                for step in range(length)
            ]
            self.cells = tuple(list(part) for part in zip(*cells, strict=True))
        self.indices: dict[torch.device, tuple[slice | Tensor, tuple[Tensor, ...]]] = {}

    def on(self, device: torch.device) -> tuple[slice | Tensor, tuple[Tensor, ...]]:
        """The chunk's slots and cells as indices of this device, uploaded once for all layers."""
        if device not in self.indices:
            slots = self.slots if isinstance(self.slots, slice) else torch.tensor(self.slots, device=device)
            cells = tuple(torch.tensor(part, device=device) for part in self.cells or ())
            self.indices[device] = (slots, cells)
        return self.indices[device]


class RaggedLayer(CacheLayerMixin):
    """One layer's keys and values, ``[slots, heads, columns, head_dim]`` each."""

    is_croppable = True

    def __init__(self, columns: Columns) -> None:
        super().__init__()
        self.columns = columns
        self.slot_count = 0
        self.buffers: list[Tensor] = []  # keys, values

    @property
    def is_sliding(self) -> bool:
        return self.columns.window is not None

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        states = (key_states, value_states)
        self.buffers = [_room(each, self.slot_count, self.columns.capacity) for each in states]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the chunk's keys and values; return all that its queries may look at, ``[rows, heads, columns, d]``."""
        columns = self.columns
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.buffers[0].shape[2] < columns.capacity:
            self.buffers = [_grown(buffer, buffer.shape[0], columns.capacity) for buffer in self.buffers]
        rows, cells = columns.on(key_states.device)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            if columns.span is not None:
                buffer[rows, :, columns.span] = states
            else:
                row, query, slot, column = cells
                buffer[slot, :, column] = states[row, :, query]
        keys, values = (buffer[rows, :, columns.first : columns.last] for buffer in self.buffers)
        return keys, values

    def thaw(self) -> None:
        """Before a run: buffers that were made under ``torch.inference_mode`` may be written outside of it too."""
        self.buffers = [writable(buffer) for buffer in self.buffers]

    def copy_slots(self, copies: list[tuple[int, int]], count: int, batch_size: int) -> None:
        """Room for ``count`` slots; then each pair's second becomes a copy of its first."""
        if count > self.slot_count:
            self.slot_count = max(count, min(batch_size, 2 * self.slot_count))
            self.buffers = [_grown(buffer, self.slot_count, buffer.shape[2]) for buffer in self.buffers]
        if copies:
            old, new = (list(part) for part in zip(*copies, strict=True))
            for buffer in self.buffers:
                buffer[new] = buffer[old]

    def shift(self, shifts: list[int]) -> None:
        """Drop the first ``shifts[slot]`` columns of each slot."""
        for slot, shift in enumerate(shifts):
            if shift:
                for buffer in self.buffers:
                    buffer[slot, :, :-shift] = buffer[slot, :, shift:].clone()

    def cut(self, capacity: int) -> None:
        self.buffers = [buffer[:, :, :capacity].clone() for buffer in self.buffers]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns.last - self.columns.first, self.columns.first + self.columns.chunk_bases[0]

    def get_seq_length(self) -> int:
        return self.columns.last

    def get_max_length(self) -> int:
        return -1


def writable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where torch forbids to write into it: made in inference mode, used outside of it."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def _room(states: Tensor, slots: int, columns: int) -> Tensor:
    # Zeros, not whatever lies in memory: a masked column has weight 0, and 0 times NaN is NaN.
    return states.new_zeros(slots, states.shape[1], columns, states.shape[3])


def _grown(buffer: Tensor, slots: int, columns: int) -> Tensor:
    grown = _room(buffer, slots, columns)
    grown[: buffer.shape[0], :, : buffer.shape[2]] = buffer
    return grown
