"""vLLM's model of a compiled checkpoint: two forwards a token for any number of experts, one cache."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention

from ebpo_core.fusionroute.compiled.targets import HEAD
from ebpo_core.fusionroute.config import FusionRouteConfig

from .adapters import stacked_adapters
from .lowrank import AdaptedHead, Selection
from .routed import Part, RoutedModel, Weights, model_part
from .stacks import NAME, adapted_stack
from .submodels import build

_PIECES = {
    "q_proj": ("self_attn.qkv_proj", 0),
    "o_proj": ("self_attn.o_proj", 0),
    "gate_proj": ("mlp.gate_up_proj", 0),
    "up_proj": ("mlp.gate_up_proj", 1),
    "down_proj": ("mlp.down_proj", 0),
}
"""Adapted layers of transformers, and where they are in vLLM's."""


class CompiledFusionRouteForCausalLM(RoutedModel):
    """A router, and one adapted stack over its weights that each token runs with the adapters of its own expert.

    In a step, the router reads all tokens and writes keys and values. Rows whose logits are wanted select an expert by
    the router's last hidden state, and go through the adapted stack, whose attention reads what the router wrote. The
    other tokens of a prompt skip it.

    Attributes:
        selection: the experts that the step's rows selected.
        adapted: the adapted stack.
        head: the router's LM head, for the rows of both.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        model_config: Any = vllm_config.model_config
        config: FusionRouteConfig = model_config.hf_config
        compiled: dict[str, Any] = config.compiled or {}
        own = (config.router_config, model_config.model)
        super().__init__(config, build(vllm_config, *own, "router", prefix), model_config.get_vocab_size())
        self._checkpoint, self._revision = str(model_config.model), model_config.revision
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.selection = Selection(rows, config.num_experts, int(compiled["rank"]))
        self.adapted = adapted_stack(vllm_config, *own, self.router, self.selection, prefix)
        router: Any = self.router
        # Gemma 2, which knows tied embeddings only, has no head of its own.
        self.head = AdaptedHead(getattr(router, "lm_head", router.model.embed_tokens), self.selection)
        self._reader = [module.layer_name for module in self.adapted.modules() if isinstance(module, Attention)][-1]
        # Inputs of the adapted stack, at one place in memory: a CUDA graph replays what it was captured with.
        self.register_buffer("_ids", torch.zeros(rows, dtype=torch.int64), persistent=False)
        self.register_buffer("_positions", torch.zeros(rows, dtype=torch.int64), persistent=False)

    def parts(self) -> dict[str, Part]:
        return {"router": model_part("router", "router", self.router)}

    def load_weights(self, weights: Weights) -> set[str]:
        """The router's weights, the route head's, and the adapters, which have files of their own."""
        loaded = super().load_weights(weights)
        adapters = stacked_adapters(self.config, self._checkpoint, self._revision)
        for name, down in adapters.down.items():
            path, piece = self._place(name)
            terms: Any = self.get_submodule(path)
            terms.load(piece, down, adapters.up[name])
            loaded |= {f"{path}.lora_A", f"{path}.lora_B"}
        return loaded

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Tensor:
        """Last hidden states of the router and of the adapted stack, and the expert, ``[tokens, 2 hidden + 1]``.

        Rows whose logits nobody wants have zeros in the place of the second and third.
        """
        del intermediate_tensors, inputs_embeds  # of pipeline stages and prompts of embeddings: refused at the start
        input_ids = self.clamped(input_ids)
        hidden: Tensor = self.router(input_ids, positions)
        wanted, count = self._wanted(len(hidden))
        if wanted is None:
            rows, ids, places = hidden, input_ids, positions
        else:
            rows, ids, places = hidden[wanted], input_ids[wanted], positions[wanted]
        chosen = self.selected(self.routing_weights(rows))
        self.selection.choose(chosen)
        many = len(ids)
        self._ids[:many].copy_(ids)  # type: ignore[index]
        self._positions[:many].copy_(places)  # type: ignore[index]
        adapted: Tensor = self.adapted(self._ids[:many], self._positions[:many])[:many]  # type: ignore[index]
        # An expert's index is exact in any dtype up to the most that there can be.
        streams = torch.cat([rows, adapted, chosen[:, None].to(hidden.dtype)], dim=-1)
        if wanted is None:
            return streams
        out = hidden.new_zeros(len(hidden), streams.shape[1])
        out[:, : self.hidden_size] = hidden
        out[wanted[:count]] = streams[:count]
        return out

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Fused logits and the routing's columns, ``[rows, width]`` float32."""
        hidden, adapted, chosen = hidden_states.split([self.hidden_size, self.hidden_size, 1], dim=-1)
        # Not selected again: where two experts are nearly tied, other rows beside it might turn the choice.
        ids = chosen[:, 0].to(torch.int64)
        self.selection.choose(ids)
        router: Any = self.router
        logits = router.logits_processor(self.head, torch.cat([hidden, adapted]))
        if logits is None:  # a rank that does not sample
            return None
        V = self.vocab_size
        own, expert = logits[:, :V].to(torch.float32).chunk(2)
        fused = self.empty_logits(own)
        if self.config.complementary:
            torch.add(own, expert, alpha=float(self.config.alpha), out=fused[:, :V])
        else:
            fused[:, :V] = expert
        return self.with_routing(fused, ids, self.routing_weights(hidden), expert.argmax(-1))

    def _wanted(self, tokens: int) -> tuple[Tensor | None, int]:
        """Indices of the tokens whose logits are wanted, perhaps padded, and their number; None for all of them."""
        metadata: Any = get_forward_context().attn_metadata
        if not isinstance(metadata, dict):  # a run without requests, for memory's or compilation's sake
            return None, tokens
        one = metadata[self._reader]
        indices: Tensor | None = getattr(one, "logits_indices_padded", None)
        if indices is None or one.num_logits_indices == tokens:  # as many are as many in order: no prompt is among them
            return None, tokens
        return indices, int(one.num_logits_indices)

    def _place(self, name: str) -> tuple[str, int]:
        """The module that holds the adapters of transformers' module ``name``, and which piece of it that is."""
        if name == HEAD:
            return "head.terms", 0
        layer, _, module = name.rpartition(".self_attn." if ".self_attn." in name else ".mlp.")
        ours, piece = _PIECES[module]
        return f"{NAME}.{layer}.{ours}.terms", piece
