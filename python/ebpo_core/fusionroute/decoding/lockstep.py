"""The texts of a batch whose rows are written at paces of their own, and shown as if they were written together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.generation.stopping_criteria import EosTokenCriteria


class Text:
    """The texts of a batch. Rows run ahead of each other, and are shown column by column, as without drafts.

    So streamers, stopping criteria and traces see what they see without, and what a row wrote beyond its stop is
    dropped.

    Args:
        input_ids: the prompts, ``[B, P]``.
        criteria, config, streamer: as in ``GenerationMixin._sample``.
        record: the :class:`~.recorder.RoutingRecorder` of the call and the columns before the prompts', or None.

    Attributes:
        tokens: ``[B, max_length]`` int64, of which ``lengths[b]`` are row b's and ``shown`` are shown.
        prompt: P.
        filled: the column from which on each row is filled up, since it has ended; max_length where it has not.
        routes: the expert that wrote each token, shaped like ``tokens``; -1 where that is not known.
        records: True if shares and argmaxes are recorded too.
    """

    def __init__(self, input_ids: Tensor, criteria: Any, config: Any, streamer: Any, record: Any) -> None:
        B, self.prompt = input_ids.shape
        self.tokens = pad(input_ids, (0, config.max_length - self.prompt))
        self.lengths = [self.prompt] * B
        self.shown = self.prompt
        self.filled = [config.max_length] * B
        self.routes = torch.full_like(self.tokens, -1)
        self._share, self._own = torch.zeros(self.tokens.shape, device=input_ids.device), self.routes.clone()
        self._criteria, self._streamer, self._record = criteria, streamer, record
        self._pad = config._pad_token_tensor
        # transformers fills rows up with padding where any criterion has this attribute; what it means in another's
        # class, only that class knows.
        self._fills = any(hasattr(each, "eos_token_id") for each in criteria)
        ends = [each.eos_token_id for each in criteria if type(each) is EosTokenCriteria]
        self._ends = torch.cat([end.flatten().to(input_ids.device) for end in ends]) if ends else None
        self._limit = config.max_length
        self.records = record is not None
        self._running = torch.ones(B, dtype=torch.bool, device=input_ids.device)
        self._on = [True] * B  # `_running`, or all rows where none is filled up
        self._ended = [False] * B

    def room(self) -> list[int]:
        """How many tokens each row may still write; 0 for rows that rest."""
        rows = zip(self._on, self._ended, self.lengths, strict=True)
        return [self._limit - length if on and not ended else 0 for on, ended, length in rows]

    def last(self) -> Tensor:
        """Each row's last token, ``[B, 1]``."""
        return self.tokens.gather(1, torch.tensor(self.lengths, device=self.tokens.device)[:, None] - 1)

    @property
    def may_end(self) -> bool:
        """True if there are end tokens."""
        return self._ends is not None

    def ends_at(self, tokens: Tensor) -> Tensor:
        """Where ``tokens`` are end tokens: bool of their shape."""
        if self._ends is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        return torch.isin(tokens, self._ends.to(tokens.device))

    def up_to_the_end(self, tokens: Tensor) -> Tensor:
        """How many of each row's tokens, ``[B, K]``, there are up to and with the first end token; ``[B]`` int64."""
        ends = self.ends_at(tokens).long()
        return (ends.cumsum(1) - ends == 0).sum(1)

    def add(self, tokens: Tensor, counts: Sequence[int], *routing: Tensor) -> None:
        """Append the first ``counts[b]`` tokens of each row, with the experts that wrote them, shares and argmaxes.

        ``[B, K]`` each; the routing of what nobody records may be left out from the right.
        """
        last = torch.tensor(counts, device=tokens.device)[:, None] - 1
        ended = (self.ends_at(tokens).gather(1, last.clamp(min=0)) & (last >= 0))[:, 0].tolist()
        for row, count in enumerate(counts):
            at = slice(self.lengths[row], self.lengths[row] + count)
            self.tokens[row, at] = tokens[row, :count]
            for store, values in zip((self.routes, self._share, self._own), routing, strict=False):
                store[row, at] = values[row, :count]
            self.lengths[row] += count
            self._ended[row] |= ended[row]

    def show(self) -> bool:
        """Show the columns that all running rows have reached; True once no row is left running."""
        while all(not on or length > self.shown for on, length in zip(self._on, self.lengths, strict=True)):
            column = self.tokens[:, self.shown].clone()  # of its own: who is shown it may keep it
            if self._fills and not all(self._on):
                column = torch.where(self._running, column, self._pad.to(column.device))
                self.tokens[:, self.shown] = column
            if self._streamer is not None:
                self._streamer.put(column.cpu())
            if self._record is not None and self.shown > self.prompt:  # the prompt's forward recorded the first
                recorder, past = self._record
                stores = (self.routes, self._share, self._own)
                recorder.add(past + self.shown, *(store[:, self.shown : self.shown + 1] for store in stores))
            self.shown += 1
            seen = self.tokens[:, : self.shown].clone(memory_format=torch.contiguous_format)
            self._running = self._running & ~self._criteria(seen, None)
            running = self._running.tolist()
            if self._fills:
                self.filled = [at if on else min(at, self.shown) for at, on in zip(self.filled, running, strict=True)]
                self._on = running
            if not any(running):
                return True
        return False
