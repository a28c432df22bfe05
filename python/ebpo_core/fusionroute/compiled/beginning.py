"""What an adapter is before its first step: the expert's difference to the router where both come from one base."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ebpo_core.fusionroute.experts.expert import Expert

ONE_BASE = 0.5  # cosine of two models' weights; that of models trained apart is all but 0, of fine-tuned ones near 1
_ITERATIONS = 4  # of the randomised decomposition, on twice the rank; exact where that is the whole matrix


@torch.no_grad()
def initial_adapter(
    modules: Mapping[str, nn.Linear], rank: int, scale: float, seed: int, expert: Expert | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A and B by module name, ``[r, in]`` and ``[out, r]`` float32, on the modules' device.

    An expert that shares the router's base begins as the best approximation of rank r to its difference from the
    router, ``scale * B A``, module by module, with A and B of equal norms. It then reads keys and values that are not
    its own, so that the first loss may well be higher than without; but training has less to find. Any other begins as
    PEFT's adapters do: A uniform within 1 / sqrt(in), B zero.

    Args:
        modules: of the router.
        rank: r.
        scale: what ``B A`` is multiplied by.
        seed: of A, and of the decomposition.
        expert: the teacher, of whatever architecture; None for PEFT's beginning.
    """
    generator = torch.Generator().manual_seed(seed)
    down, up = {}, {}
    for name, module in modules.items():
        device = module.weight.device
        a = (torch.rand(rank, module.in_features, generator=generator) * 2 - 1) / math.sqrt(module.in_features)
        down[name] = a.to(device)
        up[name] = torch.zeros(module.out_features, rank, device=device)
    weights = None if expert is None else weights_of(expert, modules)
    if weights is not None and cosine(weights, modules) > ONE_BASE:
        for index, (name, module) in enumerate(modules.items()):
            difference = (weights[name].float() - module.weight.float()) / scale
            u, s, v = _decomposed(difference, rank, seed + index)
            down[name][: len(s)] = s.sqrt()[:, None] * v.T
            up[name][:, : len(s)] = u * s.sqrt()
    return down, up


@torch.no_grad()
def weights_of(expert: Expert, modules: Mapping[str, nn.Linear]) -> dict[str, Tensor] | None:
    """The expert's weights for the router's modules, on their device; an adapter's term is in them.

    None unless the expert has every module, in the same shape, as numbers that can be subtracted.
    """
    own = {name.removeprefix("base_model.model."): module for name, module in expert.model.named_modules()}
    found = {}
    for name, module in modules.items():
        weight = _weight(own.get(name), expert.adapter)
        if weight is None or weight.shape != module.weight.shape or not weight.is_floating_point():
            return None
        found[name] = weight.to(module.weight.device)
    return found


def _weight(module: Any, adapter: str | None) -> Tensor | None:
    base = getattr(module, "base_layer", module)
    weight = getattr(base, "weight", None)
    if not isinstance(base, nn.Linear) or not isinstance(weight, Tensor) or weight.is_meta:
        return None
    if adapter is not None and adapter in getattr(module, "lora_A", ()):
        term: Tensor = module.get_delta_weight(adapter)
        return weight + term.to(weight.device, weight.dtype)
    return weight


def cosine(weights: Mapping[str, Tensor], modules: Mapping[str, nn.Linear]) -> float:
    """Cosine of two models' weights, all modules as one vector; 0 where one of them is all zero."""
    sums = torch.zeros(3, dtype=torch.float64)
    for name, module in modules.items():
        a, b = weights[name].float(), module.weight.detach().float()
        sums += torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]).double().cpu()
    product, first, second = sums.tolist()
    return product / math.sqrt(first * second) if first > 0 and second > 0 else 0.0


def _decomposed(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets, at most ``rank``; torch's generators stay as they were."""
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix, q=min(2 * rank, *matrix.shape), niter=_ITERATIONS)
    return u[:, :rank], s[:rank], v[:, :rank]
