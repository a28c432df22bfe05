"""Argmax, and the sum itself, of the router's logits and those of one expert per row.

Every operation of this package takes the same three tensors.

``router_logits``
    ``[B, V_r]``, bfloat16, float16 or float32; rows at any stride, logits of a row side by side.
``weights``
    Routing weights ``[B, n]`` of any floating dtype, compared in that dtype (the expert is their argmax), or the
    expert ids themselves, ``[B]`` int64 or int32. None is allowed when ``expert_logits`` is one gathered tensor.
``expert_logits``
    One of: a list of n tensors ``[B, V_i]``; one tensor ``[n, B, V]``; one tensor ``[B, V]`` whose row b already
    belongs to row b's expert; a list of n tensors that hold only the rows that selected each expert, in ascending batch
    order (what lazy decoding has: their rows add up to B). Dtypes may differ from the router's and, in a list, from
    each other. ``layout`` states which: "listed", "stacked", "gathered" or "ragged"; None goes by the shapes.

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

import torch
from torch import Tensor

from . import reference
from .arguments import Step, check_step
from .dispatch import Operator, Outputs, Planned


class SelectedTokens(NamedTuple):
    """Choices of a decode step: ``token_ids`` and ``expert_ids``, ``[B]`` int64.

    The others are ``[B]`` float32, None unless asked for: ``fused_logits``, the winning ``z_router + alpha z_expert``;
    ``logprobs`` and ``scores`` as in :class:`~.logprob.TokenLogprobs`.
    """

    token_ids: Tensor
    expert_ids: Tensor
    fused_logits: Tensor | None = None
    logprobs: Tensor | None = None
    scores: Tensor | None = None


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
    layout: str | None = None,
) -> SelectedTokens:
    """Select one expert per row, add its logits to the router's, return the best token.

    Each logit that is needed is read once, where it lies; nothing is stacked, copied or written back.

    Args:
        router_logits: ``[B, V_r]``.
        weights: routing weights ``[B, n]``, or expert ids ``[B]``, or None with gathered logits.
        expert_logits: see the module's docstring for the four layouts.
        alpha: weight of the expert's logits. At 0 an expert's infinity still gives NaN, as IEEE arithmetic has it.
        vocab_size: V, the number of leading columns that take part; by default the smallest width given.
        round_sum: round as eager arithmetic in the inputs' dtypes does (see the module's docstring).
        return_logits: also return the winning fused logits.
        return_logprobs: also return the token's log-probability and score (three more sums in the same pass).
        layout: of ``expert_logits``; by default what the shapes say.

    Returns:
        :class:`SelectedTokens`.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is none of those above.
        ValueError: shapes, strides, devices, ``alpha``, ``vocab_size`` or ``layout`` do not fit together.
    """
    step = check_step(router_logits, weights, expert_logits, alpha, vocab_size, round_sum, layout)
    if return_logprobs and step.requires_grad:
        tokens, ids, logits = reference.argmax(step)
        logprobs, scores = reference.logprobs(step, tokens)
    else:
        tokens, ids, logits, logprobs, scores = TOKENS(step, None, return_logprobs)
    return SelectedTokens(
        tokens,
        ids,
        logits if return_logits else None,
        logprobs if return_logprobs else None,
        scores if return_logprobs else None,
    )


def select_add(
    router_logits: Tensor,
    weights: Tensor | None,
    expert_logits: Tensor | Sequence[Tensor],
    *,
    alpha: float = 1.0,
    vocab_size: int | None = None,
    round_sum: bool = False,
    layout: str | None = None,
) -> Tensor:
    """The fused logits ``[B, V]`` float32, for callers that must see them (logits processors, other samplers).

    Whoever needs only tokens should call :func:`select_add_argmax` or :func:`select_add_sample`: they write none of
    this. Arguments and errors as in :func:`select_add_argmax`; differentiable in the logits through the reference.
    """
    step = check_step(router_logits, weights, expert_logits, alpha, vocab_size, round_sum, layout)
    if step.requires_grad:
        return reference.fused_logits(step, reference.expert_ids(step))
    fused: Tensor = ADD(step)[0]
    return fused


# ----------------------------------------------------------------------------------------------------------- operators


def _tokens_reference(step: Step, given: Tensor | None, logprobs: bool) -> Outputs:
    if given is None:
        tokens, ids, logits = reference.argmax(step)
        return tokens, ids, logits, *(reference.logprobs(step, tokens) if logprobs else (None, None))
    return None, reference.expert_ids(step), None, *(reference.logprobs(step, given) if logprobs else (None, None))


def _tokens_kernels(step: Step, given: Tensor | None, logprobs: bool) -> Planned:
    from .argmax_triton import tokens

    return tokens(step, given, logprobs)


def _tokens_fake(step: Step, given: Tensor | None, logprobs: bool) -> Outputs:
    def new(dtype: torch.dtype, wanted: bool) -> Tensor | None:
        return step.router.new_empty(step.batch, dtype=dtype) if wanted else None

    argmax = given is None
    tokens, ids, logits = new(torch.int64, argmax), new(torch.int64, True), new(torch.float32, argmax)
    return tokens, ids, logits, new(torch.float32, logprobs), new(torch.float32, logprobs)


def _add_reference(step: Step) -> Outputs:
    ids = reference.expert_ids(step)
    return reference.fused_logits(step, ids), ids


def _add_kernels(step: Step) -> Planned:
    from .argmax_triton import add

    return add(step)


def _add_fake(step: Step) -> Outputs:
    new = step.router.new_empty
    return new(step.batch, step.vocab_size, dtype=torch.float32), new(step.batch, dtype=torch.int64)


# Token ids (unless given), expert ids, fused logits (unless given), log-probabilities and scores (if asked for), [B].
TOKENS = Operator(
    "select_add_tokens",
    "Tensor? tokens, bool logprobs",
    outputs=5,
    reference=_tokens_reference,
    kernels=_tokens_kernels,
    fake=_tokens_fake,
)
# Fused logits [B, V], expert ids [B].
ADD = Operator("select_add", "", outputs=2, reference=_add_reference, kernels=_add_kernels, fake=_add_fake)
