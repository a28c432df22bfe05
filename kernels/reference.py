"""Pure-PyTorch reference of the decode step: the oracle of every kernel, and the path for CPU tensors.

For row ``b`` of a batch of ``B`` (arXiv 2601.05106, section 3)::

    e     = argmax_i weights[b, i]                                   ties: the lowest index
    token = argmax_v (router[b, v] + alpha * expert_e[b, v])         in float32, v < V; ties: the lowest index

Both log-softmax normalisers of the paper's ``log pi_router + log pi_expert`` are constant in ``v`` and drop out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

_LOGIT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class SelectedTokens(NamedTuple):
    """What a decode step chose: ``token_ids`` and ``expert_ids``, both ``[B]`` int64."""

    token_ids: Tensor
    expert_ids: Tensor


def select_add_argmax(
    router_logits: Tensor,
    weights: Tensor,
    expert_logits: Tensor | Sequence[Tensor],
    *,
    alpha: float = 1.0,
    vocab_size: int | None = None,
) -> SelectedTokens:
    """Select one expert per row, add its logits to the router's, return the best token.

    Args:
        router_logits: ``[B, V_r]``, bfloat16, float16 or float32.
        weights: routing weights ``[B, n]``, any floating dtype; compared in that dtype.
        expert_logits: n tensors ``[B, V_i]``, or one ``[n, B, V]``; dtypes may differ from the router's and each other.
        alpha: weight of the expert's logits. The product is rounded to float32 before it is added (no fused
            multiply-add). At 0 an expert's infinity still gives NaN, as IEEE arithmetic has it.
        vocab_size: V, the number of leading columns that take part; by default the smallest width given.

    Returns:
        ``SelectedTokens(token_ids, expert_ids)``, both ``[B]`` int64 on the device of ``router_logits``.
        Ties, NaN and infinities are those of :func:`torch.argmax`: the lowest index among equals, the first NaN before
        every number, and index 0 for a row that is -inf throughout.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is none of those above.
        ValueError: shapes, devices, ``alpha`` or ``vocab_size`` do not fit together.
    """
    experts = _experts(expert_logits)
    _check_inputs(router_logits, weights, experts)
    size = _vocab_size(vocab_size, [router_logits.shape[1], *(expert.shape[1] for expert in experts)])
    scale = _alpha(alpha)

    expert_ids = weights.argmax(dim=-1)
    chosen = experts[0][:, :size].float()
    for i, expert in enumerate(experts[1:], start=1):
        chosen = torch.where((expert_ids == i).unsqueeze(1), expert[:, :size].float(), chosen)
    fused = router_logits[:, :size].float() + chosen * scale
    return SelectedTokens(fused.argmax(dim=-1), expert_ids)


def _experts(expert_logits: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(expert_logits, Tensor):
        if expert_logits.ndim != 3:
            raise ValueError(
                f"expert_logits has shape {list(expert_logits.shape)}: "
                "pass one tensor [n, B, V], or a list of n tensors [B, V_i]"
            )
        return list(expert_logits.unbind(0))
    if not isinstance(expert_logits, Sequence):
        raise TypeError(
            f"expert_logits is a {type(expert_logits).__name__}: pass a torch.Tensor [n, B, V], or a list of tensors"
        )
    return list(expert_logits)


def _check_inputs(router_logits: Tensor, weights: Tensor, experts: list[Tensor]) -> None:
    logits = {"router_logits": router_logits, **{f"expert_logits[{i}]": x for i, x in enumerate(experts)}}
    _check_matrix("weights", "[B, n]", weights)
    for name, tensor in logits.items():
        _check_matrix(name, "[B, V]", tensor)
        if tensor.dtype not in _LOGIT_DTYPES:
            raise TypeError(f"{name} has dtype {tensor.dtype}: pass bfloat16, float16 or float32, e.g. by .float()")
    if not weights.dtype.is_floating_point:
        raise TypeError(f"weights has dtype {weights.dtype}: pass a floating-point tensor")
    if weights.shape[1] != len(experts) or not experts:
        raise ValueError(
            f"weights has shape {list(weights.shape)}, one column per expert, but expert_logits holds {len(experts)} "
            "experts: pass as many (at least one) in both"
        )
    for name, tensor in {"weights": weights, **logits}.items():
        if tensor.shape[0] != router_logits.shape[0]:
            raise ValueError(
                f"{name} has {tensor.shape[0]} rows, router_logits has {router_logits.shape[0]}: "
                "every tensor needs one row per sequence of the batch"
            )
        if tensor.device != router_logits.device:
            raise ValueError(
                f"{name} is on {tensor.device}, router_logits on {router_logits.device}: move them to one device"
            )


def _check_matrix(name: str, shape: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: pass a torch.Tensor {shape}")
    if tensor.ndim != 2:
        raise ValueError(f"{name} has shape {list(tensor.shape)}: pass {shape}")


def _vocab_size(vocab_size: object, widths: list[int]) -> int:
    smallest = min(widths)
    if smallest < 1:
        raise ValueError(f"the logits' widths are {widths}: each needs at least one column")
    if vocab_size is None:
        return smallest
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size is {vocab_size!r}: pass an int, or None for the smallest width")
    if not 1 <= vocab_size <= smallest:
        raise ValueError(f"vocab_size is {vocab_size}: pass 1 to {smallest}, the smallest width of the logits given")
    return vocab_size


def _alpha(alpha: object) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(f"alpha is {alpha!r}: pass a real number")
    value = float(alpha)
    if not math.isfinite(value):
        raise ValueError(f"alpha is {alpha!r}: pass a finite number")
    return value
