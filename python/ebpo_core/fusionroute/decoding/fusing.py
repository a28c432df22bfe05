"""The experts' logits of one forward, and their sum with the router's."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ebpo_core.fusionroute.experts.expert import Expert

from .cache import FusionRouteCache


class Part(NamedTuple):
    """Logits of one expert, ``[m, V_expert]``: line i belongs to position ``positions[i]`` of row ``rows[i]``."""

    rows: Tensor
    positions: Tensor
    logits: Tensor


def lazy_parts(experts: Sequence[Expert], state: FusionRouteCache, chosen: list[list[int]]) -> list[Part]:
    """One part per expert, through the cache: an expert runs on the rows that chose it at any of the last K columns.

    Args:
        experts: the model's experts.
        state: whose history already holds the new tokens.
        chosen: expert ids of the last K columns, per row; -1 for none.
    """
    K = len(chosen[0])
    parts = []
    for index, expert in enumerate(experts):
        wanted = {row: [k for k in range(K) if ids[k] == index] for row, ids in enumerate(chosen)}
        rows = [row for row, positions in wanted.items() if positions]
        if not rows:
            parts.append(_nothing(expert))
            continue
        places = state.places(rows, K)
        ends = [at[wanted[row][-1]] + 1 for row, at in zip(rows, places, strict=True)]
        keep = max(end - at[wanted[row][0]] for row, at, end in zip(rows, places, ends, strict=True))
        logits = state.run(index, rows, ends, keep)
        # (row of logits, column of logits counted from the right, row of the batch, position)
        cells = [
            (i, at[k] - end, row, k)
            for i, (row, at, end) in enumerate(zip(rows, places, ends, strict=True))
            for k in wanted[row]
        ]
        line, back, batch_row, position = (list(column) for column in zip(*cells, strict=True))
        picked = logits[:, -1] if K == 1 else logits[line, back]
        parts.append(Part(torch.tensor(batch_row), torch.tensor(position), picked))
    return parts


def full_parts(
    experts: Sequence[Expert],
    ids: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    logits_to_keep: int | Tensor,
) -> list[Part]:
    """One part per expert, without a cache: whole sequences of the rows that chose it somewhere."""
    parts = []
    for index, expert in enumerate(experts):
        rows, positions = (ids == index).nonzero(as_tuple=True)
        if not len(rows):
            parts.append(_nothing(expert))
            continue
        needed, place = rows.unique(return_inverse=True)
        device = expert.device
        keep = logits_to_keep if isinstance(logits_to_keep, int) else logits_to_keep.to(device)
        logits = expert(
            input_ids=input_ids[needed].to(device),
            attention_mask=None if attention_mask is None else attention_mask[needed].to(device),
            position_ids=position_ids[needed].to(device),
            use_cache=False,
            logits_to_keep=keep,
        ).logits
        parts.append(Part(rows, positions, logits[place.to(device), positions.to(device)]))
    return parts


def fuse_parts(router: Tensor, parts: Sequence[Part], alpha: float, complementary: bool) -> Tensor:
    """``router + alpha * expert``, ``[B, K, V]`` in float32 or wider: the product is rounded, then the sum.

    The same arithmetic as the kernels', so that a greedy token does not depend on which of the two was used. Without
    ``complementary`` the expert's logits alone.
    """
    dtype = torch.promote_types(router.dtype, torch.float32)
    fused = router.to(dtype, copy=True)
    V = router.shape[-1]
    for part in parts:
        if len(part.rows):
            where = (part.rows.to(fused.device), part.positions.to(fused.device))
            chosen = part.logits[:, :V].to(dtype)
            fused[where] = fused[where] + chosen * alpha if complementary else chosen
    return fused


def _nothing(expert: Expert) -> Part:
    none = torch.empty(0, dtype=torch.int64)
    return Part(none, none, torch.empty(0, expert.vocab_size, dtype=expert.model.dtype, device=expert.device))
