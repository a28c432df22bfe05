"""Select an expert per row, add its logits to the router's: the best token, log-probabilities, or the sum itself.

Every function takes the same three tensors.

``router_logits``
    ``[B, V_r]``, bfloat16, float16 or float32; rows at any stride, logits of a row side by side.
``weights``
    Routing weights ``[B, n]`` of any floating dtype, compared in that dtype (the expert is their argmax), or the
    expert ids themselves, ``[B]`` int64 or int32. None is allowed when ``expert_logits`` is one gathered tensor.
``expert_logits``
    One of: a list of n tensors ``[B, V_i]``; one tensor ``[n, B, V]``; one tensor ``[B, V]`` whose row b already
    belongs to row b's expert; a list of n tensors that hold only the rows that selected each expert, in ascending batch
    order (what lazy decoding has: their rows add up to B). Dtypes may differ from the router's and, in a list, from
    each other.

Exactness. ``fused = router + alpha * expert`` in float32: the product is rounded, then the sum; never contracted to one
fused multiply-add, on any device. ``round_sum=True`` instead gives, bit for bit, what eager
``router_logits + alpha * expert_logits`` gives in the inputs' own dtypes. Ties, NaN and infinities are those of
:func:`torch.argmax`: the lowest index among equals, the first NaN before every number, -inf masks a token on either
side, and a row that is -inf throughout gives index 0. A row whose expert id is out of range, or whose expert holds no
row for it, is NaN throughout, hence token 0: never an illegal access, and never a wait for the device to find out.

CPU tensors, and tensors that require gradients, take the PyTorch reference; GPU tensors the Triton kernels, in two
launches, without host synchronisation, safe under CUDA graphs and torch.compile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from . import ops, reference
from .arguments import check_ids, check_step


class SelectedTokens(NamedTuple):
    """What a decode step chose: ``token_ids`` and ``expert_ids``, ``[B]`` int64.

    The others are ``[B]`` float32, None unless asked for: ``fused_logits``, the winning ``z_router + alpha z_expert``;
    ``logprobs`` and ``scores`` as in :class:`TokenLogprobs`.
    """

    token_ids: Tensor
    expert_ids: Tensor
    fused_logits: Tensor | None = None
    logprobs: Tensor | None = None
    scores: Tensor | None = None


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


def select_add_argmax(
    router_logits: Tensor,
    weights: Tensor | None,
    expert_logits: Tensor | Sequence[Tensor],
    *,
    alpha: float = 1.0,
    vocab_size: int | None = None,
    round_sum: bool = False,
    return_logits: bool = False,
    return_logprobs: bool = False,
) -> SelectedTokens:
    """Select one expert per row, add its logits to the router's, return the best token.

    Each logit that is needed is read once, where it lies; nothing is stacked, copied or written back.

    Args:
        router_logits: ``[B, V_r]``.
        weights: routing weights ``[B, n]``, or expert ids ``[B]``, or None with gathered logits.
        expert_logits: see the module's docstring for the four forms.
        alpha: weight of the expert's logits. At 0 an expert's infinity still gives NaN, as IEEE arithmetic has it.
        vocab_size: V, the number of leading columns that take part; by default the smallest width given.
        round_sum: round as eager arithmetic in the inputs' dtypes does (see the module's docstring).
        return_logits: also return the winning fused logits.
        return_logprobs: also return the token's log-probability and score (three more sums in the same pass).

    Returns:
        :class:`SelectedTokens`.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is none of those above.
        ValueError: shapes, strides, devices, ``alpha`` or ``vocab_size`` do not fit together.
    """
    step = check_step(router_logits, weights, expert_logits, alpha, vocab_size, round_sum)
    if return_logprobs and step.requires_grad:
        tokens, ids, logits = reference.argmax(step)
        logprobs, scores = reference.logprobs(step, tokens)
    else:
        tokens, ids, logits, logprobs, scores = ops.select_add_tokens(step, None, return_logprobs)
    return SelectedTokens(
        tokens,
        ids,
        logits if return_logits else None,
        logprobs if return_logprobs else None,
        scores if return_logprobs else None,
    )


def select_add_logprob(
    router_logits: Tensor,
    weights: Tensor | None,
    expert_logits: Tensor | Sequence[Tensor],
    token_ids: Tensor,
    *,
    alpha: float = 1.0,
    vocab_size: int | None = None,
) -> TokenLogprobs:
    """Log-probabilities of given tokens, in both meanings, at temperature 1 and before any filter.

    Differentiable in the logits: with gradients enabled and required, the PyTorch reference runs on any device.

    Args:
        router_logits, weights, expert_logits, alpha, vocab_size: as in :func:`select_add_argmax`.
        token_ids: ``[B]`` int64 or int32. An id outside of ``0 .. V - 1`` (a padding label, say) gives NaN.

    Returns:
        :class:`TokenLogprobs`.

    Raises:
        TypeError, ValueError: as :func:`select_add_argmax`.
    """
    step = check_step(router_logits, weights, expert_logits, alpha, vocab_size)
    check_ids("token_ids", token_ids, step.batch, step.router)
    if step.requires_grad:
        logprobs, scores = reference.logprobs(step, token_ids)
        return TokenLogprobs(logprobs, scores, reference.expert_ids(step))
    _, ids, _, logprobs, scores = ops.select_add_tokens(step, token_ids, True)
    return TokenLogprobs(logprobs, scores, ids)


def select_add(
    router_logits: Tensor,
    weights: Tensor | None,
    expert_logits: Tensor | Sequence[Tensor],
    *,
    alpha: float = 1.0,
    vocab_size: int | None = None,
    round_sum: bool = False,
) -> Tensor:
    """The fused logits ``[B, V]`` float32, for callers that must see them (logits processors, other samplers).

    Whoever needs only tokens should call :func:`select_add_argmax` or :func:`select_add_sample`: they write none of
    this. Arguments and errors as in :func:`select_add_argmax`; differentiable in the logits through the reference.
    """
    step = check_step(router_logits, weights, expert_logits, alpha, vocab_size, round_sum)
    if step.requires_grad:
        return reference.fused_logits(step, reference.expert_ids(step))
    return ops.select_add(step)[0]
