"""The routing in a server's log-probabilities: extra vocabulary ids behind the V real ones.

An engine's API returns log-probabilities of tokens and nothing else from inside a model. So the served model has n + 2
more columns than its vocabulary, which no request can make it emit (see :mod:`.guard`), and a client asks for the
log-probabilities of their ids. With n experts, at a token that expert s was selected for with softmax weights w:

    id V + i        -BASE + SCALE * w_i          for i = s        (above -BASE)
                    -BASE - SCALE * (1 - w_i)    for i != s       (below -BASE)
    id V + n        -BASE - (own // DIGIT)       own: the token that expert s itself finds most likely
    id V + n + 1    -BASE - (own % DIGIT)

BASE is large, so that the columns have no share in the probabilities (e^-5000 is 0 in float32 and float64), and small
enough for servers that cut log-probabilities at -9999. At that size float32 resolves weights to 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

BASE = 5000.0
SCALE = 1000.0
DIGIT = 4096
OWN_COLUMNS = 2
_LOWEST = -BASE - DIGIT + 0.5
_DIGIT_SLACK = 0.05  # what rounding moves a digit by is below 0.002
_SHARE_SLACK = 1e-3  # and a weight by below 1e-6


class RoutedColumn(NamedTuple):
    """The routing of one token: the selected expert's index, its softmax weight, its own argmax."""

    expert: int
    weight: float
    own: int


def extra_columns(num_experts: int) -> int:
    """The number of columns behind the vocabulary."""
    return num_experts + OWN_COLUMNS


def routing_ids(vocab_size: int, num_experts: int) -> list[int]:
    """The ids whose log-probabilities a client asks for, in the order that :func:`decode` takes them."""
    return list(range(vocab_size, vocab_size + extra_columns(num_experts)))


def encode(expert_ids: Tensor, weights: Tensor, own: Tensor) -> Tensor:
    """The columns' log-probabilities, ``[B, n + 2]`` float32.

    Args:
        expert_ids: selected experts, ``[B]`` int64.
        weights: routing weights ``W h``, ``[B, n]``, before their softmax.
        own: the selected experts' argmax tokens, ``[B]`` int64.
    """
    import torch

    share = weights.float().softmax(-1)
    columns = -BASE - SCALE * (1 - share)
    chosen = expert_ids[:, None]
    columns.scatter_(1, chosen, -BASE + SCALE * share.gather(1, chosen))
    digits = torch.stack([own // DIGIT, own % DIGIT], dim=1).to(columns.dtype)
    return torch.cat([columns, -BASE - digits], dim=1)


def decode(values: Sequence[float]) -> RoutedColumn:
    """The routing that :func:`encode` wrote, from the n + 2 log-probabilities of one token.

    Raises:
        ValueError: these are not such columns: another server's, or ones that a grammar or a setting masked.
    """
    if len(values) > OWN_COLUMNS and all(map(math.isfinite, values)) and min(values) >= _LOWEST:
        *experts, high, low = [value + BASE for value in values]
        selected = [index for index, value in enumerate(experts) if value > 0]
        # Weights sum to 1, and digits are whole: values that are not relative to the vocabulary's sum (raw logits, say)
        # would else give other weights and another token.
        total = sum(value / SCALE if value > 0 else 1 + value / SCALE for value in experts)
        digits = [round(-high), round(-low)]
        slack = max(abs(-high - digits[0]), abs(-low - digits[1]))
        if len(selected) == 1 and min(digits) >= 0 and slack < _DIGIT_SLACK and abs(total - 1) < _SHARE_SLACK:
            weight = min(experts[selected[0]] / SCALE, 1.0)
            return RoutedColumn(selected[0], weight, digits[0] * DIGIT + digits[1])
    raise ValueError(
        f"log-probabilities {list(values)} carry no routing: the server must serve a FusionRoute checkpoint with "
        "logprobs_mode raw_logprobs, and under a grammar (structured outputs) the columns are masked"
    )
