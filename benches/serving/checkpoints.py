"""Checkpoints with random weights for ``benches/serve.py``: run-all, compiled, the router alone, adapters alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from ebpo_core.fusionroute import FusionRouteConfig, FusionRouteForCausalLM
from ebpo_core.fusionroute.compiled.files import COMPILED_FOLDER, router_hash, write_adapter
from ebpo_core.fusionroute.compiled.targets import target_modules

SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
    "initializer_range": 1 / 24,
}
TINY: dict[str, Any] = {
    **SMOLLM2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "initializer_range": 0.2,
}
FUSED, COMPILED, ROUTER = "fused", "fused-compiled", "router"  # folders of the three checkpoints


def save_checkpoints(folder: Path, sizes: dict[str, Any], num_experts: int, rank: int = 8) -> None:
    """A router and experts with weights of fixed seeds, each expert in a folder of its own; float32.

    Args:
        folder: where :data:`FUSED`, the same with random adapters in the place of experts, :data:`COMPILED`, and the
            :data:`ROUTER` go.
        sizes: of all models.
        num_experts, rank: of the adapters.
    """
    config = LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    paths = {}
    for seed in range(1, num_experts + 1):
        torch.manual_seed(seed)
        paths[f"expert{seed}"] = str(folder / f"expert{seed}")
        AutoModelForCausalLM.from_config(config).save_pretrained(paths[f"expert{seed}"])
    torch.manual_seed(0)
    router = AutoModelForCausalLM.from_config(config)
    router.save_pretrained(folder / ROUTER)
    model = FusionRouteForCausalLM.from_experts(router, paths)
    with torch.no_grad():
        # Normalised hidden states have entries of about 1: routing weights, too.
        model.route_head.weight.normal_(std=config.hidden_size**-0.5, generator=torch.Generator().manual_seed(0))
    for name in (FUSED, COMPILED):
        model.save_pretrained(folder / name)
    for seed, name in enumerate(paths, start=1):
        save_adapter(folder / COMPILED / COMPILED_FOLDER / name, model.router, rank, seed)
    compiled = FusionRouteConfig.from_pretrained(folder / COMPILED)
    compiled.compiled = {"rank": rank, "scale": 1.0, "router": router_hash(folder / COMPILED)}
    compiled.save_pretrained(folder / COMPILED)
    words = {"<unk>": 0, **{f"w{index}": index for index in range(1, config.vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))  # noqa: S106 -- not a password
    for name in (FUSED, COMPILED, ROUTER):
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder / name)  # noqa: S106


def save_adapter(folder: Path, router: PreTrainedModel, rank: int, seed: int) -> None:
    """A random adapter, whose terms are about a tenth as large as what they are added to."""
    generator = torch.Generator().manual_seed(seed)
    down, up = {}, {}
    for name, module in target_modules(router).items():
        std = float(module.weight.detach().std()) * 0.1 * rank**-0.5
        down[name] = torch.randn(rank, module.in_features, generator=generator)
        up[name] = torch.randn(module.out_features, rank, generator=generator) * std
    write_adapter(folder, down, up, rank)
