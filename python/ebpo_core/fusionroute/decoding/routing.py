"""The selection of an expert at each position: argmax or draw, allowed and forced experts, hysteresis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

Route = Literal["argmax", "sample"]
ExpertName = str | int


@dataclass(frozen=True)
class RoutingOptions:
    """The selection of experts and the weight of their logits: arguments of ``generate`` and ``forward``.

    Attributes:
        alpha: weight of the expert's term: fused logits are ``z_router + alpha * z_expert`` (1 in the paper).
        complementary: False leaves the router's logits out: fused logits are ``z_expert`` (the paper's "routing only").
        route: "argmax" of the routing weights (ties to the lowest index), or "sample" from their softmax.
        hysteresis: keep the expert of the position before unless another's weight exceeds its weight by more than this.
            Positions are counted from the start of the text, in however many forwards it was read.
        allowed_experts: names or indices for all rows, or one such list per row, or a bool tensor ``[B, n]``.
        forced_expert: one name or index for all rows, or one per row; for debugging.
        expert_prefill: "lazy" runs an expert when it is first selected; "eager" runs all on the prompt, so that no
            later token waits for a prompt to be read.
        expert_cache_budget: bytes that the experts' key/value caches may take together; the least recently used are
            evicted and catch up from zero when selected again. The expert that runs is never evicted. None: no limit.
    """

    alpha: float = 1.0
    complementary: bool = True
    route: Route = "argmax"
    hysteresis: float = 0.0
    allowed_experts: Any = None
    forced_expert: Any = None
    expert_prefill: Literal["lazy", "eager"] = "lazy"
    expert_cache_budget: int | None = None

    def __post_init__(self) -> None:
        for name in ("alpha", "hysteresis"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} is {value!r}: pass a finite number")
        if self.hysteresis < 0:
            raise ValueError(f"hysteresis is {self.hysteresis}: pass 0 (switch at once) or a positive margin")
        if not isinstance(self.complementary, bool):
            raise TypeError(f"complementary is {self.complementary!r}: pass True, or False for routing only")
        _one_of("route", self.route, ("argmax", "sample"))
        _one_of("expert_prefill", self.expert_prefill, ("lazy", "eager"))
        budget = self.expert_cache_budget
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 0):
            raise ValueError(f"expert_cache_budget is {budget!r}: pass bytes as an int of at least 0, or None")

    def updated(self, **changes: Any) -> RoutingOptions:
        """With the changes that are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


OPTION_NAMES = tuple(field.name for field in fields(RoutingOptions))
STORED_OPTIONS = tuple(name for name in OPTION_NAMES if name not in ("allowed_experts", "forced_expert"))


