"""An adapter before its first step: the expert itself where only what is adapted differs, nothing for strangers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fusionroute_tiny import FAMILIES, save_tiny_adapter, tiny_model, tiny_tokenizer
from torch import Tensor

from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.compiled.beginning import cosine, initial_adapter, weights_of
from ebpo_core.fusionroute.compiled.distillation import (
    Distillation,
    Distiller,
    adapted_of,
    divergence,
    expert_of,
    read_batch,
)
from ebpo_core.fusionroute.compiled.lowrank import LowRank
from ebpo_core.fusionroute.compiled.targets import target_modules
from ebpo_core.fusionroute.training.data import tokenize_samples

SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "layers": 2}
SETTINGS = Distillation(rank=3, steps=1)


def finetuned(router: Any, family: str, rank: int) -> Any:
    """A copy of ``router`` whose last layer and head differ by ``rank`` directions: it has the router's keys."""
    expert = tiny_model(family, 0, **SIZES)
    expert.load_state_dict(router.state_dict())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, module in target_modules(expert).items():
            if "layers.1" in name or name == "lm_head":
                left = torch.randn(module.out_features, rank, generator=generator)
                module.weight += 0.05 * left @ torch.randn(rank, module.in_features, generator=generator)
    return expert


def first_loss(model: FusionRouteForCausalLM, settings: Distillation = SETTINGS) -> float:
    """The largest KL(expert || adapter) at a label before the first step."""
    text = {"prompt": "w6 w7 w8", "completion": " w9 w10 w11 w12"}
    sequences = tokenize_samples([text], tiny_tokenizer(32))
    distiller = Distiller(model, 0, sequences, settings, np.ones(1, dtype=bool))
    batch = read_batch(model, sequences, [0])
    adapter = LowRank(
        {name: value[None] for name, value in distiller.down.items()},
        {name: value.T[None] * settings.scale for name, value in distiller.up.items()},
    )
    with torch.no_grad():
        student = adapted_of(model, adapter, distiller.modules, batch)
        return float(divergence(expert_of(model, model.experts[0], batch), student)[batch.labelled].max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [None, 1.0])
def test_an_expert_with_the_routers_keys_is_its_adapter_at_once(family: str, alpha: float | None) -> None:
    router = tiny_model(family, 0, **SIZES)
    model = FusionRouteForCausalLM.from_experts(router, {"fine": finetuned(router, family, 3)})
    assert first_loss(model, Distillation(rank=3, alpha=alpha)) < 1e-6
    assert first_loss(model, Distillation(rank=2, alpha=alpha)) > 1e-4


def test_a_lora_of_the_routers_base_is_its_adapter_at_once(tmp_path: Path) -> None:
    router = tiny_model("llama", 0, **SIZES)
    router.save_pretrained(tmp_path / "base")
    save_tiny_adapter(tmp_path / "lora", tiny_model("llama", 0, **SIZES), seed=1)
    expert = {"path": str(tmp_path / "base"), "adapter": str(tmp_path / "lora")}
    model = FusionRouteForCausalLM.from_experts(router, {"fine": expert, "base": str(tmp_path / "base")})
    modules = target_modules(model.router)
    weights = [weights_of(expert, modules) for expert in model.experts]
    changed = [name for name in modules if not torch.equal(weights[0][name], modules[name].weight)]
    assert changed
    assert all("_proj" in name for name in changed)
    assert all(torch.equal(weights[1][name], modules[name].weight) for name in modules)
    down, up = initial_adapter(modules, 8, 2.0, 0, model.experts[0])
    for name, module in modules.items():
        torch.testing.assert_close(2.0 * up[name] @ down[name], weights[0][name] - module.weight, atol=1e-6, rtol=1e-5)


def test_strangers_begin_at_the_router() -> None:
    """Other weights, other sizes, other module names: A drawn, B zero."""
    router = tiny_model("llama", 0, **SIZES)
    others = {
        "seed": tiny_model("llama", 1, **SIZES),
        "size": tiny_model("llama", 0, vocab_size=32, hidden_size=16, layers=2),
        "depth": tiny_model("llama", 0, vocab_size=32, hidden_size=32, layers=1),
        "family": tiny_model("gemma2", 2, **SIZES),
    }
    model = FusionRouteForCausalLM.from_experts(router, others)
    modules = target_modules(model.router)
    plain = initial_adapter(modules, 3, 2.0, 0)
    for expert in model.experts:
        down, up = initial_adapter(modules, 3, 2.0, 0, expert)
        assert all(torch.equal(down[name], plain[0][name]) and not up[name].any() for name in modules)
    assert abs(cosine(weights_of(model.experts[0], modules) or {}, modules)) < 0.05


def test_the_beginning_is_of_the_seed_alone_and_leaves_torchs_generator() -> None:
    router = tiny_model("llama", 0, **SIZES)
    model = FusionRouteForCausalLM.from_experts(router, {"fine": finetuned(router, "llama", 8)})
    modules = target_modules(model.router)

    def begun(seed: int) -> Tensor:
        down, up = initial_adapter(modules, 3, 2.0, seed, model.experts[0])
        return torch.cat([value.flatten() for value in (*down.values(), *up.values())])

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = begun(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(begun(0), first)


def test_a_rank_above_the_modules_leaves_room() -> None:
    """Directions beyond those that there are begin as PEFT's do."""
    router = tiny_model("llama", 0, **SIZES)
    model = FusionRouteForCausalLM.from_experts(router, {"fine": finetuned(router, "llama", 8)})
    modules = target_modules(model.router)
    down, up = initial_adapter(modules, 40, 2.0, 0, model.experts[0])
    plain, _ = initial_adapter(modules, 40, 2.0, 0)
    name = "model.layers.1.self_attn.q_proj"
    assert torch.equal(down[name][32:], plain[name][32:])
    assert not up[name][:, 32:].any()
    weight = finetuned(router, "llama", 8).get_submodule(name).weight
    torch.testing.assert_close(2.0 * up[name] @ down[name], weight - modules[name].weight, atol=1e-5, rtol=1e-4)
