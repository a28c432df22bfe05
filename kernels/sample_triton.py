"""Triton kernels of sampling: Gumbel-max with keyed noise, and the exact threshold of top-k, top-p and min-p.

Without filters a draw is two launches and one read of the logits, like argmax. With filters the fused, tempered scores
are written once, one program per row finds the score below which every token is dropped, and the draw runs on the
scores that are left.

The threshold is found by a radix search over the order-preserving keys of tiles: eight passes, each asking 16
pivots at once how many tokens (top-k), or how much mass (top-p), lie at or above them. Masses are integers in units of
2^-40 of the best token's, so their sum is the same in any order and the result does not depend on the tile.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: SIM102, SIM108 (constants and values of the device do not mix in one condition or expression)
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .argmax_triton import add
from .arguments import Step
from .launch import Launch, Tile
from .reference import Draw
from .tiles import _OUTSIDE_KEY, best_of, finish, fused_tile, key_score, load_parameter, score_key, tempered

_POSITIVE_INFINITY_KEY = tl.constexpr(0x7F800000)
_NEGATIVE_INFINITY_KEY = tl.constexpr(-0x7F800001)
_MASS_SCALE = tl.constexpr(float(2**40))  # reference.MASS_SCALE
_LARGEST_U = tl.constexpr(1.0 - 2.0**-24)  # noise.LARGEST_U
_BITS = tl.constexpr(4)
_PIVOTS = tl.constexpr(16)
_PASSES = tl.constexpr(8)


@triton.jit
def gumbel(word):
    """Standard Gumbel float32 of uint32 words, as noise.gumbel."""
    u = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, _LARGEST_U)
    w = 1.0 - u
    exponential = tl.where(w == 1.0, u, -tl.log(w) * (u / (1.0 - tl.where(w == 1.0, 0.0, w))))
    return -tl.log(exponential)


@triton.jit
def gumbel_tile(seed, step, start, BLOCK: tl.constexpr):
    """Noise of tokens start .. start + BLOCK, multiples of 4, as noise.gumbel_noise: one Philox per four."""
    group = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = group * 0
    low = zero + (step & 0xFFFFFFFF).to(tl.uint32)
    high = zero + ((step >> 32) & 0xFFFFFFFF).to(tl.uint32)
    a, b, c, d = tl.philox(seed, group, low, high, zero)
    return gumbel(tl.interleave(tl.interleave(a, c), tl.interleave(b, d)))


@triton.jit(do_not_specialize=["position"])
def sample_kernel(
    inputs,
    temperature,  # float, or [B] float32 when PER_ROW_TEMPERATURE
    seeds_ptr,  # [B] int64
    position,  # int, or [B] int64 when PER_ROW_POSITION
    thresholds_ptr,  # [B] int32 keys, when FILTERED
    noise_ptr,  # [B, V] float32, when NOISE
    noise_stride,
    keys_ptr,  # [B, TILES] int32
    indices_ptr,  # [B, TILES] int32
    expert_ids_ptr,  # [B] int64
    PLAN: tl.constexpr,
    PER_ROW_TEMPERATURE: tl.constexpr,
    PER_ROW_POSITION: tl.constexpr,
    FILTERED: tl.constexpr,
    NOISE: tl.constexpr,
):
    """Partial argmax of scores plus noise. FILTERED reads finished scores: add_kernel has divided them already."""
    row, tile = tl.program_id(0) // PLAN.TILES, tl.program_id(0) % PLAN.TILES
    start = tile * PLAN.BLOCK
    offsets = start + tl.arange(0, PLAN.BLOCK)
    inside = offsets < PLAN.V
    # 1. Scores [BLOCK], -inf below the row's threshold.
    _, _, fused, expert, _ = fused_tile(inputs, row, offsets, start, PLAN)
    if FILTERED:
        scores = tl.where(score_key(fused) >= tl.load(thresholds_ptr + row), fused, float("-inf"))
    else:
        scores = tempered(fused, temperature, row, PER_ROW_TEMPERATURE)
    # 2. Noise, given or drawn; none where the row is greedy.
    if load_parameter(temperature, row, PER_ROW_TEMPERATURE, tl.float32) != 0.0:
        if NOISE:
            noise = tl.load(noise_ptr + row.to(tl.int64) * noise_stride + offsets, mask=inside, other=0.0)
        else:
            at = load_parameter(position, row, PER_ROW_POSITION, tl.int64).to(tl.int64)
            noise = gumbel_tile(tl.load(seeds_ptr + row), at, start, PLAN.BLOCK)
        scores = scores + noise
    # 3. The best of the tile.
    key, index = best_of(tl.where(inside, score_key(scores), _OUTSIDE_KEY), offsets)
    slot = row.to(tl.int64) * PLAN.TILES + tile
    tl.store(keys_ptr + slot, key)
    tl.store(indices_ptr + slot, index)
    if not FILTERED:
        if tile == 0:
            tl.store(expert_ids_ptr + row, expert.to(tl.int64))


@triton.jit
def search(scores_ptr, floor, best, target, V: tl.constexpr, BLOCK: tl.constexpr, MASS: tl.constexpr):
    """The largest key t such that the tokens with key >= max(t, floor) count, or weigh, at least ``target``."""
    # Every pass settles four bits of t, from the highest on.
    pivot_index = tl.arange(0, _PIVOTS)
    base = floor * 0 + _OUTSIDE_KEY
    for digit in range(_PASSES):
        shift = 28 - _BITS * digit
        pivots = base + (pivot_index << shift)
        if MASS:
            total = tl.zeros([BLOCK, _PIVOTS], tl.int64)
        else:
            total = tl.zeros([BLOCK, _PIVOTS], tl.int32)
        for start in range(0, V, BLOCK):
            # [BLOCK] weights, added to each of the [BLOCK, _PIVOTS] sums whose pivot they reach
            score, key, inside = score_tile(scores_ptr, start, V, BLOCK)
            if MASS:
                weight = tl.where(key >= floor, mass(score, best), 0)
            else:
                weight = inside.to(tl.int32)
            total += tl.where(key[:, None] >= pivots[None, :], weight[:, None], 0)
        reached = tl.sum(total, axis=0).to(tl.float64) >= target
        # The sums fall as pivots rise, so the pivots that reach the target are the first ones.
        base += (tl.maximum(tl.sum(reached.to(tl.int32), axis=0), 1) - 1) << shift
    return base


@triton.jit
def score_tile(scores_ptr, start, V: tl.constexpr, BLOCK: tl.constexpr):
    """Scores of one tile, their keys, and which of them lie in the vocabulary, ``[BLOCK]`` each."""
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < V
    score = tl.load(scores_ptr + offsets, mask=inside, other=float("-inf"))
    return score, tl.where(inside, score_key(score), _OUTSIDE_KEY), inside


@triton.jit
def mass(score, best):
    """A token's share of the best token's probability, in units of 2^-40, rounded down."""
    return (tl.exp(score - best) * _MASS_SCALE).to(tl.int64)


@triton.jit(do_not_specialize=["top_k"])
def threshold_kernel(
    scores_ptr,  # [B, V] float32, tempered
    thresholds_ptr,  # [B] int32
    top_k,  # int, or [B] int64
    top_p,  # float, or [B] float32
    log_min_p,  # float, or [B] float32
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    TOP_K: tl.constexpr,  # 0 off, 1 one value, 2 per row; so the others
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
):
    """The key below which the filters drop a token: top-k, then top-p of what is left, then min-p."""
    row = tl.program_id(0)
    scores_ptr += row.to(tl.int64) * V
    # 1. The best score of the row, tile by tile.
    keys = tl.full([BLOCK], _OUTSIDE_KEY, tl.int32)
    for start in range(0, V, BLOCK):
        _, key, _ = score_tile(scores_ptr, start, V, BLOCK)
        keys = tl.maximum(keys, key)
    best_key = tl.max(keys, axis=0)
    threshold = best_key * 0 + _OUTSIDE_KEY
    # A row whose best score is NaN or infinite is no distribution: it is left whole, and the draw is greedy.
    if (best_key < _POSITIVE_INFINITY_KEY) & (best_key > _NEGATIVE_INFINITY_KEY):
        best = key_score(best_key)
        # 2. Top-k: the k-th largest key.
        if TOP_K > 0:
            k = load_parameter(top_k, row, TOP_K == 2, tl.int64).to(tl.int64)
            if (k > 0) & (k < V):
                threshold = search(scores_ptr, threshold, best, k.to(tl.float64), V, BLOCK, False)
        # 3. Top-p: the key from which on p of the mass that top-k left lies.
        if TOP_P > 0:
            p = load_parameter(top_p, row, TOP_P == 2, tl.float32).to(tl.float64)
            if p < 1.0:
                masses = tl.zeros([BLOCK], tl.int64)
                for start in range(0, V, BLOCK):
                    score, key, _ = score_tile(scores_ptr, start, V, BLOCK)
                    masses += tl.where(key >= threshold, mass(score, best), 0)
                target = tl.maximum(p * tl.sum(masses, axis=0).to(tl.float64), 1.0)
                found = search(scores_ptr, threshold, best, target, V, BLOCK, True)
                threshold = tl.maximum(threshold, found)
        # 4. Min-p: a share of the best token's probability.
        if MIN_P > 0:
            threshold = tl.maximum(threshold, score_key(best + load_parameter(log_min_p, row, MIN_P == 2, tl.float32)))
    tl.store(thresholds_ptr + row, threshold)


_ROW_TILE = Tile(1024, 16)  # of the threshold search, which walks a whole row


def sample(step: Step, draw: Draw, tile: Tile | None = None) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """(token ids, expert ids), ``[B]`` each, of a draw, and the launches that write them."""
    B, V, device = step.batch, step.vocab_size, step.router.device
    tile = tile or launch.tile_for(B, V)
    launches: list[Launch] = []
    thresholds = None
    if draw.is_filtered:
        # The scores are written, a threshold per row is found, and the draw reads what is left of them.
        (scores, expert_ids), launches = add(step, tile, draw.temperature)
        thresholds = torch.empty(B, dtype=torch.int32, device=device)
        threshold = {
            "scores_ptr": scores,
            "thresholds_ptr": thresholds,
            "top_k": draw.top_k,
            "top_p": draw.top_p,
            "log_min_p": draw.log_min_p,
            "V": V,
            "BLOCK": _ROW_TILE.block,
            "TOP_K": _kind(draw.top_k),
            "TOP_P": _kind(draw.top_p),
            "MIN_P": _kind(draw.log_min_p),
        }
        launches.append(Launch(threshold_kernel, (B,), threshold, _ROW_TILE.warps))
        inputs, plan = launch.describe_fused(scores, tile.block)
    else:
        expert_ids = torch.empty(B, dtype=torch.int64, device=device)
        inputs, plan = launch.describe(step, tile.block)
    partials = torch.empty(2, B, plan.TILES, dtype=torch.int32, device=device)
    arguments = {
        "inputs": inputs,
        "temperature": draw.temperature,
        "seeds_ptr": draw.seed,
        "position": draw.position,
        "thresholds_ptr": thresholds,
        "noise_ptr": draw.noise,
        "noise_stride": draw.noise.stride(0) if draw.noise is not None else 0,
        "keys_ptr": partials[0],
        "indices_ptr": partials[1],
        "expert_ids_ptr": expert_ids,
        "PLAN": plan,
        "PER_ROW_TEMPERATURE": isinstance(draw.temperature, Tensor),
        "PER_ROW_POSITION": isinstance(draw.position, Tensor),
        "FILTERED": draw.is_filtered,
        "NOISE": draw.noise is not None,
    }
    launches.append(Launch(sample_kernel, (B * plan.TILES,), arguments, tile.warps))
    tokens = torch.empty(B, dtype=torch.int64, device=device)
    launches.append(finish(partials, tokens, None, V))
    return (tokens, expert_ids), launches


def _kind(parameter: Any) -> int:
    """0 where a filter is off, 1 for one value, 2 for one per row."""
    return 0 if parameter is None else 2 if isinstance(parameter, Tensor) else 1
