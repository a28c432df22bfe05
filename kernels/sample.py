"""Sampling from the fused policy: temperature, top-k, top-p and min-p, then a Gumbel-max draw with keyed noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import reference
from .argmax import SelectedTokens
from .arguments import Step, check_device, check_ids, check_matrix, check_step
from .dispatch import Operator, Outputs, Planned, is_eager
from .reference import Draw


def select_add_sample(
    router_logits: Tensor,
    weights: Tensor | None,
    expert_logits: Tensor | Sequence[Tensor],
    *,
    seed: Tensor | None = None,
    step: int | Tensor = 0,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    alpha: float = 1.0,
    vocab_size: int | None = None,
    noise: Tensor | None = None,
    layout: str | None = None,
) -> SelectedTokens:
    """Draw one token per row from ``softmax((z_router + alpha z_expert) / temperature)`` after the usual filters.

    Filters apply in transformers' order: temperature, top-k, top-p of what top-k left, min-p. (vLLM applies min-p
    before top-k and top-p, which changes the mass top-p counts.) Each keeps tokens of equal score together, where a
    sort would keep some of them. The draw is exact: with ``g`` standard Gumbel, ``argmax(score + g)`` follows the
    softmax.

    The noise of a token is a function of (seed, step, vocabulary id) alone, so a row's token depends neither on the
    rows beside it, nor on tile sizes, nor on padding. Draws with the same seed and step share their noise: give each
    request its seed, and each position its step. Under a CUDA graph pass ``step`` as a tensor and update it in place.

    Args:
        router_logits, weights, expert_logits, alpha, vocab_size, layout: as in :func:`~.argmax.select_add_argmax`.
        seed: ``[B]`` int64. Required unless ``noise`` is given.
        step: position of the token in its sequence: an int, or ``[B]`` int64.
        temperature: a number or ``[B]`` float32, not negative. Rows at 0 are greedy: argmax, filters and noise aside.
        top_k: keep the k largest scores; an int or ``[B]`` integer. 0, or V and more, keeps all.
        top_p: keep the likeliest tokens until their mass reaches p; a number or ``[B]`` float32. 1 keeps all.
            Masses are exact sums in units of 2^-40 of the best token's, so lighter tokens are not counted.
        min_p: keep tokens at least this share as likely as the best; a number or ``[B]`` float32. 0 keeps all.
        noise: ``[B, >=V]`` float32, added to the tempered scores in place of the keyed draw.

    Returns:
        :class:`~.argmax.SelectedTokens` with token ids and expert ids. For the log-probability of a drawn token call
        :func:`~.logprob.select_add_logprob`, which is at temperature 1 and unfiltered by definition.

    Raises:
        TypeError, ValueError: as :func:`~.argmax.select_add_argmax`; values inside tensors are not checked. A row whose
        best score is NaN or infinite is no distribution: it is drawn greedily.
    """
    checked = check_step(router_logits, weights, expert_logits, alpha, vocab_size, layout=layout)
    B = checked.batch
    if noise is None:
        if seed is None:
            raise TypeError("seed is None: pass int64 seeds [B], one per row (or the noise itself)")
        check_ids("seed", seed, B, checked.router)
        seed = seed.contiguous()
    else:
        seed = None
        check_matrix("noise", "[B, V]", noise)
        check_device("noise", noise, checked.router)
        if noise.dtype != torch.float32 or noise.shape[0] != B or noise.shape[1] < checked.vocab_size:
            raise ValueError(
                f"noise has shape {list(noise.shape)} and dtype {noise.dtype}: "
                f"pass float32 [{B}, {checked.vocab_size}] or wider"
            )
        noise = noise if noise.stride(1) == 1 else noise.contiguous()
    draw = Draw(
        _number("temperature", temperature, checked, low=0.0),
        None if top_k is None else _count("top_k", top_k, checked, 0),
        None if top_p is None else _number("top_p", top_p, checked, low=0.0, high=1.0),
        None if min_p is None else _logarithm(_number("min_p", min_p, checked, low=0.0, high=1.0)),
        seed,
        _count("step", step, checked, None) if noise is None else None,
        noise,
    )
    if is_eager(checked):
        tokens, ids = SAMPLE.eager(checked, *draw)
    else:
        # The operator takes tensors only: one schema, and no new graph for a new number.
        tokens, ids = SAMPLE.traced(checked, *draw.per_row(checked))
    return SelectedTokens(tokens, ids)


def _number(name: str, value: object, step: Step, low: float, high: float = math.inf) -> Tensor | float:
    """A parameter as ``[B]`` float32, or as the one number it is."""
    if isinstance(value, Tensor):
        _check_parameter(name, value, step, value.dtype.is_floating_point, "a floating dtype")
        return value.float().contiguous()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}: pass a number, or a tensor [B] of float32")
    number = float(value)
    if not low <= number <= high or number == math.inf:
        raise ValueError(f"{name} is {value!r}: pass a finite number from {low:g} to {high:g}")
    return number


def _count(name: str, value: object, step: Step, low: int | None) -> Tensor | int:
    """A parameter as ``[B]`` int64, or as the one number it is."""
    if isinstance(value, Tensor):
        _check_parameter(name, value, step, value.dtype in (torch.int64, torch.int32), "int64 or int32")
        return value.long().contiguous()
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}: pass an int, or a tensor [B] of int64")
    if low is not None and value < low:
        raise ValueError(f"{name} is {value}: pass {low} or more")
    return value


def _logarithm(value: Tensor | float) -> Tensor | float:
    if isinstance(value, Tensor):
        return value.log()
    return math.log(value) if value > 0 else -math.inf


def _check_parameter(name: str, value: Tensor, step: Step, fits: bool, dtypes: str) -> None:
    if not fits:
        raise TypeError(f"{name} has dtype {value.dtype}: pass {dtypes}")
    if value.shape != (step.batch,):
        raise ValueError(f"{name} has shape {list(value.shape)}: pass [{step.batch}], one per row of router_logits")
    check_device(name, value, step.router)


# ------------------------------------------------------------------------------------------------------------ operator


def _reference(step: Step, *draw: Any) -> Outputs:
    return reference.sample(step, Draw(*draw))


def _kernels(step: Step, *draw: Any) -> Planned:
    from .sample_triton import sample

    return sample(step, Draw(*draw))


def _fake(step: Step, *_: Any) -> Outputs:
    return step.router.new_empty(step.batch, dtype=torch.int64), step.router.new_empty(step.batch, dtype=torch.int64)


# Token ids and expert ids, [B].
SAMPLE = Operator(
    "select_add_sample",
    "Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? log_min_p, Tensor? seed, Tensor? position, "
    "Tensor? noise",
    outputs=2,
    reference=_reference,
    kernels=_kernels,
    fake=_fake,
)
