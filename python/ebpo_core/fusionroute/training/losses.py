"""FusionRoute's training losses in torch (arXiv 2601.05106, section 4); ``reference.py`` is the same in plain NumPy.

Everything here is already shifted: position ``t`` of ``logits``, ``weights``, ``informative`` and ``expert_logprobs``
is the one that predicts ``labels[t]``. Labels are -100 where there is nothing to learn. Arithmetic is in float32, or
in float64 where the router's logits are. Nothing here reduces over a batch: what a sum is divided by depends on the
other ranks and accumulation steps, which the trainers know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
# Positions of the "normalized" routing loss are taken in chunks of about this many float32 values (128 MiB).
CHUNK_VALUES = 1 << 25


def label_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """log softmax(logits)[label], and 0 where the label is -100.

    Args:
        logits: ``[..., V]``, any float dtype.
        labels: ``[...]`` int64, below V.

    Returns:
        ``[...]`` float32 (float64 for float64 logits), differentiable in the logits.
    """
    logits = _wide(logits)
    flat = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORE, reduction="none"
    )
    return -flat.reshape(labels.shape)


def routing_loss_softmax(weights: Tensor, expert_logprobs: Tensor) -> Tensor:
    """−Σ_i softmax(w)_i log π_i(y): ``[...]`` from weights ``[..., n]`` and label log-probabilities ``[..., n]``."""
    weights = _wide(weights)
    return -(weights.softmax(dim=-1) * expert_logprobs.to(weights.dtype)).sum(dim=-1)


def routing_loss_normalized(
    weights: Tensor, expert_logits: Sequence[Tensor], labels: Tensor, *, vocab_size: int, chunk: int | None = None
) -> Tensor:
    """−log softmax_v(Σ_i w_i log π_i)[y] over v < V, in memory of one chunk of positions.

    The experts' normalisers are constant in v and drop out, so that their logits serve. The derivative by w_i is
    E_softmax[z_i] − z_i(y); it is computed with the loss, so that nothing as wide as V is kept for the backward pass.
    There is no gradient to the experts.

    Args:
        weights: ``[P, n]``.
        expert_logits: n tensors ``[P, V_i]``, ``V_i >= vocab_size``, any float dtype.
        labels: ``[P]`` int64 below ``vocab_size``, none of them -100.
        vocab_size: V.
        chunk: positions at once; by default as many as 128 MiB hold.

    Returns:
        ``[P]`` in the dtype of the weights (float32 if that is narrower), differentiable once in the weights.
    """
    if weights.ndim != 2 or len(expert_logits) != weights.shape[1]:
        raise ValueError(
            f"weights has shape {tuple(weights.shape)} and there are {len(expert_logits)} expert_logits: "
            "give weights [P, n] and the logits of all n experts"
        )
    for i, logits in enumerate(expert_logits):
        if logits.ndim != 2 or logits.shape[0] != weights.shape[0] or logits.shape[1] < vocab_size:
            raise ValueError(
                f"expert_logits[{i}] has shape {tuple(logits.shape)}: give [{weights.shape[0]}, V_i] with V_i >= "
                f"vocab_size={vocab_size}"
            )
    if chunk is None:
        chunk = max(1, CHUNK_VALUES // max(1, len(expert_logits) * vocab_size))
    losses: Tensor = _NormalizedRouting.apply(_wide(weights), labels, vocab_size, chunk, *expert_logits)
    return losses


class _NormalizedRouting(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, labels: Tensor, vocab_size: int, chunk: int, *expert_logits: Tensor
    ) -> Tensor:
        losses = weights.new_empty(weights.shape[0])
        gradient = torch.empty_like(weights)
        for start in range(0, weights.shape[0], chunk):
            part = slice(start, start + chunk)
            w = weights[part]
            # Every expert is taken about its own maximum: a difference of large logits keeps its digits then.
            z = torch.stack([logits[part, :vocab_size].to(w.dtype) for logits in expert_logits], dim=1)  # [P, n, V]
            z = z - z.amax(dim=-1, keepdim=True)
            aggregated = torch.einsum("pn,pnv->pv", w, z)
            logprobs = aggregated.log_softmax(dim=-1)
            y = labels[part, None]
            losses[part] = -logprobs.gather(1, y)[:, 0]
            at_label = z.gather(2, y[:, None, :].expand(-1, z.shape[1], -1))[..., 0]
            gradient[part] = torch.einsum("pv,pnv->pn", logprobs.exp(), z) - at_label
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        experts = len(ctx.needs_input_grad) - 4
        return (grad_outputs[0][:, None] * gradient, None, None, None, *[None] * experts)


def selected_logprobs(weights: Tensor, expert_logprobs: Tensor) -> Tensor:
    """log π_{I_t}(y), I_t = argmax_i w_t,i (ties: the lowest index): ``[...]`` from two ``[..., n]``, no gradient."""
    selected = weights.detach().argmax(dim=-1, keepdim=True)
    return expert_logprobs.detach().gather(-1, selected).squeeze(-1)


def cdpo_bias(chosen: Tensor, rejected: Tensor, *, beta: float, alpha: float = 1.0) -> Tensor:
    """αβ (chosen − rejected): ``[P]`` from the sums of the selected experts' log-probabilities, no gradient."""
    return alpha * beta * (chosen - rejected).detach()


def cdpo_margin(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, *, beta: float
) -> Tensor:
    """ℓ = β (log π_θ − log π_ref)(chosen) − β (log π_θ − log π_ref)(rejected): ``[P]`` from sums over completions."""
    return beta * ((chosen - reference_chosen) - (rejected - reference_rejected))


def cdpo_loss(margin: Tensor, bias: Tensor) -> Tensor:
    """−log σ(ℓ + bias): ``[P]``."""
    return -torch.nn.functional.logsigmoid(margin + bias.detach())


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
