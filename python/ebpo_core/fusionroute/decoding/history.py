"""The tokens of a batch so far: what an expert that was not selected for a while has to catch up on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .columns import Chunk, writable

_FIRST_COLUMNS = 64


class NewTokens(NamedTuple):
    """Tokens of one forward: S columns behind those of the cache, T in all.

    Attributes:
        ids: ``[B, S]`` int64.
        positions: rotary positions, ``[B, S]`` int64.
        mask: of all columns, ``[B, T]`` bool, False at padding.
        seen: of the cache's columns, ``[B, T - S]``: what it holds may become padding.
        real: of the new columns, ``[B, S]``.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    seen: Tensor
    real: Tensor


def new_tokens(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, state: Any) -> NewTokens:
    """The columns of one forward behind those of ``state``, a cache or None, with what is not given filled in."""
    B, S = input_ids.shape
    past = 0 if state is None else state.columns
    if attention_mask is None:
        mask = torch.ones_like(input_ids, dtype=torch.bool)
        mask = mask if state is None else state.mask_of(mask)
    elif attention_mask.ndim != 2:
        raise ValueError(f"attention_mask has {attention_mask.ndim} dimensions: pass [B, T] with 0 at padding")
    elif attention_mask.shape != (B, past + S):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}: pass [{B}, {past + S}], "
            f"{past} columns of the cache and {S} of input_ids"
        )
    else:
        mask = attention_mask.to(torch.bool, copy=True)  # the cache keeps it
    if position_ids is None:
        position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
    return NewTokens(input_ids, position_ids.expand(B, S), mask, seen=mask[:, :past], real=mask[:, past:])


class TokenHistory:
    """Token ids and rotary positions of every row, padding left out, and the columns as the router saw them.

    ``lengths`` (real tokens per row) is kept on the host, so that planning a step never waits for the device.
    """

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.lengths = [0] * batch_size
        # [ids or positions, row, place]; the last column takes what padding would write.
        self._tokens = torch.zeros(2, batch_size, _FIRST_COLUMNS, dtype=torch.int64, device=device)
        # As the router sees them, padding included: [ids, positions or selected experts, B, T], and the mask [B, T].
        self._columns = torch.zeros(3, batch_size, 0, dtype=torch.int64, device=device)
        self.mask = torch.zeros(batch_size, 0, dtype=torch.bool, device=device)

    @property
    def columns(self) -> int:
        """T, padding included."""
        return self.mask.shape[1]

    @property
    def facts(self) -> Tensor:
        """Ids, rotary positions and selected experts as the router saw them, ``[3, B, T]`` int64."""
        return self._columns

    @property
    def ids(self) -> Tensor:
        """Token ids as the router saw them, ``[B, T]``."""
        return self._columns[0]

    @property
    def positions(self) -> Tensor:
        """Rotary positions as the router saw them, ``[B, T]``."""
        return self._columns[1]

    def append(self, new: NewTokens, selected: Tensor, counts: Sequence[int]) -> None:
        """Add S columns.

        Args:
            new: the tokens; where their mask changes earlier columns, :meth:`remask` came first.
            selected: experts of the last columns, ``[B, S]`` or fewer.
            counts: real tokens among the columns, per row.
        """
        unknown = new.ids.shape[1] - selected.shape[1]
        if unknown:
            selected = torch.nn.functional.pad(selected, (unknown, 0), value=-1)
        columns = torch.stack([new.ids, new.positions, selected])
        self._columns = torch.cat([self._columns, columns], dim=2)
        self.mask = new.mask
        self._write(columns[:2], new.real, counts)

    def last_selected(self, mask: Tensor) -> Tensor:
        """The expert of each row's last real column, ``[B]`` int64; -1 where there is none.

        Args:
            mask: of the columns so far, ``[B, T]`` bool, which may know of more padding than :attr:`mask`.
        """
        columns = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, columns, -1).amax(1, keepdim=True)
        return torch.where(last < 0, -1, self._columns[2].gather(1, last.clamp(min=0)))[:, 0]

    def remask(self, mask: Tensor) -> list[int]:
        """Let ``mask``, ``[B, T]`` bool, say what is padding; returns how many of each row's first tokens stay."""
        same = (mask == self.mask).long().cumprod(1).bool()
        kept: list[int] = (self.mask & same).sum(1).tolist()
        self.mask = mask
        self.lengths = [0] * len(kept)
        self._write(self._columns[:2], mask, mask.sum(1).tolist())
        return kept

    def _write(self, columns: Tensor, mask: Tensor, counts: Sequence[int]) -> None:
        """Put the real tokens of some columns, ids and positions ``[2, B, S]``, behind each row's last one."""
        room = self._tokens.shape[2] - 1
        needed = max(length + count for length, count in zip(self.lengths, counts, strict=True))
        if needed > room:
            more = max(needed - room, room // 2)
            self._tokens = torch.nn.functional.pad(self._tokens, (0, more))
        self._tokens = writable(self._tokens)
        trash = self._tokens.shape[2] - 1
        first = torch.tensor(self.lengths, device=mask.device)[:, None]
        places = torch.where(mask, first + mask.cumsum(1) - 1, trash)
        self._tokens.scatter_(2, places.expand(2, -1, -1), columns)
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def gather(self, chunk: Chunk, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, rotary positions and places of a chunk, ``[rows, longest]`` each, aligned at the right end.

        A row with fewer tokens starts with copies of its first one: valid queries whose results nobody stores.
        """
        width = chunk.longest
        where = self._tokens.device
        starts = torch.tensor(chunk.starts, device=where)[:, None]
        ends = torch.tensor(chunk.ends, device=where)[:, None]
        places = torch.maximum(ends - width + torch.arange(width, device=where), starts)
        rows = torch.tensor(chunk.rows, device=where)[:, None]
        ids, positions = self._tokens[:, rows, places].unbind(0)
        return ids.to(device), positions.to(device), places.to(device)

    def take(self, rows: Sequence[int]) -> None:
        """Let the batch be ``rows`` of what it was."""
        index = torch.tensor(list(rows), device=self.mask.device)
        self.lengths = [self.lengths[row] for row in rows]
        self._tokens = self._tokens[:, index]
        self._columns, self.mask = self._columns[:, index], self.mask[index]

    def crop(self, columns: int) -> None:
        """Remove the last ``columns`` columns."""
        if columns == 0:
            return
        removed = self.mask[:, -columns:].sum(1).tolist()
        self.lengths = [length - count for length, count in zip(self.lengths, removed, strict=True)]
        self._columns, self.mask = self._columns[..., :-columns], self.mask[:, :-columns]

    def realign(self, removed: Sequence[int], columns: int) -> None:
        """Remove the last ``removed[b]`` columns of row b; what is left stands at the right end of ``columns``."""
        counts = torch.tensor(list(removed), device=self.mask.device)[:, None]
        T = self.columns
        gone = self.mask & (torch.arange(T, device=self.mask.device) >= T - counts)
        self.lengths = [length - count for length, count in zip(self.lengths, gone.sum(1).tolist(), strict=True)]
        places = torch.arange(T - columns, T, device=self.mask.device) - counts
        self.mask = self.mask.gather(1, places.clamp(min=0)) & (places >= 0)
        self._columns = self._columns.gather(2, places.clamp(min=0).expand(3, -1, -1))
