"""What the Triton kernels share: loading one tile of fused logits, and the order in which scores compare.

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

# arguments.Form, as kernels see it
_LISTED = tl.constexpr(0)
_STACKED = tl.constexpr(1)
_GATHERED = tl.constexpr(2)
_RAGGED = tl.constexpr(3)
_NO_EXPERT = tl.constexpr(4)

# where a row's expert id comes from
_FROM_WEIGHTS = tl.constexpr(0)
_FROM_IDS = tl.constexpr(1)
_ZERO = tl.constexpr(2)

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
def load_tile(row_ptr, offsets, start, V: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of a row as float32. Whole tiles are loaded without a mask: a mask whose bound is not a multiple of the
    vector width would turn 16-byte loads into 2-byte ones."""
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
def select_expert(
    selection_ptr, row_stride, column_stride, row, N: tl.constexpr, BLOCK_N: tl.constexpr, SELECTION: tl.constexpr
):
    """The row's expert id: argmax of its weights (torch's order), or as given."""
    if SELECTION == _ZERO:
        return row.to(tl.int32) * 0
    elif SELECTION == _FROM_IDS:
        return tl.load(selection_ptr + row.to(tl.int64) * row_stride).to(tl.int32)
    else:
        i = tl.arange(0, BLOCK_N)
        w = tl.load(selection_ptr + row.to(tl.int64) * row_stride + i * column_stride, mask=i < N, other=float("-inf"))
        if w.dtype != tl.float64:
            w = w.to(tl.float32)
        # In the weights' own precision, so not by keys: NaN first, then the largest, each at its lowest index.
        nan = tl.min(tl.where(w != w, i, BLOCK_N), axis=0)
        largest = tl.max(tl.where(w != w, float("-inf"), w), axis=0)
        first = tl.min(tl.where(w == largest, i, BLOCK_N), axis=0)
        return tl.where(nan < BLOCK_N, nan, first)


@triton.jit
def rank_among(ids_ptr, expert, row, BLOCK_B: tl.constexpr):
    """How many earlier rows selected the same expert: where the row lies in that expert's ragged tensor."""
    count = row * 0
    first = row * 0
    while first < row:
        other = first + tl.arange(0, BLOCK_B)
        ids = tl.load(ids_ptr + other, mask=other < row, other=-1).to(tl.int32)
        count += tl.sum(((ids == expert) & (other < row)).to(tl.int32), axis=0)
        first += BLOCK_B
    return count


@triton.jit
def has_row(rows, row):
    """Whether a ragged tensor holds the row; ``rows`` is 32 * count + 17 (see launch.py)."""
    return 32 * row < rows - 17


@triton.jit
def load_expert(
    expert_ptrs,
    expert_strides,
    expert_rows,
    expert_stride,
    expert,
    row,
    offsets,
    start,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
    FORM: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """One tile of the row's expert; NaN where the expert id, or the row in a ragged tensor, does not exist."""
    if FORM == _GATHERED:
        x = load_tile(expert_ptrs[0] + row_start(row, expert_strides[0], ALIGN), offsets, start, V, BLOCK)
    elif FORM == _STACKED:
        exists = (expert >= 0) & (expert < N)
        slab = row_start(tl.where(exists, expert, 0), expert_stride, ALIGN)
        x = load_tile(expert_ptrs[0] + slab + row_start(row, expert_strides[0], ALIGN), offsets, start, V, BLOCK)
        x = tl.where(exists, x, float("nan"))
    else:
        x = tl.full([BLOCK], float("nan"), tl.float32)
        for j in tl.static_range(len(expert_ptrs)):
            exists = expert == j
            if FORM == _RAGGED:
                exists = exists & has_row(expert_rows[j], row)
            if exists:  # only the branch taken is read
                x = load_tile(expert_ptrs[j] + row_start(row, expert_strides[j], ALIGN), offsets, start, V, BLOCK)
    return x


@triton.jit
def fuse(router, chosen, alpha, PRODUCT: tl.constexpr, SUM: tl.constexpr):
    """Multiply, round, add, round. Launched with contraction off, which would skip the first rounding."""
    return rounded(router + rounded(chosen * alpha, PRODUCT), SUM)


@triton.jit
def fused_tile(
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
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FORM: tl.constexpr,
    SELECTION: tl.constexpr,
    ALIGN_ROUTER: tl.constexpr,
    ALIGN_EXPERT: tl.constexpr,
    PRODUCT: tl.constexpr,
    SUM: tl.constexpr,
):
    """Router, expert and fused logits of one tile, the row's expert id, and its row in the expert's tensor."""
    # The router's load does not wait for the selection: it is on its way while the weights are compared.
    router = load_tile(router_ptr + row_start(row, router_stride, ALIGN_ROUTER), offsets, start, V, BLOCK)
    expert_row = row
    if FORM == _NO_EXPERT:
        expert = row * 0
        chosen = router
        fused = router
    else:
        expert = select_expert(selection_ptr, selection_row_stride, selection_column_stride, row, N, BLOCK_N, SELECTION)
        if FORM == _RAGGED:
            expert_row = rank_among(selection_ptr, expert, row, 256)
        chosen = load_expert(
            expert_ptrs,
            expert_strides,
            expert_rows,
            expert_stride,
            expert,
            expert_row,
            offsets,
            start,
            V,
            BLOCK,
            N,
            FORM,
            ALIGN_EXPERT,
        )
        fused = fuse(router, chosen, alpha, PRODUCT, SUM)
    return router, chosen, fused, expert, expert_row


@triton.jit
def shifted_sum(x, inside):
    """(m, sum exp(x - m)) over a tile's tokens, m = 0 where every token is -inf; NaN and +inf come out as NaN."""
    x = tl.where(inside, x, float("-inf"))
    m = tl.max(tl.where(x != x, float("-inf"), x), axis=0)
    m = tl.where(m == float("-inf"), 0.0, m)
    return m, tl.sum(tl.exp(x - m), axis=0)


@triton.jit
def log_sum(m, s):
    """Log of the sum over tiles of s * exp(m). Empty lanes hold m = -inf, s = 0."""
    best = tl.max(tl.where(m != m, float("-inf"), m), axis=0)
    best = tl.where(best == float("-inf"), 0.0, best)
    return best + tl.log(tl.sum(s * tl.exp(m - best), axis=0))


@triton.jit
def tempered(fused, temperature, row, PER_ROW: tl.constexpr):
    """Scores over temperature, rounded as torch's division is; a greedy row (temperature 0) keeps its scores."""
    t = load_parameter(temperature, row, PER_ROW, tl.float32)
    return tl.div_rn(fused, tl.zeros_like(fused) + tl.where(t == 0.0, 1.0, t))


@triton.jit
def load_parameter(parameter, row, PER_ROW: tl.constexpr, DTYPE: tl.constexpr):
    """A parameter of sampling: one value for all rows, or a pointer to one per row."""
    if PER_ROW:
        return tl.load(parameter + row)
    else:
        return tl.full((), 0, DTYPE) + parameter  # the interpreter hands Python numbers through
