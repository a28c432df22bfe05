"""The router's cache while it lends its keys and values to the adapted stream."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


class LendingCache(Cache):
    """Stands before the router's cache for one step: first it takes in, then it lends.

    While the router runs, once or (on drafts) several times, every call reaches its cache, and what each layer's
    attention got to see is held here: of a sliding window that is more than the layer keeps. After :meth:`lend` a
    forward of the last columns sees just that, and writes nothing; the keys and values that it computes are dropped.

    Args:
        router: the router's cache, of any kind transformers offers.
    """

    def __init__(self, router: Cache) -> None:
        self.router = router
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self._offsets: dict[int, int] = {}  # the column of the first key held, of layers that masks are made for
        self._queries = 0  # columns of the adapted forward; 0 while the router runs
        self.layer_class_to_replicate = None
        self.offloading = False

    def lend(self, queries: int) -> LendingCache:
        """Let the next forward be of the last ``queries`` columns, and see what the router saw there."""
        layers = len(self.layers)
        if len(self._held) != layers:
            raise ValueError(
                f"the router's attention used the cache of {len(self._held)} of its {layers} layers: its experts "
                "cannot be compiled; load the checkpoint with compiled=False"
            )
        self._queries = queries
        return self

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._queries:
            return self._held[layer_idx]
        seen = self.router.update(key_states, value_states, layer_idx, *args, **kwargs)
        before = self._held.get(layer_idx)
        if before is not None and self.is_sliding[layer_idx]:
            # The window has moved on since the first column of this step, which will ask for what it saw.
            new = (key_states, value_states)
            self._held[layer_idx] = tuple(torch.cat(pair, dim=-2) for pair in zip(before, new, strict=True))  # type: ignore[assignment]
        else:
            self._held[layer_idx] = seen
        return seen

    # ---------------------------------------------------------------------------- what transformers asks for its masks

    @property
    def layers(self) -> list[Any]:  # type: ignore[override]
        return self.router.layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.router.get_seq_length(layer_idx) - self._queries

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if self._queries:
            return self._held[layer_idx][0].shape[-2], self._offsets[layer_idx]
        length, offset = self.router.get_mask_sizes(query_length, layer_idx)
        self._offsets.setdefault(layer_idx, offset)
        return length, offset

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.router.get_max_length(layer_idx)

    @property
    def is_compileable(self) -> bool:
        """The router's answer, by which transformers masks what a static cache has not been filled with."""
        return bool(self.router.is_compileable)

    @property
    def is_initialized(self) -> bool:
        return bool(self.router.is_initialized)
