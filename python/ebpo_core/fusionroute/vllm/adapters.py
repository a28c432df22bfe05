"""The adapters of a compiled checkpoint, as ``from_pretrained`` reads and checks them, for vLLM."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ebpo_core.fusionroute.compiled.files import compiled_folder, read_adapters, router_hash
from ebpo_core.fusionroute.compiled.lowrank import LowRank
from ebpo_core.fusionroute.compiled.targets import target_modules
from ebpo_core.fusionroute.config import FusionRouteConfig

FAMILIES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
)
"""vLLM's models of which this form is tested: dense layers of q, k, v and o, and of gate, up and down."""


def stacked_adapters(config: FusionRouteConfig, model: str, revision: str | None) -> LowRank:
    """The adapters of all experts by module, ``down`` ``[n, r, in]`` and ``up``, scaled, ``[n, r, out]``, on the CPU.

    Args:
        config: of the checkpoint, its ``compiled`` a dict.
        model, revision: the checkpoint's folder or hub id.

    Raises:
        FileNotFoundError, ValueError: as for :func:`~ebpo_core.fusionroute.compiled.files.read_adapters`.
    """
    compiled: dict[str, Any] = config.compiled or {}
    with torch.device("meta"):
        router = AutoModelForCausalLM.from_config(config.router_config)
    names = [str(expert["name"]) for expert in config.experts or []]
    folder = compiled_folder(model, revision)
    return read_adapters(folder, names, target_modules(router), int(compiled["rank"]), float(compiled["scale"]))


def check_compiled(config: FusionRouteConfig, architecture: str, model: str, revision: str | None) -> None:
    """Refuse a compiled checkpoint that cannot be served, before the engine starts.

    Args:
        config, model, revision: as for :func:`stacked_adapters`.
        architecture: vLLM's name of the router's class.

    Raises:
        FileNotFoundError, ValueError: a router of another family, or not the one that the adapters were made for, or
            adapters that are missing or do not fit it.
    """
    compiled: dict[str, Any] = config.compiled or {}
    if architecture not in FAMILIES:
        raise ValueError(
            f"the router is a {architecture}: vLLM serves compiled checkpoints of {', '.join(FAMILIES)}; use the "
            "checkpoint's own generate, or serve the checkpoint that was compiled"
        )
    if bool(getattr(config, "verify_experts", True)):
        found = router_hash(compiled_folder(model, revision))
        if found != compiled["router"]:
            raise ValueError(
                f"the router in {model!r} is not the one its experts were compiled for: the config has "
                f"{compiled['router']}, found {found}. Compile the checkpoint again (fusionroute compile), or pass "
                """--hf-overrides '{"verify_experts": false}' to serve it as it is"""
            )
    stacked_adapters(config, model, revision)
