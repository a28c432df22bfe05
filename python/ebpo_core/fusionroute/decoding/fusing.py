"""The experts' logits of one forward, where each of them lies, and their sum with the router's."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ebpo_core.fusionroute.experts.expert import Expert

from .cache import FusionRouteCache
from .history import NewTokens


class Part(NamedTuple):
    """Logits of one expert, or of all, ``[m, V_expert]``: line i is of position ``positions[i]`` of row ``rows[i]``.

    Rows are in ascending order. All K positions are numbered from 0.
    """

    rows: Tensor
    positions: Tensor
    logits: Tensor


@dataclass(frozen=True)
class ExpertLogits:
    """The experts' logits at K positions of a batch, each expert's only where it was selected.

    Attributes:
        parts: one per expert, in their order; or one for all of them, where compiled experts run together.
        positions: K.
    """

    parts: tuple[Part, ...]
    positions: int

    def at_last(self, rows: int) -> Tensor | list[Tensor]:
        """Logits of the last position, in a form that the kernels take.

        Args:
            rows: how many rows of the batch selected an expert there.

        Returns:
            ``[rows, V]`` if all of them selected one expert, or the experts ran together; else n tensors,
            ``[rows that selected it, V_i]`` each.
        """
        last = [
            part.logits if self.positions == 1 else part.logits[part.positions == self.positions - 1]
            for part in self.parts
        ]
        return next((logits for logits in last if len(logits) == rows), last)

    def argmax(self, like: Tensor, vocab_size: int) -> Tensor:
        """Each position's selected expert's own token below V, shaped like ``like``, ``[B, K]`` int64; -1 for none."""
        own = torch.full_like(like, -1)
        for part in self.parts:
            own[part.rows, part.positions] = part.logits[:, :vocab_size].argmax(-1)
        return own

    def added_to(self, router: Tensor, alpha: float, complementary: bool) -> Tensor:
        """``router + alpha * expert``, ``[B, K, V]`` in float32 or wider: the product is rounded, then the sum.

        The same arithmetic as the kernels', so that a greedy token does not depend on which of the two was used.
        Without ``complementary`` the expert's logits alone. Where no expert was selected, the router's. An expert's
        minus infinity, a token it cannot write, stays that; with ``alpha=0`` it counts as little as all others.
        """
        dtype = torch.promote_types(router.dtype, torch.float32)
        fused = router.to(dtype, copy=True)
        V = router.shape[-1]
        for part in self.parts:
            if len(part.rows):
                where = (part.rows.to(fused.device), part.positions.to(fused.device))
                chosen = part.logits[:, :V].to(dtype)
                if not complementary:
                    fused[where] = chosen
                    continue
                scaled = chosen * alpha
                if alpha <= 0:
                    scaled = scaled.masked_fill(chosen.isneginf(), -math.inf if alpha else 0.0)
                fused[where] = fused[where] + scaled
        return fused


def lazy_logits(
    experts: Iterable[Expert], state: FusionRouteCache, wanted: list[list[int]], device: torch.device
) -> ExpertLogits:
    """The experts' logits through the cache: an expert runs on the rows that selected it at any of the last K columns.

    Args:
        experts: the model's experts.
        state: whose history already holds the new tokens.
        wanted: expert ids of the last K columns, per row; -1 for none.
        device: of the result.
    """
    K = len(wanted[0])
    parts = []
    for index, expert in enumerate(experts):
        columns = {row: [k for k in range(K) if ids[k] == index] for row, ids in enumerate(wanted)}
        rows = [row for row, ks in columns.items() if ks]
        if not rows:
            parts.append(_nothing(expert, device))
            continue
        # A row runs up to the last column that it wants, and keeps logits from the first on.
        places = state.places(rows, K)
        ends = [at[columns[row][-1]] + 1 for row, at in zip(rows, places, strict=True)]
        keep = max(end - at[columns[row][0]] for row, at, end in zip(rows, places, ends, strict=True))
        logits = state.run(index, rows, ends, keep)  # [rows, keep, V_expert], aligned at the right end
        # (row of logits, column of logits counted from the right, row of the batch, position)
        cells = [
            (i, at[k] - end, row, k)
            for i, (row, at, end) in enumerate(zip(rows, places, ends, strict=True))
            for k in columns[row]
        ]
        line, back, batch_row, position = (list(column) for column in zip(*cells, strict=True))
        picked = logits[:, -1] if K == 1 else logits[line, back]
        parts.append(Part(torch.tensor(batch_row), torch.tensor(position), picked.to(device)))
    return ExpertLogits(tuple(parts), K)


def full_logits(
    experts: Iterable[Expert],
    ids: Tensor,
    new: NewTokens,
    attention_mask: Tensor | None,
    logits_to_keep: int | Tensor,
) -> ExpertLogits:
    """The experts' logits without a cache: an expert reads whole sequences of the rows that selected it somewhere.

    Args:
        experts: the model's experts.
        ids: of the experts at the K positions, ``[B, K]``; -1 for none.
        new: the tokens, S columns.
        attention_mask: as it was given to ``forward``.
        logits_to_keep: as it was given to ``forward``: which of the S positions are the K.
    """
    parts = []
    for index, expert in enumerate(experts):
        rows, positions = (ids == index).nonzero(as_tuple=True)
        if not len(rows):
            parts.append(_nothing(expert, ids.device))
            continue
        needed, place = rows.unique(return_inverse=True)
        device = expert.device
        keep = logits_to_keep if isinstance(logits_to_keep, int) else logits_to_keep.to(device)
        logits = expert(
            input_ids=new.ids[needed].to(device),
            attention_mask=None if attention_mask is None else attention_mask[needed].to(device),
            position_ids=new.positions[needed].to(device),
            use_cache=False,
            logits_to_keep=keep,
        ).logits  # [rows needed, K, V_expert]
        parts.append(Part(rows, positions, logits[place.to(device), positions.to(device)].to(ids.device)))
    return ExpertLogits(tuple(parts), ids.shape[1])


def _nothing(expert: Expert, device: torch.device) -> Part:
    none = torch.empty(0, dtype=torch.int64)
    return Part(none, none, torch.empty(0, expert.vocab_size, dtype=expert.model.dtype, device=device))
