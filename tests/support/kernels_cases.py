"""Inputs shared by the kernels' tests, and the definition they are held against, in scalars."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import strategies as st
from kernels_device import ON_GPU

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Few distinct values, so that ties, NaN and infinities meet in nearly every example; 256 is the first value after which
# bfloat16 sums round, and the subnormal shows that nothing is flushed to zero.
VALUES = st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.0, 256.0, 257.0, 1e-40, 3.0e38, INF, -INF, -INF, NAN])
POISON = 2000.0  # in columns and rows that must not be read: it would win every comparison


def first_best(values) -> int:
    """Index of the first NaN, else of the first maximum: what torch.argmax promises, in scalars."""
    best = 0
    for i, value in enumerate(values):
        if math.isnan(value):
            return i
        if value > values[best]:
            best = i
    return best


def brute_force(router, weights, experts, alpha=1.0, vocab_size=None) -> tuple[list[int], list[int]]:
    """Token ids and expert ids by the definition, one float32 operation at a time."""
    size = vocab_size or min(x.shape[-1] for x in [router, *experts])
    tokens, chosen = [], []
    with np.errstate(invalid="ignore", over="ignore"):
        for b in range(router.shape[0]):
            e = first_best(weights[b].tolist())
            row = []
            for v in range(size):
                product = np.float32(alpha) * np.float32(experts[e][b, v].item())
                row.append(float(np.float32(router[b, v].item()) + product))
            tokens.append(first_best(row))
            chosen.append(e)
    return tokens, chosen


def as_read(x: torch.Tensor) -> torch.Tensor:
    """Without bfloat16 subnormals where no GPU is: Triton's interpreter reads them as zero, which devices do not."""
    if ON_GPU or x.dtype != torch.bfloat16:
        return x
    return torch.where(x.abs() < torch.finfo(x.dtype).tiny, torch.zeros_like(x), x)


def padded(values: torch.Tensor, width: int, gap: int = 0) -> torch.Tensor:
    """The same values as a view whose rows lie ``width + gap`` apart, ``width`` columns wide, the rest poisoned."""
    rows, V = values.shape
    storage = torch.full((rows, width + gap), POISON, dtype=values.dtype)
    storage[:, :V] = values
    return storage[:, :width]


def ragged(experts, ids) -> list[torch.Tensor]:
    """Only the rows that selected each expert, in ascending batch order."""
    return [expert[ids == i] for i, expert in enumerate(experts)]


def random_step(B, n, V, dtype=torch.float32, seed=0, scale=1.0):
    """Router, weights, list of experts; rounded to quarters, so that ties abound."""
    g = torch.Generator().manual_seed(seed)

    def logits():
        return (torch.randn(B, V, generator=g) * 4 * scale).round().div(4).to(dtype)

    return logits(), torch.randn(B, n, generator=g), [logits() for _ in range(n)]


@st.composite
def steps(draw, max_vocab=6, max_batch=3, max_experts=4):
    """Router, weights, experts, options: mixed dtypes and widths, padded rows, VALUES throughout."""
    batch, n = draw(st.integers(1, max_batch)), draw(st.integers(1, max_experts))
    dtypes = st.sampled_from(DTYPES)

    def matrix(rows, columns, dtype):
        values = draw(st.lists(VALUES, min_size=rows * columns, max_size=rows * columns))
        return torch.tensor(values, dtype=torch.float64).reshape(rows, columns).to(dtype)

    def logits():
        columns = draw(st.integers(1, max_vocab))
        return padded(as_read(matrix(batch, columns, draw(dtypes))), columns, gap=draw(st.integers(0, 2)))

    router, experts = logits(), [logits() for _ in range(n)]
    smallest = min(x.shape[1] for x in [router, *experts])
    options = {
        "alpha": draw(st.sampled_from([1.0, 0.0, -1.0, 0.1, 2.0])),
        "vocab_size": draw(st.one_of(st.none(), st.integers(1, smallest))),
    }
    return router, matrix(batch, n, torch.float32), experts, options
