"""Triton pieces of log-probabilities: sums of exponentials per tile, and the finish that combines a row's tiles.

A tile leaves ``m`` and ``sum exp(x - m)`` of the router's, the expert's and the fused logits; the finish combines them
and looks the token's three logits up. Nothing overflows, and -inf throughout a tile counts as nothing.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
import triton
import triton.language as tl

from .tiles import best_partial, fuse, key_score, load_expert


@triton.jit
def store_sums(sums_ptr, plane, router, chosen, fused, inside):
    """Six numbers of one tile, ``plane`` apart: m and s of the router, of the expert, of their sum."""
    logits = (router, chosen, fused)
    for i in tl.static_range(3):
        # m = 0 where every token is -inf; NaN and +inf come out as a NaN sum
        x = tl.where(inside, logits[i], float("-inf"))
        m = tl.max(tl.where(x != x, float("-inf"), x), axis=0)
        m = tl.where(m == float("-inf"), 0.0, m)
        tl.store(sums_ptr + 2 * i * plane, m)
        tl.store(sums_ptr + (2 * i + 1) * plane, tl.sum(tl.exp(x - m), axis=0))


@triton.jit
def log_sum(sums_ptr, plane, live):
    """Log of the sum over tiles of s * exp(m); ``sums_ptr`` ``[BLOCK_TILES]``. Lanes without a tile add nothing."""
    m = tl.load(sums_ptr, mask=live, other=float("-inf"))
    s = tl.load(sums_ptr + plane, mask=live, other=0.0)
    best = tl.max(tl.where(m != m, float("-inf"), m), axis=0)
    best = tl.where(best == float("-inf"), 0.0, best)
    return best + tl.log(tl.sum(s * tl.exp(m - best), axis=0))


@triton.jit(do_not_specialize=["batch"])
def finish_logprobs_kernel(
    inputs,
    batch,
    keys_ptr,  # [B, TILES] int32, unless GIVEN
    indices_ptr,  # [B, TILES] int32, unless GIVEN
    sums_ptr,  # [6, B, TILES] float32
    expert_ids_ptr,  # [B] int64
    expert_rows_ptr,  # [B] int32
    tokens_ptr,  # [B] int64: written, or read when GIVEN
    logits_ptr,  # [B] float32: the fused logit of the token; unless GIVEN
    logprobs_ptr,  # [B] float32
    scores_ptr,  # [B] float32
    PLAN: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """One row: its token, unless given, and the token's log-probability in both meanings."""
    row = tl.program_id(0)
    # 1. The token.
    if GIVEN:
        token = tl.load(tokens_ptr + row).to(tl.int64)
    else:
        key, token = best_partial(keys_ptr, indices_ptr, row, PLAN.V, PLAN.TILES, BLOCK_TILES)
        tl.store(tokens_ptr + row, token)
        tl.store(logits_ptr + row, key_score(key))
    # 2. Its logits; the expert's as a tile of one token.
    inside = (token >= 0) & (token < PLAN.V)
    column = tl.where(inside, token, 0)
    router = tl.load(inputs.router + row.to(tl.int64) * inputs.router_stride + column).to(tl.float32)
    expert, expert_row = tl.load(expert_ids_ptr + row).to(tl.int32), tl.load(expert_rows_ptr + row)
    chosen = load_expert(inputs, expert, expert_row, column + tl.arange(0, 1), column, 1, PLAN)
    chosen = tl.sum(chosen, axis=0)
    fused = fuse(router, chosen, inputs.alpha, PLAN)
    # 3. The normalisers, from [BLOCK_TILES] partial sums each.
    plane = batch.to(tl.int64) * PLAN.TILES
    lane = tl.arange(0, BLOCK_TILES)
    live = lane < PLAN.TILES
    sums_ptr += row.to(tl.int64) * PLAN.TILES + lane
    policy = fused - log_sum(sums_ptr + 4 * plane, plane, live)
    router -= log_sum(sums_ptr, plane, live)
    chosen -= log_sum(sums_ptr + 2 * plane, plane, live)
    score = router + chosen * inputs.alpha
    tl.store(logprobs_ptr + row, tl.where(inside, policy, float("nan")))
    tl.store(scores_ptr + row, tl.where(inside, score, float("nan")))
