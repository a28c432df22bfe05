"""Experimental: router and expert LM heads, their sum and its argmax in one pass, without writing logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch, launch
from .argmax import SelectedTokens, select_add_argmax
from .arguments import check_alpha, check_device, check_logits, check_matrix, check_selection, check_vocab_size


def lm_head_select_add_argmax(
    router_hidden: Tensor,
    router_head: Tensor,
    weights: Tensor,
    expert_hidden: Tensor,
    expert_heads: Tensor | Sequence[Tensor],
    *,
    alpha: float = 1.0,
    vocab_size: int | None = None,
) -> SelectedTokens:
    """Experimental. The tokens of :func:`~.argmax.select_add_argmax` from hidden states and LM heads.

    Logits live in registers only, as float32 sums: they are never rounded to bfloat16, so that tokens can differ from
    those of separate heads where two scores are that close, and from device to device in the last bits of a sum. What
    it saves is launches and the logits' traffic, both small beside reading the heads; it is meant for batches up to 64.
    It is not a registered operator yet (call it outside of torch.compile), and its speed has not been measured.

    Args:
        router_hidden: ``[B, D_r]``, the input of the router's LM head; bfloat16, float16 or float32.
        router_head: ``[V_r, D_r]``, weight of that head, in the same dtype.
        weights: routing weights ``[B, n]``, or expert ids ``[B]``. A row with an id out of range gives token 0.
        expert_hidden: ``[B, D_e]``: row b is the hidden state of row b's expert.
        expert_heads: n tensors ``[V_i, D_e]``, or one ``[n, V, D_e]``, in the dtype of ``expert_hidden``.
        alpha: weight of the expert's logits.
        vocab_size: V; by default the smallest head given.

    Raises:
        TypeError, ValueError: as :func:`~.argmax.select_add_argmax`. There are no biases and no soft caps.
    """
    heads = list(expert_heads)
    if not heads:
        raise ValueError("expert_heads is empty: pass at least one head [V, D]")
    check_logits("router_hidden", router_hidden)
    check_logits("expert_hidden", expert_hidden)
    check_matrix("router_head", "[V, D]", router_head)
    pairs = [("router_head", router_head, router_hidden)]
    pairs += [(f"expert_heads[{i}]", head, expert_hidden) for i, head in enumerate(heads)]
    for name, head, hidden in pairs:
        check_logits(name, head)
        check_device(name, head, router_hidden)
        if head.shape[1] != hidden.shape[1] or head.dtype != hidden.dtype:
            raise ValueError(
                f"{name} has shape {list(head.shape)} and dtype {head.dtype}, its hidden states {list(hidden.shape)} "
                f"and {hidden.dtype}: the last dimensions and the dtypes must agree"
            )
    if expert_hidden.shape[0] != router_hidden.shape[0]:
        raise ValueError(
            f"expert_hidden has {expert_hidden.shape[0]} rows, router_hidden has {router_hidden.shape[0]}: "
            "pass one row per sequence of the batch"
        )
    check_device("expert_hidden", expert_hidden, router_hidden)
    check_selection(weights, len(heads), router_hidden)
    V = check_vocab_size(vocab_size, [router_head.shape[0], *(head.shape[0] for head in heads)])
    alpha = check_alpha(alpha)

    tensors = (router_hidden, router_head, expert_hidden, *heads)
    if not dispatch.fuses_on(router_hidden.device):
        experts = [expert_hidden.float() @ head[:V].float().T for head in heads]
        return select_add_argmax(router_hidden.float() @ router_head[:V].float().T, weights, experts, alpha=alpha)
    if torch.compiler.is_compiling() or not dispatch.are_plain(*tensors):
        raise TypeError("lm_head_select_add_argmax is not a registered operator yet: call it outside of torch.compile")
    dispatch.require_triton()
    from .lm_head_triton import lm_head

    ids = weights.argmax(dim=-1) if weights.ndim == 2 else weights.long()
    tokens, launches = lm_head(router_hidden, router_head, ids, expert_hidden, heads, alpha, V)
    launch.run(launches, router_hidden.device)
    return SelectedTokens(tokens, ids)
