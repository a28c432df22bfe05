"""Triton kernels: select + add, argmax and log-probabilities, in two launches.

The first launch cuts each row into tiles of ``BLOCK`` tokens and leaves one partial result per tile; the second
combines a row's partials. Nothing is shared between launches but the scratch of this call, so any grid order gives the
same result, on any number of streams.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
import triton
import triton.language as tl

from .triton_tiles import (
    _GATHERED,
    _NO_INDEX,
    _OUTSIDE_KEY,
    _RAGGED,
    _STACKED,
    best_of,
    fuse,
    fused_tile,
    has_row,
    key_score,
    log_sum,
    score_key,
    shifted_sum,
    tempered,
)


@triton.jit(do_not_specialize=["batch"])
def partial_kernel(
    router_ptr,
    router_stride,
    expert_ptrs,
    expert_strides,
    expert_rows,
    expert_stride,
    selection_ptr,
    selection_row_stride,
    selection_column_stride,
    batch,
    alpha,
    keys_ptr,  # [B, TILES] int32
    indices_ptr,  # [B, TILES] int32
    sums_ptr,  # [6, B, TILES] float32: m and s of router, expert, fused
    expert_ids_ptr,  # [B] int64
    expert_rows_ptr,  # [B] int32, read by the finish for ragged experts
    V: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FORM: tl.constexpr,
    SELECTION: tl.constexpr,
    ALIGN_ROUTER: tl.constexpr,
    ALIGN_EXPERT: tl.constexpr,
    PRODUCT: tl.constexpr,
    SUM: tl.constexpr,
    ARGMAX: tl.constexpr,
    LOGPROBS: tl.constexpr,
):
    row, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    start = tile * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < V
    router, chosen, fused, expert, expert_row = fused_tile(
        router_ptr,
        router_stride,
        expert_ptrs,
        expert_strides,
        expert_rows,
        expert_stride,
        selection_ptr,
        selection_row_stride,
        selection_column_stride,
        alpha,
        row,
        offsets,
        start,
        V,
        BLOCK,
        N,
        BLOCK_N,
        FORM,
        SELECTION,
        ALIGN_ROUTER,
        ALIGN_EXPERT,
        PRODUCT,
        SUM,
    )
    slot = row.to(tl.int64) * TILES + tile
    if ARGMAX:
        key, index = best_of(tl.where(inside, score_key(fused), _OUTSIDE_KEY), offsets)
        tl.store(keys_ptr + slot, key)
        tl.store(indices_ptr + slot, index)
    if LOGPROBS:
        plane = batch.to(tl.int64) * TILES
        m, s = shifted_sum(router, inside)
        tl.store(sums_ptr + slot, m)
        tl.store(sums_ptr + plane + slot, s)
        m, s = shifted_sum(chosen, inside)
        tl.store(sums_ptr + 2 * plane + slot, m)
        tl.store(sums_ptr + 3 * plane + slot, s)
        m, s = shifted_sum(fused, inside)
        tl.store(sums_ptr + 4 * plane + slot, m)
        tl.store(sums_ptr + 5 * plane + slot, s)
    if tile == 0:
        tl.store(expert_ids_ptr + row, expert.to(tl.int64))
        if LOGPROBS:
            tl.store(expert_rows_ptr + row, expert_row)


@triton.jit(do_not_specialize=["batch"])
def finish_kernel(
    router_ptr,
    router_stride,
    expert_ptrs,
    expert_strides,
    expert_rows,
    expert_stride,
    batch,
    alpha,
    keys_ptr,
    indices_ptr,
    sums_ptr,
    expert_ids_ptr,
    expert_rows_ptr,
    tokens_ptr,  # [B] int64: written, or read when GIVEN
    logits_ptr,  # [B] float32: the fused logit of the token
    logprobs_ptr,  # [B] float32
    scores_ptr,  # [B] float32
    V: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    N: tl.constexpr,
    FORM: tl.constexpr,
    PRODUCT: tl.constexpr,
    SUM: tl.constexpr,
    GIVEN: tl.constexpr,
    LOGPROBS: tl.constexpr,
):
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK_TILES)
    live = lane < TILES
    slots = row.to(tl.int64) * TILES + lane
    if GIVEN:
        token = tl.load(tokens_ptr + row).to(tl.int64)
    else:
        keys = tl.load(keys_ptr + slots, mask=live, other=_OUTSIDE_KEY)
        key, index = best_of(keys, tl.load(indices_ptr + slots, mask=live, other=_NO_INDEX))
        token = tl.minimum(tl.maximum(index, 0), V - 1).to(tl.int64)  # whatever the scratch holds, a valid id
        tl.store(tokens_ptr + row, token)
        if logits_ptr is not None:
            tl.store(logits_ptr + row, key_score(key))
    if LOGPROBS:
        plane = batch.to(tl.int64) * TILES
        inside = (token >= 0) & (token < V)
        column = tl.where(inside, token, 0)
        expert = tl.load(expert_ids_ptr + row).to(tl.int32)
        expert_row = tl.load(expert_rows_ptr + row)
        router = tl.load(router_ptr + row.to(tl.int64) * router_stride + column).to(tl.float32)
        chosen = router * 0.0 + float("nan")
        if FORM == _GATHERED:
            chosen = tl.load(expert_ptrs[0] + row.to(tl.int64) * expert_strides[0] + column).to(tl.float32)
        elif FORM == _STACKED:
            exists = (expert >= 0) & (expert < N)
            slab = tl.where(exists, expert, 0).to(tl.int64) * expert_stride
            x = tl.load(expert_ptrs[0] + slab + row.to(tl.int64) * expert_strides[0] + column).to(tl.float32)
            chosen = tl.where(exists, x, float("nan"))
        else:
            for j in tl.static_range(len(expert_ptrs)):
                exists = expert == j
                if FORM == _RAGGED:
                    exists = exists & has_row(expert_rows[j], expert_row)
                if exists:
                    at = expert_ptrs[j] + expert_row.to(tl.int64) * expert_strides[j] + column
                    chosen = tl.load(at).to(tl.float32)
        router_m = tl.load(sums_ptr + slots, mask=live, other=float("-inf"))
        router_s = tl.load(sums_ptr + plane + slots, mask=live, other=0.0)
        expert_m = tl.load(sums_ptr + 2 * plane + slots, mask=live, other=float("-inf"))
        expert_s = tl.load(sums_ptr + 3 * plane + slots, mask=live, other=0.0)
        fused_m = tl.load(sums_ptr + 4 * plane + slots, mask=live, other=float("-inf"))
        fused_s = tl.load(sums_ptr + 5 * plane + slots, mask=live, other=0.0)
        fused = fuse(router, chosen, alpha, PRODUCT, SUM)
        policy = fused - log_sum(fused_m, fused_s)
        score = (router - log_sum(router_m, router_s)) + (chosen - log_sum(expert_m, expert_s)) * alpha
        tl.store(logprobs_ptr + row, tl.where(inside, policy, float("nan")))
        tl.store(scores_ptr + row, tl.where(inside, score, float("nan")))


@triton.jit
def add_kernel(
    router_ptr,
    router_stride,
    expert_ptrs,
    expert_strides,
    expert_rows,
    expert_stride,
    selection_ptr,
    selection_row_stride,
    selection_column_stride,
    alpha,
    temperature,  # float, or [B] float32 when PER_ROW_TEMPERATURE
    out_ptr,  # [B, V] float32
    expert_ids_ptr,
    V: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FORM: tl.constexpr,
    SELECTION: tl.constexpr,
    ALIGN_ROUTER: tl.constexpr,
    ALIGN_EXPERT: tl.constexpr,
    PRODUCT: tl.constexpr,
    SUM: tl.constexpr,
    DIVIDE: tl.constexpr,
    PER_ROW_TEMPERATURE: tl.constexpr,
):
    """The fused logits themselves, divided by the temperature when sampling asks for it."""
    row, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    start = tile * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    _, _, fused, expert, _ = fused_tile(
        router_ptr,
        router_stride,
        expert_ptrs,
        expert_strides,
        expert_rows,
        expert_stride,
        selection_ptr,
        selection_row_stride,
        selection_column_stride,
        alpha,
        row,
        offsets,
        start,
        V,
        BLOCK,
        N,
        BLOCK_N,
        FORM,
        SELECTION,
        ALIGN_ROUTER,
        ALIGN_EXPERT,
        PRODUCT,
        SUM,
    )
    if DIVIDE:
        fused = tempered(fused, temperature, row, PER_ROW_TEMPERATURE)
    tl.store(out_ptr + row.to(tl.int64) * V + offsets, fused, mask=offsets < V)
    if tile == 0:
        tl.store(expert_ids_ptr + row, expert.to(tl.int64))
