"""vLLM's ``FusionRouteForCausalLM``: the router and every expert as vLLM's own models, fused where logits are made."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ebpo_core.fusionroute.config import FusionRouteConfig
from ebpo_core.fusionroute.experts.references import ExpertReference
from ebpo_core.kernels import select_add

from .routed import Part, RoutedModel, model_part
from .submodels import build, expert_config


class FusionRouteForCausalLM(RoutedModel):
    """A router and n experts that see every token of a step; a token's logits are the router's plus one expert's.

    Inside an engine's step no sub-model can be skipped (the paged caches know one length per request), so the experts
    are not lazy here. What is per row is the expert's LM head and the sum, as in the paper: the expert is
    ``argmax W h_t``, the fused logits are ``z_router + alpha z_expert``, and all that an engine does to logits
    (grammars, biases, penalties, sampling) is done to those.

    Attributes:
        router, expert_0, expert_1, ...: vLLM's models.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        model_config: Any = vllm_config.model_config
        config: FusionRouteConfig = model_config.hf_config
        router = build(vllm_config, config.router_config, model_config.model, "router", prefix)
        super().__init__(config, router, model_config.get_vocab_size())
        self.widths = [self.hidden_size]
        self.secondary_weights = []
        for index, expert in enumerate(map(ExpertReference.from_dict, config.experts or [])):
            own = expert_config(expert, trust_remote_code=model_config.trust_remote_code)
            folder = str(expert.path)
            setattr(self, f"expert_{index}", build(vllm_config, own, folder, f"expert_{index}", prefix))
            text = own.get_text_config()
            self.widths.append(text.hidden_size)
            self.readable = min(self.readable, text.vocab_size)
            # vLLM's loader streams these after the checkpoint's own weights.
            self.secondary_weights.append(
                DefaultModelLoader.Source(folder, None, prefix=f"expert_{index}.", fall_back_to_pt=False)
            )

    @property
    def experts(self) -> list[nn.Module]:
        return [getattr(self, f"expert_{index}") for index in range(len(self.widths) - 1)]

    def parts(self) -> dict[str, Part]:
        parts = {"router": model_part("router", "router", self.router)}
        for index, (expert, model) in enumerate(zip(self.config.experts or [], self.experts, strict=True)):
            name = f"expert_{index}"
            parts[name] = model_part(f"expert {expert['name']!r} ({expert['path']})", name, model)
        return parts

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Tensor:
        """The last hidden states of router and experts side by side, ``[tokens, sum of hidden sizes]``.

        Whatever their width, an engine only selects rows of what a model returns before :meth:`compute_logits`.
        """
        del intermediate_tensors, inputs_embeds  # of pipeline stages and prompts of embeddings: refused at the start
        input_ids = self.clamped(input_ids)
        hidden = [model(input_ids, positions) for model in (self.router, *self.experts)]
        return torch.cat(hidden, dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Fused logits and the routing's columns, ``[rows, width]`` float32."""
        hidden, *expert_hidden = hidden_states.split(self.widths, dim=-1)
        weights = self.routing_weights(hidden)
        ids = self.selected(weights)
        router_logits: Any = self.router.compute_logits(hidden)  # type: ignore[operator]
        order = ids.argsort(stable=True)
        # The one wait for the device in a step: how many rows selected each expert.
        counts = torch.bincount(ids, minlength=len(expert_hidden)).tolist()
        own = torch.empty_like(ids)
        parts: list[Tensor] = []
        V = self.vocab_size
        for expert, states, rows in zip(self.experts, expert_hidden, order.split(counts), strict=True):
            if not len(rows):
                parts.append(hidden.new_empty(0, V))
                continue
            logits: Any = expert.compute_logits(states[rows])  # type: ignore[operator]
            if logits is not None:
                own[rows] = logits[:, :V].argmax(-1)
                parts.append(logits)
        if router_logits is None:  # a rank that does not sample
            return None
        fused = self.empty_logits(router_logits)
        if self.config.complementary:
            fused[:, :V] = select_add(router_logits, ids, parts, alpha=float(self.config.alpha), vocab_size=V)
        else:
            for part, rows in zip(parts, order.split(counts), strict=True):
                fused[rows, :V] = part[:, :V].to(torch.float32)
        return self.with_routing(fused, ids, weights, own)
