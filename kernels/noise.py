"""Gumbel noise keyed by (seed, step, vocabulary id): the same number wherever and however it is computed.

Token ``v`` takes word ``v mod 4`` of Philox4x32-10 (Salmon et al., 2011) with the 64-bit seed as key and the counter
``(v // 4, step low, step high, 0)``. A draw therefore depends neither on the batch around it, nor on tiles, nor on the
device, up to the last bits of the logarithm.

The word ``r`` becomes ``u = (r + 1/2) / 2^32`` and ``-log(-log(1 - u))``. Large noise, the only kind that wins among
100k tokens, comes from small ``u``, where float32 resolves all 32 bits; the usual ``-log(-log(u))`` would take it from
``u`` next to 1 in steps of 2^-24.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LARGEST_U = 1.0 - 2.0**-24  # so that 1 - u is never 0


def gumbel_noise(seed: Tensor, step: Tensor, vocab_size: int) -> Tensor:
    """``[B, V]`` float32 for seeds and steps ``[B]`` (integers; int64 is taken whole, sign bit included)."""
    groups = (vocab_size + 3) // 4
    seed, step = seed.long()[:, None], step.long()[:, None]
    counter = [torch.arange(groups, device=seed.device)[None, :], step & _WORD, (step >> 32) & _WORD, 0 * step]
    key = [seed & _WORD, (seed >> 32) & _WORD]
    words = torch.stack([word.expand(len(seed), groups) for word in philox(counter, key)], dim=-1)
    return gumbel(words.flatten(1)[:, :vocab_size])


def gumbel(words: Tensor) -> Tensor:
    """Words (int64 holding 32 bits) to standard Gumbel float32."""
    u = ((words.float() + 0.5) * 2.0**-32).clamp(max=LARGEST_U)
    w = 1.0 - u
    # log1p(-u) without log1p, which Triton lacks: log(w) is that of a rounded w, and u / (1 - w) mends the rounding.
    exponential = torch.where(w == 1.0, u, -w.log() * (u / (1.0 - w)))
    return -exponential.log()


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product, by halves: int64 would overflow."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
