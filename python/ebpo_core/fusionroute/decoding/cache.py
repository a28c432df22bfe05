"""The state of one call of ``generate``: the router's cache, each expert's lazy cache, and the tokens so far.

It stands where transformers expects a cache, so ``generate`` reorders, repeats, crops and returns it like any other,
and a later call continues from it. Nothing of a call lives in the model: calls may run side by side.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ebpo_core.fusionroute.experts.expert import Expert

from .history import NewTokens, TokenHistory
from .lazy import lazy_expert


class FusionRouteCache(Cache):
    """Made by ``generate`` (or by ``forward`` with ``use_cache=True``); pass it on to continue a conversation.

    Args:
        router: the router's own cache, of any kind transformers offers.
        experts: the model's experts.

    Attributes:
        budget: bytes the experts' caches may take together, or None.
    """

    def __init__(self, router: Cache, experts: Sequence[Expert]) -> None:
        self.router = router
        self.budget: int | None = None
        self._experts = list(experts)
        self.states: list[Any] = []
        self.history: TokenHistory | None = None
        self._used: list[int] = []  # the step in which each expert last ran
        self._step = 0
        # What DynamicCache has and transformers' loops look at.
        self.layer_class_to_replicate = None
        self.offloading = False

    # ---------------------------------------------------------------------------------------------------- one step

    def append(self, new: NewTokens, selected: Tensor, wanted: Tensor) -> list[list[int]]:
        """Take new columns into the history.

        A mask of the earlier columns that is not the one they came with is taken over. So it is when a conversation
        goes on after a batch whose rows ended early: what ``generate`` filled them up with was no padding then, and is
        now. Experts read changed rows anew from their first difference.

        Args:
            new: the tokens.
            selected: experts of the last columns, ``[B, S]`` or fewer.
            wanted: experts whose logits are asked for at the last K columns, ``[B, K]``; -1 for none.

        Returns:
            ``wanted`` as lists, one per row.
        """
        if self.history is None:
            self.history = TokenHistory(len(new.ids), new.ids.device)
            self.states = [lazy_expert(expert, len(new.ids)) for expert in self._experts]
            self._used = [0] * len(self.states)
        # The one wait for the device in a step: which experts run is decided on the host.
        facts = torch.stack([new.real.sum(1), (new.seen != self.history.mask).any(1)], dim=1)
        *columns, counts, remasked = torch.cat([wanted, facts], dim=1).T.tolist()
        if any(remasked):
            kept = self.history.remask(new.seen)
            for state in self.states:
                state.keep(kept)
        self.history.append(new, selected, counts)
        self._step += 1
        return [list(row) for row in zip(*columns, strict=True)]

    def last_selected(self, mask: Tensor) -> Tensor | None:
        """The expert of each row's last real column, ``[B]``; see :meth:`TokenHistory.last_selected`."""
        return None if self.history is None or not self.history.columns else self.history.last_selected(mask)

    @property
    def facts(self) -> tuple[Tensor, Tensor]:
        """Ids, positions and selected experts of the columns held, ``[3, B, T]`` int64, and their mask, ``[B, T]``."""
        return self._tokens.facts, self._tokens.mask

    @property
    def columns(self) -> int:
        """Columns held, padding included."""
        return 0 if self.history is None else self.history.columns

    def mask_of(self, new_columns: Tensor) -> Tensor:
        """The mask of all columns, ``[B, T]`` bool, from that of the new ones, ``[B, S]``."""
        return new_columns if self.history is None else torch.cat([self.history.mask, new_columns], dim=1)

    def check_rows(self, rows: int) -> None:
        """Raise a ValueError unless the cache is empty or holds so many rows."""
        held = rows if self.history is None else len(self.history.lengths)
        if rows != held:
            raise ValueError(
                f"input_ids has {rows} rows, the cache holds {held}: go on with as many rows, or select rows of the "
                "cache first (batch_select_indices)"
            )

    def check_experts(self, experts: Sequence[Expert]) -> None:
        """Raise a ValueError for a model whose experts with caches are not those that this was made for, by name."""
        ours, theirs = ([expert.name for expert in group] for group in (self._experts, experts))
        if ours != theirs:
            raise ValueError(
                f"the cache is of a model whose experts have caches {ours}, this model's are {theirs} (compiled "
                "ones have none): go on with the model that made it, or without a cache"
            )

    def run(self, expert: int, rows: Sequence[int], ends: Sequence[int], keep: int) -> Tensor:
        """Last logits ``[rows, keep, V]`` of an expert after it has caught up on ``rows`` to ``ends``."""
        self._used[expert] = self._step
        logits: Tensor = self.states[expert].logits(self._tokens, rows, ends, keep)
        self._evict(expert)
        return logits

    @property
    def _tokens(self) -> TokenHistory:
        if self.history is None:
            raise RuntimeError("the cache holds no tokens: append them first")
        return self.history

    def read_with_the_others(self, wanted: Sequence[Sequence[int]]) -> None:
        """Let every expert read the rows that did not select it; ``wanted`` is what :meth:`append` returned."""
        lengths = self._tokens.lengths
        for expert in range(len(self.states)):
            rows = [row for row, length in enumerate(lengths) if length and expert not in wanted[row]]
            if rows:
                self.run(expert, rows, [lengths[row] for row in rows], 1)

    def places(self, rows: Sequence[int], columns: int) -> list[list[int]]:
        """Places of the last ``columns`` columns in each row, counted from its first real token."""
        lengths, mask = self._tokens.lengths, self._tokens.mask
        if columns == 1:
            return [[lengths[row] - 1] for row in rows]
        mask = mask[torch.tensor(list(rows), device=mask.device), -columns:]
        after = mask.flip(1).cumsum(1).flip(1).tolist()
        return [[lengths[row] - count for count in counts] for row, counts in zip(rows, after, strict=True)]

    def _evict(self, running: int) -> None:
        if self.budget is None:
            return
        others = [i for i, state in enumerate(self.states) if i != running and not state.empty]
        others.sort(key=lambda i: self._used[i])
        while others and self.expert_bytes > self.budget:
            self.states[others.pop(0)].evict()

    @property
    def expert_bytes(self) -> int:
        """Bytes allocated for the experts' keys and values."""
        return sum(state.nbytes for state in self.states)

    @property
    def forwarded(self) -> list[list[int]]:
        """Tokens that went through each expert, per row: ``forwarded[expert][row]``."""
        return [list(state.forwarded) for state in self.states]

    # ------------------------------------------------------------------------------------- what transformers calls

    @property
    def layers(self) -> list[Any]:  # type: ignore[override]
        return self.router.layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.router.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.router.get_mask_sizes(query_length, layer_idx)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.router.get_max_length(layer_idx)

    @property
    def is_compileable(self) -> bool:
        """Never: which experts run is decided on the host."""
        return False

    @property
    def is_initialized(self) -> bool:
        return bool(self.router.is_initialized)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.router.reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._take(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self.router.batch_select_indices(indices)
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self._take(rows.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.router.batch_repeat_interleave(repeats)
        if self.history is not None:
            self._take([row for row in range(len(self.history.lengths)) for _ in range(repeats)])

    def _take(self, rows: list[int]) -> None:
        if self.history is None:
            return
        self.history.take(rows)
        for state in self.states:
            state.take(rows)

    def activate_past_recording(self) -> None:
        """The router's windows must be able to roll back; the experts' always are."""
        self.router.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last columns; like transformers, by a count that is negative or 0."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove is {tokens_to_remove}: pass minus the number of columns to remove")
        self.router.crop(tokens_to_remove)
        if self.history is None or tokens_to_remove == 0:
            return
        self.history.crop(-tokens_to_remove)
        for state in self.states:
            state.shorten(self.history)

    def realign(self, removed: Sequence[int], columns: int) -> None:
        """Remove the last columns of each row, from some more than from others.

        Rows stay aligned at the right end, as a batch padded on the left: no row has a hole among its tokens, which a
        window that counts columns would count too.

        Args:
            removed: how many columns each row loses.
            columns: T afterwards, padding included: as many as the longest row needs, or more.
        """
        if len(set(removed)) == 1 and columns == self.columns - removed[0]:
            self.crop(-removed[0])
            return
        layers: list[Any] = self.layers
        for layer in layers:
            if layer.is_initialized:
                _realign(layer, removed, columns)
        self._tokens.realign(removed, columns)
        for state in self.states:
            state.shorten(self._tokens)

    def rewrite(self, new: NewTokens, selected: Tensor, kept: Sequence[int]) -> None:
        """Let the columns be ``new``, all of them, of which row b's first ``kept[b]`` tokens are held already."""
        for state in self.states:
            state.keep(kept)
        self.history = TokenHistory(len(new.ids), new.ids.device)
        self.history.append(new, selected, new.real.sum(1).tolist())

    def reset(self) -> None:
        """Empty, for a new prompt."""
        self.router.reset()
        self.states, self.history = [], None


def _realign(layer: Any, removed: Sequence[int], columns: int) -> None:
    """:meth:`FusionRouteCache.realign` for a layer of a ``DynamicCache``, which then keeps its window and no more."""
    keep = min(columns, layer.sliding_window - 1) if layer.is_sliding else columns
    held = layer.keys.shape[2]
    counts = torch.tensor(list(removed), device=layer.keys.device)[:, None]
    # What stands left of a row's first token is masked; it only has to be finite.
    places = (torch.arange(held - keep, held, device=layer.keys.device) - counts).clamp(min=0)[:, None, :, None]
    layer.keys, layer.values = (
        states.gather(2, places.expand(-1, states.shape[1], -1, states.shape[3]))
        for states in (layer.keys, layer.values)
    )
    if layer.is_sliding:
        layer.cumulative_length = columns
