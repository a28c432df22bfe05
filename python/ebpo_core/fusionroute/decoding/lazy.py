"""One expert within one call of ``generate``: it runs on the rows that select it and catches up on what they missed."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ebpo_core.fusionroute.compat import CACHE
from ebpo_core.fusionroute.experts.expert import Expert

from .columns import Chunk
from .history import TokenHistory
from .ragged import RaggedCache, windows_of
from .recurrent import ColumnExpert

# What one more forward costs, in tokens: reading the weights again (60 M float32 parameters on two cores took as long
# for 16 tokens as for 2). Rows that lag differently share a forward until the padding would cost more than that.
_FORWARD_IN_TOKENS = {"cpu": 32, "cuda": 128}
# Attention that takes the masks we make; others get rows of equal length only. So do models that are not written for
# exchangeable attention: they make masks of their own, from columns (GPT-Neo's local layers, the biases of Bloom).
_OUR_MASKS = ("sdpa", "eager")


class LazyExpert:
    """An expert of attention layers, row by row.

    ``forwarded[row]`` counts the tokens that went through the expert for the row, ever: after a step that selected the
    expert it equals the row's length, if nothing was evicted or cropped in between.
    """

    def __init__(self, expert: Expert, windows: Sequence[int | None], batch_size: int) -> None:
        config = expert.config
        types = list(getattr(config, "layer_types", None) or [])
        self.expert = expert
        self.explicit = (
            config._attn_implementation in _OUR_MASKS
            and getattr(expert.model, "_supports_attention_backend", False)
            and "chunked_attention" not in types
        )
        # Where transformers makes the masks, all layers keep all columns: then one pair of sizes describes them.
        self._windows = list(windows) if self.explicit else [None] * len(windows)
        # Models that mix windows take one mask for each kind of layer, by name.
        self._kinds = dict(zip(types, self._windows, strict=False)) if len(set(types)) > 1 else None
        self.cache = RaggedCache(self._windows, batch_size)
        self.forwarded = [0] * batch_size
        self.runs: list[int] = []  # length of each chunk that was run, in tokens

    def logits(self, history: TokenHistory, rows: Sequence[int], ends: Sequence[int], keep: int) -> Tensor:
        """Bring ``rows`` up to ``ends`` and return their last logits, ``[rows, keep, V]``, aligned at the right end."""
        # A row has missed the tokens from the end of its cache on; rows that missed about as many share a forward.
        starts = [self.cache.lengths[row] for row in rows]
        parts = [self._run(history, chunk, keep) for chunk in self._split(Chunk(list(rows), starts, list(ends)))]
        if len(parts) == 1:
            return parts[0][1]
        # Forwards of other lengths side by side, aligned at the right end, in the order of `rows`.
        order = torch.tensor([row for part_rows, _ in parts for row in part_rows])
        place = {int(row): i for i, row in enumerate(order)}
        width = max(part.shape[1] for _, part in parts)
        joined = torch.cat([torch.nn.functional.pad(part, (0, 0, width - part.shape[1], 0)) for _, part in parts])
        return joined[[place[row] for row in rows]]

    def _run(self, history: TokenHistory, chunk: Chunk, keep: int) -> tuple[list[int], Tensor]:
        device = self.expert.device
        ids, positions, places = history.gather(chunk, device)  # [rows, longest] each
        cache = self.cache
        cache.begin(chunk)
        out = self.expert(
            input_ids=ids,
            position_ids=positions,
            attention_mask=None if cache.uniform else self._masks(places),
            use_cache=True,
            logits_to_keep=min(keep, chunk.longest),
            **{CACHE: cache},
        )
        cache.finish()
        for row, start, end in zip(*chunk, strict=True):
            self.forwarded[row] += end - start
        self.runs.append(chunk.longest)
        return chunk.rows, out.logits

    def _masks(self, places: Tensor) -> Tensor | dict[str, Tensor]:
        eager = self.expert.config._attn_implementation == "eager"
        dtype = self.expert.model.dtype if eager else None
        if self._kinds is None:
            return self.cache.mask(self._windows[0], places, dtype)
        masks = {window: self.cache.mask(window, places, dtype) for window in set(self._kinds.values())}
        return {kind: masks[window] for kind, window in self._kinds.items()}

    def _split(self, chunk: Chunk) -> list[Chunk]:
        """Parts of a chunk that are worth a forward each."""
        if chunk.uniform:
            return [chunk]
        rows = sorted(zip(*chunk, strict=True), key=lambda row: (row[2] - row[1], row[1]))
        if self.explicit:
            cuts = _cheapest_cuts([end - start for _, start, end in rows], self._forward_cost())
        else:
            cuts = [i for i in range(1, len(rows)) if rows[i][1:] != rows[i - 1][1:]]
        bounds = [0, *cuts, len(rows)]
        # Back in batch order within a part: rows that lie side by side in the cache are read without a copy.
        parts = [sorted(rows[low:high]) for low, high in pairwise(bounds)]
        return [Chunk(*(list(column) for column in zip(*part, strict=True))) for part in parts]

    def _forward_cost(self) -> int:
        return _FORWARD_IN_TOKENS.get(self.expert.device.type, _FORWARD_IN_TOKENS["cuda"])

    def take(self, rows: Sequence[int]) -> None:
        self.cache.take(rows)
        self.forwarded = [self.forwarded[row] for row in rows]

    def shorten(self, history: TokenHistory) -> None:
        """Forget the tokens that the history no longer has."""
        self.keep(history.lengths)

    def keep(self, lengths: Sequence[int]) -> None:
        """Forget all but each row's first tokens."""
        for row, length in enumerate(lengths):
            self.cache.shorten(row, length)

    def evict(self) -> None:
        """Free the cache; the next selection catches up from zero."""
        self.cache = RaggedCache(self._windows, len(self.forwarded))

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes

    @property
    def empty(self) -> bool:
        return not any(self.cache.lengths)


def _cheapest_cuts(lags: list[int], forward: int) -> list[int]:
    """The places to cut rows sorted by lag into forwards, minimising the sum of ``forward + rows * longest lag``."""
    best, cut = [0.0], [0]
    for end in range(1, len(lags) + 1):
        costs = [best[start] + forward + (end - start) * lags[end - 1] for start in range(end)]
        cut.append(min(range(end), key=costs.__getitem__))
        best.append(costs[cut[-1]])
    cuts: list[int] = []
    end = cut[len(lags)]
    while end:
        cuts.append(end)
        end = cut[end]
    return cuts[::-1]


def lazy_expert(expert: Expert, batch_size: int) -> Any:
    """The state of one expert: row by row, or for whole batches where a layer's state is recurrent."""
    windows = windows_of(expert.config)
    return ColumnExpert(expert, batch_size) if windows is None else LazyExpert(expert, windows, batch_size)
