"""Pieces that the Triton kernels share: one tile of fused logits, the order of scores, and the finish.

Order of scores. A float32 score becomes a signed int32 key: NaN above everything, -0 equal to +0, the rest in numeric
order. Comparing (largest key, lowest index) is a total order, which makes argmax equal to :func:`torch.argmax` (first
NaN, lowest index among equals) without relying on what a device's maximum does with NaN. Lanes beyond the vocabulary
hold the one key below -inf.

Loads become float32 at once: half-precision arithmetic rounds differently from device to device, and Triton's
interpreter gets bfloat16 arithmetic wrong.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: RET505 (a branch on a constant is compiled with its else, or not at all)
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .arguments import Layout

_STACKED = tl.constexpr(int(Layout.STACKED))
_GATHERED = tl.constexpr(int(Layout.GATHERED))
_RAGGED = tl.constexpr(int(Layout.RAGGED))
_FUSED = tl.constexpr(launch.FUSED)
_FROM_IDS = tl.constexpr(launch.FROM_IDS)
_ZERO = tl.constexpr(launch.ZERO)

_NAN_KEY = tl.constexpr(0x7FFFFFFF)
_OUTSIDE_KEY = tl.constexpr(-0x80000000)
_NO_INDEX = tl.constexpr(0x7FFFFFFF)


@triton.jit
def score_key(score):
    """Float32 to int32, order-preserving; NaN is the largest, -0 and +0 are one."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(score != score, _NAN_KEY, key)


@triton.jit
def key_score(key):
    """The inverse of score_key (one NaN for all of them, +0 for -0)."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def best_of(key, index):
    """(largest key, lowest index among equals) of a block."""
    best = tl.max(key, axis=0)
    return best, tl.min(tl.where(key == best, index, _NO_INDEX), axis=0)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Float32 rounded to bfloat16 or float16 and back; "fp32" leaves it."""
    if DTYPE == "bf16":
        # By hand: round to nearest even on the bits. NaN stays, overflow carries into the exponent of infinity.
        bits = x.to(tl.int32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x != x, x, up.to(tl.float32, bitcast=True))
    if DTYPE == "fp16":
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def fuse(router, chosen, alpha, PLAN: tl.constexpr):
    """Multiply, round, add, round. Launched with contraction off, which would skip the first rounding."""
    PRODUCT: tl.constexpr = PLAN.PRODUCT  # Triton 3.6 takes no string straight from a tuple
    SUM: tl.constexpr = PLAN.SUM
    return rounded(router + rounded(chosen * alpha, PRODUCT), SUM)


# --------------------------------------------------------------------------------------------------------------- tiles


@triton.jit
def load_tile(row_ptr, offsets, start, V: tl.constexpr, BLOCK: tl.constexpr):
    """``[BLOCK]`` float32: one tile of a row. Whole tiles are loaded without a mask: a mask whose bound is not a
    multiple of the vector width would turn 16-byte loads into 2-byte ones."""
    if V % BLOCK == 0:
        x = tl.load(row_ptr + offsets)
    elif V % 8 == 0:
        x = tl.load(row_ptr + offsets, mask=offsets < V, other=0.0)
    else:
        if start + BLOCK <= V:
            x = tl.load(row_ptr + offsets)
        else:
            x = tl.load(row_ptr + offsets, mask=offsets < V, other=0.0)
    return x.to(tl.float32)


@triton.jit
def row_start(row, stride, ALIGN: tl.constexpr):
    """Offset of a row in int64 (batch x vocabulary passes 2^31); ALIGN elements are known to divide every stride."""
    return tl.multiple_of(row.to(tl.int64) * stride, ALIGN)


@triton.jit
def select_expert(inputs, row, PLAN: tl.constexpr):
    """The row's expert id: argmax of its weights (torch's order), or as given."""
    if PLAN.SELECTION == _ZERO:
        return row.to(tl.int32) * 0
    elif PLAN.SELECTION == _FROM_IDS:
        return tl.load(inputs.selection + row.to(tl.int64) * inputs.selection_row_stride).to(tl.int32)
    else:
        # [BLOCK_N] weights, in their own precision, so not by keys: NaN first, then the largest, at its lowest index.
        i = tl.arange(0, PLAN.BLOCK_N)
        weights = inputs.selection + row.to(tl.int64) * inputs.selection_row_stride
        w = tl.load(weights + i * inputs.selection_column_stride, mask=i < PLAN.N, other=float("-inf"))
        if w.dtype != tl.float64:
            w = w.to(tl.float32)
        nan = tl.min(tl.where(w != w, i, PLAN.BLOCK_N), axis=0)
        largest = tl.max(tl.where(w != w, float("-inf"), w), axis=0)
        first = tl.min(tl.where(w == largest, i, PLAN.BLOCK_N), axis=0)
        return tl.where(nan < PLAN.BLOCK_N, nan, first)


@triton.jit
def rank_among(ids_ptr, expert, row, BLOCK_B: tl.constexpr):
    """Number of earlier rows that selected the same expert: where the row lies in that expert's ragged tensor."""
    count = row * 0
    first = row * 0
    while first < row:
        # [BLOCK_B] ids
        other = first + tl.arange(0, BLOCK_B)
        ids = tl.load(ids_ptr + other, mask=other < row, other=-1).to(tl.int32)
        count += tl.sum(((ids == expert) & (other < row)).to(tl.int32), axis=0)
        first += BLOCK_B
    return count


