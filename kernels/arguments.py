"""Arguments that every operation shares: layouts of the experts' logits, and the checks of shapes and dtypes.

No check reads a tensor's values: that would wait for the device. What only values can tell (an expert id out of range,
fewer rows than the ids ask for) is therefore defined, not refused: such a row is NaN throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

LOGIT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ID_DTYPES = (torch.int64, torch.int32)
_WEIGHT_DTYPES = (*LOGIT_DTYPES, torch.float64)


class Layout(IntEnum):
    """Memory layout of the experts' logits; callers write the name in lower case."""

    LISTED = 0  # n tensors [B, V_i]
    STACKED = 1  # one tensor [n, B, V]
    GATHERED = 2  # one tensor [B, V]: row b already belongs to row b's expert
    RAGGED = 3  # n tensors [k_i, V_i]: the rows that selected expert i, in ascending batch order

    @property
    def is_list(self) -> bool:
        return self in (Layout.LISTED, Layout.RAGGED)


LAYOUTS = {
    "listed": (Layout.LISTED, "a list of n tensors [B, V_i]"),
    "stacked": (Layout.STACKED, "one tensor [n, B, V]"),
    "gathered": (Layout.GATHERED, "one tensor [B, V]"),
    "ragged": (Layout.RAGGED, "a list of n tensors [k_i, V_i] with B rows in all"),
}


class Step(NamedTuple):
    """One decode step, checked.

    ``selection`` holds weights ``[B, n]``, expert ids ``[B]``, or None (gathered logits only: every id is 0).
    ``experts`` holds what ``layout`` says; a stacked or gathered tensor is the list's only element.
    """

    router: Tensor
    selection: Tensor | None
    experts: list[Tensor]
    layout: Layout
    alpha: float
    vocab_size: int
    round_sum: bool

    @property
    def batch(self) -> int:
        return self.router.shape[0]

    @property
    def num_experts(self) -> int:
        """n, or 0 where only the ids know it."""
        if self.layout == Layout.STACKED:
            return self.experts[0].shape[0]
        return 0 if self.layout == Layout.GATHERED else len(self.experts)

    @property
    def requires_grad(self) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.router, *self.experts))


def check_step(
    router_logits: Tensor,
    weights: Tensor | None,
    expert_logits: Tensor | Sequence[Tensor],
    alpha: float,
    vocab_size: int | None,
    round_sum: bool = False,
    layout: str | None = None,
) -> Step:
    """Check the arguments all operations have in common. Errors name the argument, its value and the remedy."""
    check_logits("router_logits", router_logits)
    experts, is_list, batch = _as_list(expert_logits), not isinstance(expert_logits, Tensor), router_logits.shape[0]
    if layout is None:
        found = _layout_by_shape(experts, is_list, batch)
    else:
        found = _stated_layout(layout, experts, is_list, batch)
    for i, expert in enumerate(experts):
        name = f"expert_logits[{i}]" if is_list else "expert_logits"
        check_memory(name, expert)
        check_device(name, expert, router_logits)
    step = Step(
        router_logits,
        weights,
        experts,
        found,
        check_alpha(alpha),
        check_vocab_size(vocab_size, [router_logits.shape[-1], *(expert.shape[-1] for expert in experts)]),
        bool(round_sum),
    )
    _check_rows(step)
    if weights is not None:
        check_selection(weights, step.num_experts, router_logits)
    elif found != Layout.GATHERED:
        raise TypeError(
            "weights is None: pass routing weights [B, n] or expert ids [B]; only expert_logits that are one gathered "
            "tensor [B, V] need none"
        )
    if step.round_sum and len({expert.dtype for expert in experts}) > 1:
        raise ValueError(
            f"round_sum=True with experts of {sorted(str(x.dtype) for x in experts)}: the dtype to round to would "
            "depend on the selected expert; give all experts one dtype"
        )
    return step


def check_logits(name: str, tensor: object) -> None:
    """A matrix of logits: ``[rows, V]``, a dtype the kernels read, unit last stride."""
    check_memory(name, check_matrix(name, "[B, V]", tensor))


def check_matrix(name: str, shape: str, tensor: object) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: pass a torch.Tensor {shape}")
    if tensor.ndim != 2:
        raise ValueError(f"{name} has shape {list(tensor.shape)}: pass {shape}")
    return tensor


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, router_logits on {like.device}: move them to one device")


def check_alpha(alpha: object) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(f"alpha is {alpha!r}: pass a real number")
    value = float(alpha)
    if not -math.inf < value < math.inf:  # traceable when torch.compile makes it symbolic, unlike math.isfinite
        raise ValueError(f"alpha is {alpha!r}: pass a finite number")
    return value


