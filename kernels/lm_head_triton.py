"""Triton kernel of the fused LM heads: two matrix products per tile of the vocabulary, added and compared in registers.

Rows are grouped by expert. A program takes one tile of the vocabulary, one expert, and up to ``ROWS`` of the rows that
selected it; the programs that share a tile of the router's head are neighbours in the grid, so that its second reader
finds it in the L2 cache. Programs without rows return at once, which keeps the grid static.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Tile
from .tiles import _NO_INDEX, _OUTSIDE_KEY, finish, score_key

_TILE = Tile(64, 4)  # tokens per program: two float32 accumulators leave room for no more
_ROWS = 16  # the smallest side of a matrix unit
_DEPTH_BYTES = 128  # of a hidden state, per step of the product; more spills


class Heads(NamedTuple):
    """Hidden states and the LM heads that read them, one or several; strides in elements."""

    hidden: Tensor  # [B, D]
    hidden_stride: int
    heads: tuple[Tensor, ...]  # [>=V, D] each
    strides: tuple[int, ...]


@triton.jit
def head_tile(
    x,
    i: tl.constexpr,
    rows,
    live,
    vocab,
    V: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Logits of head i, ``[BLOCK, ROWS]`` float32, the vocabulary on the matrix unit's long side."""
    total = tl.zeros([BLOCK, ROWS], tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        # [BLOCK, BLOCK_D] @ [BLOCK_D, ROWS]
        head = tl.load(
            x.heads[i] + vocab.to(tl.int64)[:, None] * x.strides[i] + d[None, :],
            mask=(vocab < V)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        hidden = tl.load(
            x.hidden + rows.to(tl.int64)[None, :] * x.hidden_stride + d[:, None],
            mask=live[None, :] & (d < D)[:, None],
            other=0.0,
        )
        total = tl.dot(head, hidden, total, input_precision="ieee")
    return total


@triton.jit
def lm_head_kernel(
    router,  # Heads: the router's only one
    experts,  # Heads: n
    order_ptr,  # [B] int64: rows sorted by expert
    starts_ptr,  # [n + 1] int64: where each expert's rows begin in it
    alpha,
    keys_ptr,  # [B, TILES] int32
    indices_ptr,  # [B, TILES] int32
    V: tl.constexpr,
    TILES: tl.constexpr,
    D_ROUTER: tl.constexpr,
    D_EXPERT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The best token of one tile, for up to ROWS rows of one expert."""
    N: tl.constexpr = len(experts.heads)
    tile, expert, group = tl.program_id(0) // N, tl.program_id(0) % N, tl.program_id(1)
    begin = tl.load(starts_ptr + expert) + group * ROWS
    end = tl.load(starts_ptr + expert + 1)
    if begin < end:
        slot = begin + tl.arange(0, ROWS)
        live = slot < end
        rows = tl.load(order_ptr + slot, mask=live, other=0)
        vocab = tile * BLOCK + tl.arange(0, BLOCK)
        # [BLOCK, ROWS] logits
        left = head_tile(router, 0, rows, live, vocab, V, D_ROUTER, BLOCK, ROWS, BLOCK_D)
        right = tl.zeros([BLOCK, ROWS], tl.float32)
        for j in tl.static_range(N):
            if expert == j:
                right = head_tile(experts, j, rows, live, vocab, V, D_EXPERT, BLOCK, ROWS, BLOCK_D)
        key = score_key(left + right * alpha)
        key = tl.where((vocab < V)[:, None], key, _OUTSIDE_KEY)
        # [ROWS] largest key, lowest token among equals
        best = tl.max(key, axis=0)
        index = tl.min(tl.where(key == best[None, :], vocab[:, None], _NO_INDEX), axis=0)
        tl.store(keys_ptr + rows * TILES + tile, best, mask=live)
        tl.store(indices_ptr + rows * TILES + tile, index, mask=live)


def lm_head(
    router_hidden: Tensor,
    router_head: Tensor,
    ids: Tensor,
    expert_hidden: Tensor,
    heads: list[Tensor],
    alpha: float,
    vocab_size: int,
) -> tuple[Tensor, list[Launch]]:
    """Token ids ``[B]`` from hidden states, and the launches. Sorting the rows by expert is left to PyTorch: B numbers,
    without a wait."""
    B, n, device = router_hidden.shape[0], len(heads), router_hidden.device
    count = -(-vocab_size // _TILE.block)
    order = ids.argsort(stable=True)
    partials = torch.zeros(2, B, count, dtype=torch.int32, device=device)  # rows of no expert are never written
    arguments = {
        "router": Heads(router_hidden, router_hidden.stride(0), (router_head,), (router_head.stride(0),)),
        "experts": Heads(expert_hidden, expert_hidden.stride(0), tuple(heads), tuple(head.stride(0) for head in heads)),
        "order_ptr": order,
        "starts_ptr": torch.searchsorted(ids[order], torch.arange(n + 1, device=device)),
        "alpha": alpha,
        "keys_ptr": partials[0],
        "indices_ptr": partials[1],
        "V": vocab_size,
        "TILES": count,
        "D_ROUTER": router_hidden.shape[1],
        "D_EXPERT": expert_hidden.shape[1],
        "BLOCK": _TILE.block,
        "ROWS": _ROWS,
        "BLOCK_D": _DEPTH_BYTES // max(router_head.element_size(), heads[0].element_size()),
    }
    tokens = torch.empty(B, dtype=torch.int64, device=device)
    return tokens, [
        Launch(lm_head_kernel, (count * n, -(-B // _ROWS)), arguments, _TILE.warps),
        finish(partials, tokens, None, vocab_size),
    ]
