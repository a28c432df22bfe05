"""The tokens of a batch so far: what an expert that was not selected for a while has to catch up on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .columns import Chunk, writable

_FIRST_COLUMNS = 64


class TokenHistory:
    """Token ids and rotary positions of every row, padding left out, and the padding mask as the router saw it.

    ``lengths`` (real tokens per row) is kept on the host, so that planning a step never waits for the device.
    """

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.lengths = [0] * batch_size
        # [ids or positions, row, place]; the last column takes what padding would write.
        self._tokens = torch.zeros(2, batch_size, _FIRST_COLUMNS, dtype=torch.int64, device=device)
        # As the router sees them, padding included: [B, T] each.
        self.ids = torch.zeros(batch_size, 0, dtype=torch.int64, device=device)
        self.positions = torch.zeros(batch_size, 0, dtype=torch.int64, device=device)
        self.mask = torch.zeros(batch_size, 0, dtype=torch.bool, device=device)

    @property
    def columns(self) -> int:
        """T, padding included."""
        return self.ids.shape[1]

    def append(self, ids: Tensor, positions: Tensor, mask: Tensor, counts: Sequence[int]) -> None:
        """Add columns: ids and positions ``[B, S]`` int64, mask ``[B, S]`` bool, and the mask's sum per row."""
        self.ids = torch.cat([self.ids, ids], dim=1)
        self.positions = torch.cat([self.positions, positions], dim=1)
        self.mask = torch.cat([self.mask, mask], dim=1)
        self._write(ids, positions, mask, counts)

    def remask(self, mask: Tensor) -> list[int]:
        """Let ``mask``, ``[B, T]`` bool, say what is padding; returns how many of each row's first tokens stay."""
        same = (mask == self.mask).long().cumprod(1).bool()
        kept: list[int] = (self.mask & same).sum(1).tolist()
        self.mask = mask
        self.lengths = [0] * len(kept)
        self._write(self.ids, self.positions, mask, mask.sum(1).tolist())
        return kept

    def _write(self, ids: Tensor, positions: Tensor, mask: Tensor, counts: Sequence[int]) -> None:
        """Put the real tokens of some columns behind each row's last one."""
        room = self._tokens.shape[2] - 1
        needed = max(length + count for length, count in zip(self.lengths, counts, strict=True))
        if needed > room:
            more = max(needed - room, room // 2)
            self._tokens = torch.nn.functional.pad(self._tokens, (0, more))
        self._tokens = writable(self._tokens)
        trash = self._tokens.shape[2] - 1
        first = torch.tensor(self.lengths, device=ids.device)[:, None]
        places = torch.where(mask, first + mask.cumsum(1) - 1, trash)
        self._tokens.scatter_(2, places.expand(2, -1, -1), torch.stack([ids, positions]))
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
        index = torch.tensor(list(rows), device=self.ids.device)
        self.lengths = [self.lengths[row] for row in rows]
        self._tokens = self._tokens[:, index]
        self.ids, self.positions, self.mask = self.ids[index], self.positions[index], self.mask[index]

    def crop(self, columns: int) -> None:
        """Remove the last ``columns`` columns."""
        if columns == 0:
            return
        removed = self.mask[:, -columns:].sum(1).tolist()
        self.lengths = [length - count for length, count in zip(self.lengths, removed, strict=True)]
        self.ids, self.positions = self.ids[:, :-columns], self.positions[:, :-columns]
        self.mask = self.mask[:, :-columns]
