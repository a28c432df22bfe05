"""NumPy twin of FusionRoute's training losses (arXiv 2601.05106, section 4), written to be read beside the paper.

This file is the oracle of the torch losses. It takes one sequence at a time, without padding, and favours loops over
speed. Symbols: ``z`` logits, ``w`` routing weights ``W h_t``, ``n`` experts, ``V`` the shared vocabulary, ``S`` the
informative positions, ``lam`` the paper's λ. A sequence has ``T`` tokens and ``T`` labels, -100 where there is nothing
to learn; what is known at position ``t`` predicts ``labels[t + 1]``, so the first label is never used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ids = NDArray[np.int64]

IGNORE = -100


@dataclass(frozen=True)
class Sample:
    """One sequence as every sub-model sees it."""

    router_logits: Array  # [T, V], of π_θ
    weights: Array  # [T, n], W h_t
    expert_logits: Sequence[Array]  # n times [T, V_i], V_i >= V
    labels: Ids  # [T]


@dataclass(frozen=True)
class Pair:
    """A preference pair; the references are the sums of log π_ref over each completion."""

    chosen: Sample
    rejected: Sample
    reference_chosen: float
    reference_rejected: float


def log_softmax(z: Array) -> Array:
    """log π(v) for one position, ``[V]``."""
    shifted = z - z.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def predictions(labels: Ids) -> list[tuple[int, int]]:
    """The pairs (t, y) of a position and the label it predicts."""
    return [(t, int(labels[t + 1])) for t in range(len(labels) - 1) if labels[t + 1] != IGNORE]


def expert_logprobs(s: Sample, t: int) -> list[Array]:
    """log π_i(· | y≤t) over v < V for each expert."""
    V = s.router_logits.shape[1]
    return [log_softmax(np.asarray(z[t, :V], dtype=np.float64)) for z in s.expert_logits]


def informative(s: Sample) -> list[int]:
    """S: positions with a label at which some pair of experts disagrees in its most likely token over v < V."""
    return [t for t, _ in predictions(s.labels) if len({int(p.argmax()) for p in expert_logprobs(s, t)}) > 1]


def lm_loss(s: Sample) -> float:
    """−Σ_t log π_θ(y_t+1), a sum."""
    return -sum(float(log_softmax(s.router_logits[t])[y]) for t, y in predictions(s.labels))


def routing_loss_normalized(w: Array, logprobs: Sequence[Array], y: int) -> float:
    """−log softmax_v(Σ_i w_i log π_i(v))[y]: the paper's "aggregated logits" as the input of a cross-entropy."""
    aggregated = sum((w[i] * logprobs[i] for i in range(len(w))), start=np.zeros_like(logprobs[0]))
    return -float(log_softmax(aggregated)[y])


def routing_loss_softmax(w: Array, logprobs: Sequence[Array], y: int) -> float:
    """−Σ_i softmax(w)_i log π_i(y): the other reading, which needs the experts' label log-probabilities alone."""
    share = np.exp(log_softmax(w))
    return -sum(float(share[i] * logprobs[i][y]) for i in range(len(w)))


def routing_loss(s: Sample, reading: str) -> float:
    """L_expert = Σ_{t∈S} ℓ_t, a sum."""
    one = {"normalized": routing_loss_normalized, "softmax": routing_loss_softmax}[reading]
    return sum(one(s.weights[t], expert_logprobs(s, t), int(s.labels[t + 1])) for t in informative(s))


def sft_loss(batch: Sequence[Sample], reading: str, lam: float = 1 / 3) -> float:
    """L_SFT = (L_LM + λ L_expert) / N, N the label tokens of the whole batch."""
    N = sum(len(predictions(s.labels)) for s in batch)
    return sum(lm_loss(s) + lam * routing_loss(s, reading) for s in batch) / N


def selected_logprob(s: Sample) -> float:
    """Σ_t log π_{I_t}(y_t+1), I_t = argmax_i w_t,i, ties to the lowest index."""
    return sum(float(expert_logprobs(s, t)[int(s.weights[t].argmax())][y]) for t, y in predictions(s.labels))


def margin(pair: Pair, beta: float) -> float:
    """ℓ, the reward margin of the router alone."""
    chosen = -lm_loss(pair.chosen) - pair.reference_chosen
    rejected = -lm_loss(pair.rejected) - pair.reference_rejected
    return beta * chosen - beta * rejected


def bias(pair: Pair, beta: float, alpha: float = 1.0) -> float:
    """αβ Σ (chosen − rejected) of the selected experts' log-probabilities."""
    return alpha * beta * (selected_logprob(pair.chosen) - selected_logprob(pair.rejected))


def cdpo_loss(pair: Pair, beta: float = 0.1, alpha: float = 1.0) -> float:
    """−log σ(ℓ + bias)."""
    return float(np.logaddexp(0.0, -(margin(pair, beta) + bias(pair, beta, alpha))))


def mix_loss(
    samples: Sequence[Sample],
    pairs: Sequence[Pair],
    reading: str,
    *,
    lam: float = 1 / 3,
    beta: float = 0.1,
    alpha: float = 1.0,
) -> float:
    """Algorithm 1: ( λ Σ_s L_SFT(s) + Σ_p L_CDPO(p) ) / (n_s + n_p), each L_SFT(s) over its own tokens."""
    total = sum(lam * sft_loss([s], reading, lam) for s in samples)
    total += sum(cdpo_loss(pair, beta, alpha) for pair in pairs)
    return total / (len(samples) + len(pairs))
