"""Collects the routing of a call of ``generate`` and turns it into traces of the returned sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteriaList

from ebpo_core.fusionroute.traces.trace import RoutingTrace


class RoutingRecorder:
    """The experts selected, by column; a column that is run again (after a rejected draft) replaces the old.

    The record at a column decides the token of the next one.
    """

    def __init__(self) -> None:
        self._columns: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.end_tokens: Tensor | None = None  # ids, 1-D
        self._ends: Tensor | None = None  # tokens of each row, prompt included, when it was stopped; -1: not yet

    def watching(self, criteria: StoppingCriteriaList) -> StoppingCriteriaList:
        """The same criteria, which tell this recorder the step in which each row ends."""
        return _Watched(criteria, self)

    def stopped(self, tokens: int, done: Tensor) -> None:
        """``done``, ``[B]`` bool, is what the criteria said of rows of so many tokens, prompt and padding included."""
        ends = torch.full(done.shape, -1, device=done.device) if self._ends is None else self._ends
        self._ends = torch.where((ends < 0) & done, tokens, ends)

    def add(self, end: int, ids: Tensor, share: Tensor, own: Tensor) -> None:
        """The last K columns before ``end``: expert ids, their softmax weight, their own argmax; ``[B, K]`` each."""
        for k in range(ids.shape[1]):
            self._columns[end - ids.shape[1] + k] = (ids[:, k], share[:, k], own[:, k])

    def traces(self, names: Sequence[str], result: Any, prompt_length: int, first: int) -> list[RoutingTrace]:
        """One trace per sequence of ``result``, up to and with the token at which it was stopped.

        Args:
            names: of the experts.
            result: what transformers returned: ``sequences``, and ``beam_indices`` after a beam search.
            prompt_length: tokens of ``sequences`` that are not new.
            first: the column that decides the first new token.
        """
        new = result.sequences[:, prompt_length:].cpu()
        records = [self._columns[first + step] for step in range(new.shape[1])]
        ids, share, own = (torch.stack(column, dim=1).cpu() for column in zip(*records, strict=True))
        beams = result.get("beam_indices")
        ends = [] if self.end_tokens is None else self.end_tokens.tolist()
        stops = None if self._ends is None else self._ends.tolist()
        traces = []
        for row, tokens in enumerate(new.tolist()):
            stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
            if stops is not None and stops[row] >= 0:
                stop = min(stop, stops[row] - prompt_length)
            # The row each token was written in; a finished beam is filled up with -1.
            at = torch.full((stop,), row) if beams is None else beams[row, :stop].cpu()
            stop = min(stop, int((at >= 0).sum()))
            at, step, written = at[:stop], torch.arange(stop), new[row, :stop]
            traces.append(
                RoutingTrace.from_columns(names, written, ids[at, step], share[at, step], written != own[at, step])
            )
        return traces


class _Watched(StoppingCriteriaList):
    """Stopping criteria that tell a recorder what they answer."""

    def __init__(self, criteria: StoppingCriteriaList, recorder: RoutingRecorder) -> None:
        super().__init__(criteria)
        self._recorder = recorder

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        done = super().__call__(input_ids, scores, **kwargs)
        self._recorder.stopped(input_ids.shape[1], done)
        return done
