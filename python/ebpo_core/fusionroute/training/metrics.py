"""Sums over items (SFT samples and preference pairs), from which every logged number is a quotient of two.

Sums add up over micro-batches, steps and ranks, so that a logged mean is that of all items, however they were batched.
A quotient whose denominator is zero (routing accuracy without an informative position) is left out, never shown as 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Columns of sums, one value per item.
SAMPLES, PAIRS = "samples", "pairs"
TOKENS, LM, ROUTING, SFT = "tokens", "lm", "routing", "sft"
POSITIONS, INFORMATIVE, CORRECT, USAGE = "positions", "informative", "correct", "usage"
CDPO, MARGIN, CHOSEN, REJECTED = "cdpo", "margin", "chosen", "rejected"
BIAS, MAGNITUDE, PREFERRED, PREFERRED_ALONE = "bias", "magnitude", "preferred", "preferred_alone"

_QUOTIENTS = {
    "loss_lm": (LM, TOKENS),
    "loss_routing": (ROUTING, TOKENS),
    "loss_cdpo": (CDPO, PAIRS),
    "routing/accuracy": (CORRECT, INFORMATIVE),
    "routing/informative": (INFORMATIVE, POSITIONS),
    "rewards/chosen": (CHOSEN, PAIRS),
    "rewards/rejected": (REJECTED, PAIRS),
    "rewards/margins": (MARGIN, PAIRS),
    "rewards/accuracies": (PREFERRED_ALONE, PAIRS),
    "cdpo/bias": (BIAS, PAIRS),
    "cdpo/bias_magnitude": (MAGNITUDE, PAIRS),
    "cdpo/accuracy": (PREFERRED, PAIRS),
}


class Tally:
    """Sums of the columns above, and a ``usage/<index>`` per expert.

    Args:
        experts: their names, in the order of the route head's rows.
    """

    def __init__(self, experts: Sequence[str]) -> None:
        self.experts = list(experts)
        columns = [SAMPLES, PAIRS, TOKENS, LM, ROUTING, SFT, POSITIONS, INFORMATIVE, CORRECT, CDPO, MARGIN]
        columns += [CHOSEN, REJECTED, BIAS, MAGNITUDE, PREFERRED, PREFERRED_ALONE]
        self.columns = [*columns, *(f"{USAGE}/{i}" for i in range(len(self.experts)))]
        self.sums = torch.zeros(len(self.columns), dtype=torch.float64)

    def matrix(self, values: dict[str, Tensor], items: int) -> Tensor:
        """``[items, columns]`` from ``[items]`` per column, float64 where the device has it; others are 0."""
        device = next(iter(values.values())).device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        out = torch.zeros(items, len(self.columns), dtype=dtype, device=device)
        for name, value in values.items():
            out[:, self.columns.index(name)] = value.detach().to(dtype)
        return out

    def add(self, matrix: Tensor) -> None:
        """Add the items of a :meth:`matrix`."""
        self.sums = self.sums.to(matrix) + matrix.sum(dim=0)

    def clear(self) -> None:
        self.sums = torch.zeros_like(self.sums)

    def results(self) -> dict[str, float]:
        """The quotients that have a denominator."""
        sums = dict(zip(self.columns, self.sums.tolist(), strict=True))
        usage = {f"routing/usage/{name}": (f"{USAGE}/{i}", POSITIONS) for i, name in enumerate(self.experts)}
        quotients = _QUOTIENTS | usage
        return {name: sums[top] / sums[below] for name, (top, below) in quotients.items() if sums[below] > 0}

    def total(self, column: str) -> float:
        return float(self.sums[self.columns.index(column)])


def routing_columns(weights: Tensor, expert_logprobs: Tensor, labels: Tensor, informative: Tensor) -> dict[str, Tensor]:
    """Per row of ``[B, K]``: positions with a label, informative ones, and those where the best expert is selected.

    The best expert is the one that gives the label the highest probability; with several, each counts as right. The
    usage per expert comes as ``[B]`` under the key ``usage/<index>``.
    """
    labelled = labels != -100
    selected = weights.detach().argmax(dim=-1, keepdim=True)
    right = expert_logprobs.gather(-1, selected)[..., 0] >= expert_logprobs.amax(dim=-1)
    columns = {
        POSITIONS: labelled.sum(dim=1),
        INFORMATIVE: informative.sum(dim=1),
        CORRECT: (right & informative).sum(dim=1),
    }
    for i in range(weights.shape[-1]):
        columns[f"{USAGE}/{i}"] = ((selected[..., 0] == i) & labelled).sum(dim=1)
    return columns