@triton.jit
def load_expert(inputs, expert, row, offsets, start, BLOCK: tl.constexpr, PLAN: tl.constexpr):
    """``[BLOCK]`` float32: logits ``start`` on of the row's expert, of which ``row`` is the row in its tensor.

    NaN where the expert id, or the row in a ragged tensor, does not exist.
    """
    V: tl.constexpr = PLAN.V
    ALIGN: tl.constexpr = PLAN.ALIGN_EXPERT
    if PLAN.LAYOUT == _GATHERED:
        row_ptr = inputs.experts[0] + row_start(row, inputs.row_strides[0], ALIGN)
        x = load_tile(row_ptr, offsets, start, V, BLOCK)
    elif PLAN.LAYOUT == _STACKED:
        exists = (expert >= 0) & (expert < PLAN.N)
        slab_ptr = inputs.experts[0] + row_start(tl.where(exists, expert, 0), inputs.expert_stride, ALIGN)
        x = load_tile(slab_ptr + row_start(row, inputs.row_strides[0], ALIGN), offsets, start, V, BLOCK)
        x = tl.where(exists, x, float("nan"))
    else:
        x = tl.full([BLOCK], float("nan"), tl.float32)
        for j in tl.static_range(len(inputs.experts)):
            exists = expert == j
            if PLAN.LAYOUT == _RAGGED:
                exists = exists & (32 * row < inputs.rows[j] - 17)
            if exists:  # only the branch taken is read
                row_ptr = inputs.experts[j] + row_start(row, inputs.row_strides[j], ALIGN)
                x = load_tile(row_ptr, offsets, start, V, BLOCK)
    return x


@triton.jit
def fused_tile(inputs, row, offsets, start, PLAN: tl.constexpr):
    """Router, expert and fused logits of one tile, ``[BLOCK]`` float32 each, the expert's id, its row in its tensor."""
    # The router's load does not wait for the selection: it is on its way while the weights are compared.
    router_ptr = inputs.router + row_start(row, inputs.router_stride, PLAN.ALIGN_ROUTER)
    router = load_tile(router_ptr, offsets, start, PLAN.V, PLAN.BLOCK)
    expert_row = row
    if PLAN.LAYOUT == _FUSED:
        expert = row * 0
        chosen = router
        fused = router
    else:
        expert = select_expert(inputs, row, PLAN)
        if PLAN.LAYOUT == _RAGGED:
            expert_row = rank_among(inputs.selection, expert, row, 256)
        chosen = load_expert(inputs, expert, expert_row, offsets, start, PLAN.BLOCK, PLAN)
        fused = fuse(router, chosen, inputs.alpha, PLAN)
    return router, chosen, fused, expert, expert_row


@triton.jit
def load_parameter(parameter, row, PER_ROW: tl.constexpr, DTYPE: tl.constexpr):
    """A parameter of sampling: one value for all rows, or a pointer to one per row."""
    if PER_ROW:
        return tl.load(parameter + row)
    else:
        return tl.full((), 0, DTYPE) + parameter  # the interpreter hands Python numbers through


@triton.jit
def tempered(fused, temperature, row, PER_ROW: tl.constexpr):
    """Scores over temperature, rounded as torch's division is; a greedy row (temperature 0) keeps its scores."""
    t = load_parameter(temperature, row, PER_ROW, tl.float32)
    return tl.div_rn(fused, tl.zeros_like(fused) + tl.where(t == 0.0, 1.0, t))


# -------------------------------------------------------------------------------------------------------------- finish


@triton.jit
def best_partial(keys_ptr, indices_ptr, row, V: tl.constexpr, TILES: tl.constexpr, BLOCK_TILES: tl.constexpr):
    """The best key of a row's tiles, and its token."""
    lane = tl.arange(0, BLOCK_TILES)
    slots = row.to(tl.int64) * TILES + lane
    keys = tl.load(keys_ptr + slots, mask=lane < TILES, other=_OUTSIDE_KEY)
    key, index = best_of(keys, tl.load(indices_ptr + slots, mask=lane < TILES, other=_NO_INDEX))
    return key, tl.minimum(tl.maximum(index, 0), V - 1).to(tl.int64)  # whatever the scratch holds, a valid id


@triton.jit
def finish_kernel(
    keys_ptr,  # [B, TILES] int32
    indices_ptr,  # [B, TILES] int32
    tokens_ptr,  # [B] int64
    logits_ptr,  # [B] float32: the score of the token; or None
    V: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """The token of each row, from the best of its tiles."""
    row = tl.program_id(0)
    key, token = best_partial(keys_ptr, indices_ptr, row, V, TILES, BLOCK_TILES)
    tl.store(tokens_ptr + row, token)
    if logits_ptr is not None:
        tl.store(logits_ptr + row, key_score(key))


def finish(partials: Tensor, tokens: Tensor, logits: Tensor | None, vocab_size: int) -> launch.Launch:
    """The launch that ends an operation: ``partials`` ``[2, B, TILES]`` int32, keys and indices, to tokens ``[B]``."""
    _, B, tiles = partials.shape
    arguments = {
        "keys_ptr": partials[0],
        "indices_ptr": partials[1],
        "tokens_ptr": tokens,
        "logits_ptr": logits,
        "V": vocab_size,
        "TILES": tiles,
        "BLOCK_TILES": launch.power_of_2(tiles),
    }
    return launch.Launch(finish_kernel, (B,), arguments, 1)
