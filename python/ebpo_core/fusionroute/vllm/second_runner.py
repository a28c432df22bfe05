"""The guard as vLLM's second runner of models asks for it: requests have slots, and rows of a step belong to slots."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from .guard import STEP, Guard, Selections, guards_by_name


class _Pending(NamedTuple):
    """Selections of a step whose tokens are not known yet: which rows are kept, and where their tokens will stand."""

    selections: Selections
    rows: list[int]
    slots: Tensor
    places: Tensor


class RoutingGuard(Guard, LogitsProcessor):  # type: ignore[misc]
    """The second runner's logits processor of a served FusionRoute model; its subclasses know their vocabulary.

    The runner does not say when a request leaves, and gives its slot to another one. So a step's tokens are read before
    the next step writes anything: when a request is added, or else when the runner is done with adding.
    """

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._requests = req_states
        self._counts = self.counts(vllm_config)
        self._pending: _Pending | None = None

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """True: no request's logits may go by."""
        del req_idx, sampling_params
        self._settle()
        return True

    def apply_staged_writes(self) -> None:
        """Count the tokens of the last step: the runner calls this in a step without requests, too."""
        self._settle()

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Mask the extra columns of ``[rows, V + n + 2]``, in place."""
        selections = STEP.selections
        slots = ctx.idx_mapping_np
        if self._counts is not None and selections is not None and selections.rows == len(logits) == len(slots):
            lengths = ctx.seq_lens_upper_bound_np[: len(slots)]
            # The runner throws away the tokens of chunks before a prompt's last, by this same comparison.
            kept = np.flatnonzero(lengths >= self._requests.prefill_len.np[slots])
            slots, places = (torch.from_numpy(one[kept].astype(np.int64)) for one in (slots, lengths))
            self._pending = _Pending(selections, kept.tolist(), slots, places)
        logits[:, self.vocab_size :] = -math.inf
        return logits

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None or self._counts is None:
            return
        tokens = self._requests.all_token_ids.gpu[pending.slots, pending.places].tolist()
        for row, token in zip(pending.rows, tokens, strict=True):
            expert, own = pending.selections.of(row)
            self._counts.add(expert, overruled=token != own)


__getattr__, __dir__ = guards_by_name(RoutingGuard, globals())