def check_ids(name: str, ids: object, batch: int, like: Tensor) -> Tensor:
    """Ids ``[B]``, int64 or int32, one per row."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} is a {type(ids).__name__}: pass a torch.Tensor [B] of int64")
    if ids.dtype not in _ID_DTYPES:
        raise TypeError(f"{name} has dtype {ids.dtype}: pass int64 or int32")
    if ids.shape != (batch,):
        raise ValueError(f"{name} has shape {list(ids.shape)}: pass [{batch}], one per row of router_logits")
    check_device(name, ids, like)
    return ids


def check_memory(name: str, tensor: Tensor) -> None:
    """A dtype the kernels read, and unit last stride."""
    if tensor.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}: pass bfloat16, float16 or float32, e.g. by .float()")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1 and tensor.numel():
        raise ValueError(
            f"{name} has strides {tensor.stride()}: the last must be 1 (neighbouring logits lie side by side); "
            "call .contiguous()"
        )


def _as_list(expert_logits: object) -> list[Tensor]:
    """The tensors that hold the experts' logits; one that holds them all is the only element."""
    if isinstance(expert_logits, Tensor):
        if expert_logits.ndim not in (2, 3):
            raise ValueError(
                f"expert_logits has shape {list(expert_logits.shape)}: pass one tensor [n, B, V] or [B, V], "
                "or a list of n tensors [B, V_i]"
            )
        return [expert_logits]
    if not isinstance(expert_logits, Sequence) or isinstance(expert_logits, str):
        raise TypeError(
            f"expert_logits is a {type(expert_logits).__name__}: pass a torch.Tensor [n, B, V] or [B, V], "
            "or a list of tensors"
        )
    experts = list(expert_logits)
    if not experts:
        raise ValueError("expert_logits is an empty list: pass at least one expert")
    for i, expert in enumerate(experts):
        check_matrix(f"expert_logits[{i}]", "[B, V]", expert)
    return experts


def _layout_by_shape(experts: list[Tensor], is_list: bool, batch: int) -> Layout:
    if not is_list:
        return Layout.GATHERED if experts[0].ndim == 2 else Layout.STACKED
    # With two experts or more, n·B rows cannot be B rows, so the two layouts of a list never look alike (B > 0).
    rows = [expert.shape[0] for expert in experts]
    return Layout.RAGGED if any(k != batch for k in rows) and sum(rows) == batch else Layout.LISTED


def _stated_layout(layout: str, experts: list[Tensor], is_list: bool, batch: int) -> Layout:
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}: pass one of {list(LAYOUTS)}, or None to go by the shapes")
    stated, shapes = LAYOUTS[layout]
    fits = is_list == stated.is_list and (is_list or experts[0].ndim == (3 if stated == Layout.STACKED else 2))
    if not fits or (stated == Layout.RAGGED and sum(expert.shape[0] for expert in experts) != batch):
        held = [list(expert.shape) for expert in experts] if is_list else list(experts[0].shape)
        raise ValueError(
            f"layout is {layout!r} and expert_logits has shape {held} for a batch of {batch}: pass {shapes}, or "
            "another layout"
        )
    return stated


def _check_rows(step: Step) -> None:
    if step.layout == Layout.RAGGED:
        return
    for i, expert in enumerate(step.experts):
        if expert.shape[-2] != step.batch:
            name = f"expert_logits[{i}]" if step.layout == Layout.LISTED else "expert_logits"
            raise ValueError(
                f"{name} has {expert.shape[-2]} rows, router_logits has {step.batch}: every tensor needs one row per "
                "sequence of the batch, or the experts' rows together as many as the batch (only the rows that "
                "selected each)"
            )
    if step.layout == Layout.STACKED and step.num_experts < 1:
        raise ValueError("expert_logits holds 0 experts: pass at least one")


def check_selection(weights: object, num_experts: int, like: Tensor) -> Tensor:
    """Routing weights ``[B, n]`` or expert ids ``[B]``; ``num_experts`` 0 stands for any number."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights is a {type(weights).__name__}: pass a torch.Tensor [B, n], or expert ids [B]")
    check_device("weights", weights, like)
    if weights.ndim == 1:
        if weights.dtype not in _ID_DTYPES:
            raise TypeError(
                f"weights has shape {list(weights.shape)} and dtype {weights.dtype}: pass routing weights [B, n] of a "
                "floating dtype, or expert ids [B] of int64 or int32"
            )
    else:
        check_matrix("weights", "[B, n], or expert ids [B]", weights)
        if weights.dtype not in _WEIGHT_DTYPES:
            raise TypeError(f"weights has dtype {weights.dtype}: pass a floating-point tensor [B, n]")
        if weights.shape[1] < 1 or (num_experts and weights.shape[1] != num_experts):
            raise ValueError(
                f"weights has shape {list(weights.shape)}, one column per expert, but expert_logits holds "
                f"{num_experts or 'gathered'} experts: pass as many (at least one) in both"
            )
    if weights.shape[0] != like.shape[0]:
        raise ValueError(
            f"weights has {weights.shape[0]} rows, router_logits has {like.shape[0]}: "
            "every tensor needs one row per sequence of the batch"
        )
    return weights


def check_vocab_size(vocab_size: object, widths: list[int]) -> int:
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
