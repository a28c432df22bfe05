"""Compiled checkpoints with random adapters, and what their logits are by definition: no hook, no lent cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fusionroute_oracle import fusionroute
from torch import Tensor, nn
from transformers import DynamicCache

from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.compat import CACHE
from ebpo_core.fusionroute.compiled.files import COMPILED_FOLDER, read_adapters, router_hash, write_adapter
from ebpo_core.fusionroute.compiled.targets import target_modules

RANK, ALPHA = 4, 6.0


def save_compiled(
    folder: Path, family: str = "llama", *, experts: int = 3, seed: int = 0, spread: float = 0.15, **overrides: Any
) -> Path:
    """A checkpoint whose experts are random adapters, B not zero, of which no model was ever made."""
    model = fusionroute(["llama"] * experts, family, seed=seed, **overrides)
    generator = torch.Generator().manual_seed(seed)
    for name in model.experts.names:
        modules = target_modules(model.router)
        down = {key: torch.randn(RANK, one.in_features, generator=generator) * spread for key, one in modules.items()}
        up = {key: torch.randn(one.out_features, RANK, generator=generator) * spread for key, one in modules.items()}
        write_adapter(folder / COMPILED_FOLDER / name, down, up, ALPHA)
    references = [expert.reference.to_dict() for expert in model.experts]
    model.save_pretrained(folder)
    model.config.experts = references
    model.config.compiled = {"rank": RANK, "scale": ALPHA / RANK, "router": router_hash(folder)}
    model.config.save_pretrained(folder)
    return folder


def load_compiled(folder: Path, dtype: torch.dtype = torch.float32) -> FusionRouteForCausalLM:
    """The checkpoint; in float64 the route head too."""
    model = FusionRouteForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.double() if dtype == torch.float64 else model


class _Adapted(nn.Module):
    """A linear layer with its low-rank term, for one expert."""

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.base, self.down, self.up = base, down, up

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + (x @ self.down.T) @ self.up
        return out


class _Written(DynamicCache):
    """Another cache's keys and values, whatever is written; by position, all of them, windows left to the masks."""

    def __init__(self, source: dict[int, tuple[Tensor, Tensor]], config: Any) -> None:
        super().__init__()
        self.source = source

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self.source[layer_idx]


class _Noted(DynamicCache):
    """Keeps every key and value, however small the window."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.seen[layer_idx] = (key_states, value_states)
        return key_states, value_states


@torch.no_grad()
def reference_logits(model: FusionRouteForCausalLM, folder: Path, tokens: Sequence[int], expert: int) -> Tensor:
    """Adapted logits ``[S, V]`` of one expert at all positions: modules replaced, the whole text in one pass."""
    router = model.router
    ids = torch.tensor([list(tokens)], device=router.device)
    noted = _Noted()
    router(input_ids=ids, use_cache=True, **{CACHE: noted})
    modules = target_modules(router)
    config = model.config.compiled
    assert config is not None
    adapters = read_adapters(folder, model.experts.names, modules, config["rank"], config["scale"])
    adapters.to(router.device, router.dtype)
    for name, module in modules.items():
        router.set_submodule(name, _Adapted(module, adapters.down[name][expert], adapters.up[name][expert]))
    try:
        out = router(input_ids=ids, use_cache=True, **{CACHE: _Written(noted.seen, router.config)})
    finally:
        for name, module in modules.items():
            router.set_submodule(name, module)
    logits: Tensor = out.logits[0, :, : model.config.vocab_size]
    return logits


@torch.no_grad()
def definition(
    model: FusionRouteForCausalLM, folder: Path, tokens: Sequence[int], alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Fused logits ``[S, V]`` and routes ``[S]`` of a text, by the definition."""
    ids = torch.tensor([list(tokens)])
    out = model(input_ids=ids, router_only=True, use_cache=False)
    routes = out.expert_ids[0]
    adapted = torch.stack([reference_logits(model, folder, tokens, i) for i in range(len(model.experts))])
    chosen = adapted[routes, torch.arange(len(routes))]
    return out.logits[0] + alpha * chosen, routes
