"""The guard as vLLM's first runner of models asks for it: told of every change of the batch, row by row."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from .counters import Counts
from .guard import STEP, Guard, Selections, guards_by_name


class _Row:
    """One request in the batch: its tokens, which vLLM appends to, and a selection whose token is not known yet."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.length = 0
        self.pending: tuple[Selections, int] | None = None

    def settle(self, counts: Counts | None) -> None:
        """Count the pending selection if its token was kept: that of a chunk of a prompt, for one, is thrown away."""
        pending, self.pending = self.pending, None
        if pending is None or counts is None or len(self.tokens) <= self.length:
            return
        token = self.tokens[self.length]
        if token >= 0:  # -1 stands for one that an asynchronous engine has not brought back
            expert, own = pending[0].of(pending[1])
            counts.add(expert, overruled=token != own)


class RoutingGuard(Guard, LogitsProcessor):  # type: ignore[misc]
    """The first runner's logits processor of a served FusionRoute model; its subclasses know their vocabulary."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        del device, is_pin_memory
        self._counts = self.counts(vllm_config)
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        """False: greedy decoding must not see the extra ids either."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests as they join, leave and move in the batch."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._leave(self._rows.pop(index, None))
        for index, _params, _prompt, tokens in batch_update.added:
            self._leave(self._rows.pop(index, None))
            self._rows[index] = _Row(tokens)
        for source, target, direction in batch_update.moved:
            row, other = self._rows.pop(source, None), self._rows.pop(target, None)
            if row is not None:
                self._rows[target] = row
            if other is not None:
                if direction == MoveDirectionality.SWAP:
                    self._rows[source] = other
                else:
                    self._leave(other)

    def apply(self, logits: Tensor) -> Tensor:
        """Mask the extra columns of ``[rows, V + n + 2]``, in place."""
        selections = STEP.selections
        for index, row in self._rows.items():
            row.settle(self._counts)
            if selections is not None and index < selections.rows == len(logits):
                row.length, row.pending = len(row.tokens), (selections, index)
        logits[:, self.vocab_size :] = -math.inf
        return logits

    def _leave(self, row: _Row | None) -> None:
        if row is not None:
            row.settle(self._counts)


__getattr__, __dir__ = guards_by_name(RoutingGuard, globals())
