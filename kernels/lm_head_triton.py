"""Triton kernel of the fused LM heads: two matrix products per tile of the vocabulary, added and compared in registers.

Rows are grouped by expert. A program takes one tile of the vocabulary, one expert, and up to ``ROWS`` of the rows that
selected it; the programs that share a tile of the router's head are neighbours in the grid, so that its second reader
finds it in the L2 cache. Programs without rows return at once, which keeps the grid static.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
import triton
import triton.language as tl

from .triton_tiles import _NO_INDEX, _OUTSIDE_KEY, fuse, score_key


@triton.jit
def head_tile(
    hidden_ptr,
    hidden_stride,
    head_ptr,
    head_stride,
    rows,
    live,
    vocab,
    V: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Logits of a tile: ``[BLOCK, ROWS]`` float32, the vocabulary on the matrix unit's long side."""
    total = tl.zeros([BLOCK, ROWS], tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        head = tl.load(
            head_ptr + vocab.to(tl.int64)[:, None] * head_stride + d[None, :],
            mask=(vocab < V)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        hidden = tl.load(
            hidden_ptr + rows.to(tl.int64)[None, :] * hidden_stride + d[:, None],
            mask=live[None, :] & (d < D)[:, None],
            other=0.0,
        )
        total = tl.dot(head, hidden, total, input_precision="ieee")
    return total


@triton.jit
def lm_head_kernel(
    router_hidden_ptr,  # [B, D_ROUTER]
    router_hidden_stride,
    router_head_ptr,  # [V, D_ROUTER]
    router_head_stride,
    expert_hidden_ptr,  # [B, D_EXPERT]
    expert_hidden_stride,
    expert_head_ptrs,  # n of [V, D_EXPERT]
    expert_head_strides,
    order_ptr,  # [B] int64: rows sorted by expert
    starts_ptr,  # [n + 1] int64: where each expert's rows begin in it
    alpha,
    keys_ptr,
    indices_ptr,
    V: tl.constexpr,
    TILES: tl.constexpr,
    N: tl.constexpr,
    D_ROUTER: tl.constexpr,
    D_EXPERT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile, expert, group = tl.program_id(0) // N, tl.program_id(0) % N, tl.program_id(1)
    begin = tl.load(starts_ptr + expert) + group * ROWS
    end = tl.load(starts_ptr + expert + 1)
    if begin < end:
        slot = begin + tl.arange(0, ROWS)
        live = slot < end
        rows = tl.load(order_ptr + slot, mask=live, other=0)
        vocab = tile * BLOCK + tl.arange(0, BLOCK)
        router = head_tile(
            router_hidden_ptr,
            router_hidden_stride,
            router_head_ptr,
            router_head_stride,
            rows,
            live,
            vocab,
            V,
            D_ROUTER,
            BLOCK,
            ROWS,
            BLOCK_D,
        )
        chosen = tl.zeros([BLOCK, ROWS], tl.float32)
        for j in tl.static_range(len(expert_head_ptrs)):
            if expert == j:
                chosen = head_tile(
                    expert_hidden_ptr,
                    expert_hidden_stride,
                    expert_head_ptrs[j],
                    expert_head_strides[j],
                    rows,
                    live,
                    vocab,
                    V,
                    D_EXPERT,
                    BLOCK,
                    ROWS,
                    BLOCK_D,
                )
        key = score_key(fuse(router, chosen, alpha, "fp32", "fp32"))
        key = tl.where((vocab < V)[:, None], key, _OUTSIDE_KEY)
        best = tl.max(key, axis=0)
        index = tl.min(tl.where(key == best[None, :], vocab[:, None], _NO_INDEX), axis=0)
        tl.store(keys_ptr + rows * TILES + tile, best, mask=live)
        tl.store(indices_ptr + rows * TILES + tile, index, mask=live)