def permitted(options: RoutingOptions, names: Sequence[str], batch_size: int, device: torch.device) -> Tensor | None:
    """Experts each row may select, ``[B, n]`` bool, or None for all.

    Raises:
        ValueError: as :func:`permitted_rows`, or a number of rows that does not divide the batch.
    """
    table = permitted_rows(options, names)
    if table is None:
        return None
    if batch_size % len(table):
        name = "allowed_experts" if options.forced_expert is None else "forced_expert"
        raise ValueError(f"{name} has {len(table)} rows for a batch of {batch_size}: pass one for all, or one per row")
    # Beams and returned sequences of a prompt lie side by side.
    return table.to(device).repeat_interleave(batch_size // len(table), dim=0)


def permitted_rows(options: RoutingOptions, names: Sequence[str]) -> Tensor | None:
    """The table of ``allowed_experts`` and ``forced_expert``, ``[rows given, n]`` bool; None without them.

    Raises:
        ValueError: both are given, an expert is unknown, or a row may select none.
    """
    forced, allowed = options.forced_expert, options.allowed_experts
    if forced is not None:
        if allowed is not None:
            raise ValueError("forced_expert and allowed_experts are both given: pass one of them")
        items = _items("forced_expert", forced)
        if not items:
            raise ValueError(f"forced_expert is {forced!r}: pass one expert for all rows, or one per row")
        return _table("forced_expert", [[expert] for expert in items], names)
    if allowed is None:
        return None
    if isinstance(allowed, Tensor) and allowed.dtype == torch.bool:
        if allowed.ndim != 2 or allowed.shape[1] != len(names):
            raise ValueError(f"allowed_experts has shape {list(allowed.shape)}: pass bool [B, {len(names)}], or names")
        table = allowed
    else:
        items = _items("allowed_experts", allowed)
        one_for_all = all(isinstance(item, (str, Integral)) for item in items)
        lists = [items] if one_for_all else [_items("allowed_experts", item) for item in items]
        table = _table("allowed_experts", lists, names)
    if not len(table) or not bool(table.any(dim=1).all()):
        raise ValueError("allowed_experts leaves a row without any expert: allow at least one in every row")
    return table


def select(
    weights: Tensor,
    options: RoutingOptions,
    allowed: Tensor | None = None,
    previous: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Expert ids ``[B, S]`` int64 for routing weights ``[B, S, n]`` of consecutive positions.

    Args:
        weights: ``W h_t``, any floating dtype.
        options: route and hysteresis.
        allowed: ``[B, n]`` bool, or None for all.
        previous: ids of the position before the first, ``[B]``; -1 where there is none. Used with hysteresis.
        mask: ``[B, S]`` bool, False at padding, which no later position compares itself with; None: no padding.
    """
    scores = weights.detach()
    if allowed is not None:
        scores = scores.masked_fill(~allowed[:, None], -math.inf)
    if options.route == "sample":
        flat = scores.float().softmax(-1).flatten(0, 1)
        chosen = torch.multinomial(flat, 1).view(scores.shape[:2])
    else:
        chosen = scores.argmax(-1)
    if options.hysteresis == 0:
        return chosen
    start = torch.full_like(chosen[:, 0], -1) if previous is None else previous
    return _with_hysteresis(scores, chosen, options.hysteresis, start, mask)


def _with_hysteresis(scores: Tensor, best: Tensor, margin: float, start: Tensor, mask: Tensor | None) -> Tensor:
    """Expert ids ``[B, S]``: at each position the one before it, unless ``best`` exceeds it by more than the margin.

    A position is a map from the expert before it to its own, ``[B, S, n + 1]`` for all of them, where the last entry
    is for no expert before it. Maps are composed in log2(S) rounds: after a round with stride d, position t maps what
    stood before position t - 2 d + 1.
    """
    n = scores.shape[-1]
    every = torch.arange(n + 1, device=scores.device)
    gain = scores.gather(-1, best[..., None]) - scores
    maps = torch.where(gain <= margin, every[:n], best[..., None])
    maps = torch.cat([maps, best[..., None]], dim=-1)
    if mask is not None:
        maps = torch.where(mask[..., None], maps, every)  # padding passes on what stood before it
    stride = 1
    while stride < maps.shape[1]:
        composed = maps[:, stride:].gather(-1, maps[:, :-stride])
        maps = torch.cat([maps[:, :stride], composed], dim=1)
        stride *= 2
    first = torch.where(start < 0, n, start)[:, None, None].expand(-1, maps.shape[1], -1)
    ids = maps.gather(-1, first)[..., 0]
    return torch.where(ids == n, -1, ids)


def selected_share(weights: Tensor, ids: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Softmax of the routing weights (over the allowed experts) at the selected one, ``[B, K]`` float32."""
    scores = weights.detach().float()
    if allowed is not None:
        scores = scores.masked_fill(~allowed[:, None], -math.inf)
    return scores.softmax(-1).gather(-1, ids[..., None])[..., 0]


def expert_index(argument: str, expert: ExpertName, names: Sequence[str]) -> int:
    """The index of an expert given by name or index."""
    if isinstance(expert, str) and expert in names:
        return list(names).index(expert)
    number: Any = expert  # numpy's are Integral and no int
    if not isinstance(number, bool) and isinstance(number, Integral) and 0 <= int(number) < len(names):
        return int(number)
    raise ValueError(f"{argument} names {expert!r}: choose among {list(names)} or 0 to {len(names) - 1}")


def _items(argument: str, value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        value = value.tolist()
    if not isinstance(value, (str, Integral, Iterable)):
        raise ValueError(f"{argument} is {value!r}: pass names or indices of experts")
    return [value] if isinstance(value, (str, Integral)) else list(value)


def _table(argument: str, rows: Sequence[Sequence[ExpertName]], names: Sequence[str]) -> Tensor:
    table = torch.zeros(len(rows), len(names), dtype=torch.bool)
    for row, experts in enumerate(rows):
        for expert in experts:
            table[row, expert_index(argument, expert, names)] = True
    return table


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: pass one of {list(choices)}")
