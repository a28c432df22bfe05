"""Log-probability of given tokens, of the policy that is sampled from and as the paper scores them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from . import reference
from .argmax import TOKENS
from .arguments import check_ids, check_step


class TokenLogprobs(NamedTuple):
    """Both meanings of a token's log-probability, ``[B]`` float32, and the expert ids ``[B]`` int64.

    ``logprobs``
        of the policy that is sampled from: ``log softmax(z_router + alpha z_expert)``, normalised.
    ``scores``
        the paper's fused score ``log pi_router + alpha log pi_expert``: two log-softmaxes, their sum not normalised.
    """

    logprobs: Tensor
    scores: Tensor
    expert_ids: Tensor


def select_add_logprob(
    router_logits: Tensor,
    weights: Tensor | None,
    expert_logits: Tensor | Sequence[Tensor],
    token_ids: Tensor,
    *,
    alpha: float = 1.0,
    vocab_size: int | None = None,
    layout: str | None = None,
) -> TokenLogprobs:
    """Log-probabilities of given tokens, in both meanings, at temperature 1 and before any filter.

    Differentiable in the logits: with gradients enabled and required, the PyTorch reference runs on any device.

    Args:
        router_logits, weights, expert_logits, alpha, vocab_size, layout: as in :func:`~.argmax.select_add_argmax`.
        token_ids: ``[B]`` int64 or int32. An id outside of ``0 .. V - 1`` (a padding label, say) gives NaN.

    Returns:
        :class:`TokenLogprobs`.

    Raises:
        TypeError, ValueError: as :func:`~.argmax.select_add_argmax`.
    """
    step = check_step(router_logits, weights, expert_logits, alpha, vocab_size, layout=layout)
    check_ids("token_ids", token_ids, step.batch, step.router)
    if step.requires_grad:
        logprobs, scores = reference.logprobs(step, token_ids)
        return TokenLogprobs(logprobs, scores, reference.expert_ids(step))
    _, ids, _, logprobs, scores = TOKENS(step, token_ids, True)
    return TokenLogprobs(logprobs, scores, ids)
