"""Metrics as quotients of two sums over items (SFT samples and preference pairs), such as loss by label tokens.

Sums add up over micro-batches, steps and ranks, so that a logged mean is that of all items, however they were batched.
A quotient whose denominator is zero (routing accuracy without an informative position) is left out, never shown as 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .losses import IGNORE

NAMES = (
    *("loss", "loss_lm", "loss_routing", "loss_cdpo", "routing/accuracy", "routing/informative"),
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("cdpo/bias", "cdpo/bias_magnitude", "cdpo/accuracy"),
)

# Of every item a part of the numerator and a part of the denominator.
Quotients = Mapping[str, tuple[Tensor, Tensor]]


class Tally:
    """Sums of numerators and denominators, ``[metrics, 2]`` float64.

    Args:
        experts: their names, in the order of the route head's rows.
    """

    def __init__(self, experts: Sequence[str]) -> None:
        self.names = [*NAMES, *(f"routing/usage/{name}" for name in experts)]
        self.sums = torch.zeros(len(self.names), 2, dtype=torch.float64)

    def matrix(self, quotients: Quotients, items: int) -> Tensor:
        """``[items, metrics, 2]`` from ``[items]`` per part, float64 where the device has it; other metrics are 0."""
        device = quotients["loss"][0].device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        out = torch.zeros(items, len(self.names), 2, dtype=dtype, device=device)
        for name, parts in quotients.items():
            for side, part in enumerate(parts):
                out[:, self.names.index(name), side] = part.detach().to(dtype)
        return out

    def add(self, matrix: Tensor) -> None:
        """Add the items of a :meth:`matrix`."""
        self.sums = self.sums.to(matrix) + matrix.sum(dim=0)

    def clear(self) -> None:
        """Begin anew."""
        self.sums = torch.zeros_like(self.sums)

    def results(self) -> dict[str, float]:
        """The quotients that have a denominator, by name."""
        sums = zip(self.names, self.sums.tolist(), strict=True)
        return {name: top / below for name, (top, below) in sums if below > 0}


def routing_quotients(
    weights: Tensor, expert_logprobs: Tensor, labels: Tensor, informative: Tensor, experts: Sequence[str]
) -> Quotients:
    """Routing accuracy, the share of informative positions, and usage per expert, of B rows.

    At an informative position the best expert is right, the one that gives the label the highest probability; of
    several such experts each is.

    Args:
        weights, expert_logprobs: ``[B, K, n]``.
        labels, informative: ``[B, K]``.
        experts: n names.
    """
    labelled = labels != IGNORE  # (B, K)
    positions, decided = labelled.sum(dim=1), informative.sum(dim=1)  # (B,)
    selected = weights.detach().argmax(dim=-1)  # (B, K)
    right = expert_logprobs.gather(-1, selected[..., None])[..., 0] >= expert_logprobs.amax(dim=-1)
    found = {
        "routing/accuracy": ((right & informative).sum(dim=1), decided),
        "routing/informative": (decided, positions),
    }
    for i, name in enumerate(experts):
        found[f"routing/usage/{name}"] = (((selected == i) & labelled).sum(dim=1), positions)
    return found
