"""The run-everything oracle of FusionRoute: every model over every whole sequence, one row at a time, no cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fusionroute_tiny import tiny_model
from torch import Tensor

from ebpo_core.fusionroute import FusionRouteForCausalLM

VOCAB = 200


def softmax_in_the_models_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention (Gemma 2 has no other) takes its softmax in float32 even in a float64 model; undo that."""
    original = torch.nn.functional.softmax

    def softmax(x: Tensor, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        return original(x, *args, dtype=torch.float64 if x.dtype == torch.float64 else dtype, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "softmax", softmax)


def fusionroute(
    families: Sequence[str],
    router: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    spread: float = 1.0,
    seed: int = 0,
    **overrides: Any,
) -> FusionRouteForCausalLM:
    """A model whose route head switches often; its experts have the families named, with weights of their own."""
    experts = {
        f"{family}{i}": tiny_model(family, seed + i + 1, dtype, **overrides) for i, family in enumerate(families)
    }
    model = FusionRouteForCausalLM.from_experts(tiny_model(router, seed, dtype, **overrides), experts)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        model.route_head.weight.normal_(std=spread, generator=generator)
    return model.to(dtype) if dtype == torch.float64 else model


def padded_prompts(lengths: Sequence[int], seed: int = 0, vocab: int = VOCAB) -> tuple[Tensor, Tensor]:
    """Random token ids ``[B, P]``, padded on the left with 0, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = torch.randint(3, vocab, (length,), generator=generator)
        mask[row, longest - length :] = 1
    return ids, mask


@torch.no_grad()
def oracle_logits(model: FusionRouteForCausalLM, tokens: Sequence[int], expert: int, alpha: float = 1.0) -> Tensor:
    """Fused logits ``[V]`` of the next token after ``tokens``, by the models' plain forward."""
    ids = torch.tensor([list(tokens)])
    V = model.config.vocab_size
    router = model.router(input_ids=ids, use_cache=False).logits[0, -1, :V]
    chosen = model.experts[expert].model(input_ids=ids, use_cache=False).logits[0, -1, :V]
    wide = torch.promote_types(router.dtype, torch.float32)
    return router.to(wide) + alpha * chosen.to(wide)


@torch.no_grad()
def settled(
    model: FusionRouteForCausalLM, tokens: Sequence[int], start: int, *, rounding: float = 5e-5, **options: Any
) -> int:
    """How many of the tokens from ``start`` on have margins wider than ten roundings, for tokens and for experts.

    Args:
        model: runs over the whole sequence without a cache.
        tokens: prompt and answer.
        start: where the answer begins.
        rounding: relative to the largest logit; by default float32's.
        options: of the forward, such as ``alpha``.
    """
    out = model(input_ids=torch.tensor([list(tokens)]), use_cache=False, **options)
    sure = len(tokens) - start
    for values, scale in ((out.logits[0], out.logits[0].abs().amax(-1)), (out.routing_weights[0], torch.ones(1))):
        best = values[start - 1 : -1].topk(2).values
        narrow = best[:, 0] - best[:, 1] < 10 * rounding * scale.expand(len(tokens))[start - 1 : -1]
        if bool(narrow.any()):
            sure = min(sure, int(narrow.nonzero()[0]))
    return sure
