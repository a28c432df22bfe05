"""The adapted stack of a compiled checkpoint: the router's layers once more, over its weights and its cache."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase

from .lowrank import Selection, adapted
from .submodels import build

NAME = "adapted"


def adapted_stack(
    vllm_config: VllmConfig, hf_config: Any, folder: str, router: nn.Module, selection: Selection, prefix: str
) -> nn.Module:
    """The stack that is run on tokens whose logits are wanted, after the router.

    It is a model of its own only as far as compilation needs one. Norms, embeddings and the LM head *are* the router's
    modules; linear layers have the router's weights and low-rank terms; attention reads the router's cache and
    writes none.

    Args:
        vllm_config, hf_config, folder, prefix: as for :func:`~.submodels.build`.
        router: built with the same ones, without its weights yet.
        selection: of the step.
    """
    with torch.device("meta"):  # no memory: every tensor of it is given up below
        sizes = (selection.num_experts, selection.rank)
        stack = build(vllm_config, hf_config, folder, NAME, prefix, sizes=sizes)
    _share(stack, router, selection, vllm_config.compilation_config.static_forward_context)
    left = [name for name, tensor in (*stack.named_parameters(), *stack.named_buffers()) if tensor.is_meta]
    if left:
        raise NotImplementedError(f"{type(router).__name__} has tensors that its adapted stack cannot share: {left}")
    return stack


def _share(stack: nn.Module, router: nn.Module, selection: Selection, layers: dict[str, Any]) -> None:
    """Give ``stack`` the tensors of ``router``, module by module; ``layers`` are vLLM's attention layers by name."""
    stack._parameters.update({name: router._parameters[name] for name in stack._parameters})
    stack._buffers.update({name: router._buffers[name] for name in stack._buffers})
    for name, child in list(stack._modules.items()):
        twin = router._modules[name]
        if isinstance(child, Attention):
            setattr(stack, name, _reader(twin, child.layer_name))
            layers[child.layer_name] = getattr(stack, name)
        elif isinstance(child, LinearBase):
            adapted(child, twin, selection)
        elif child is not None and twin is not None and child._modules:
            _share(child, twin, selection, layers)
        else:
            setattr(stack, name, twin)


def _reader(attention: Any, name: str) -> Any:
    """The layer ``attention``, whatever its options, under another name and with the cache of the first."""
    reader = copy.copy(attention)
    reader.impl = copy.copy(attention.impl)
    reader.layer_name = name
    reader.kv_sharing_target_layer_name = reader.impl.kv_sharing_target_layer_name = attention.layer_name
    return reader
