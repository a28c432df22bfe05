"""vLLM's ``FusionRouteForCausalLM``: the router and every expert as vLLM's own models, fused where logits are made."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ebpo_core.fusionroute.config import FusionRouteConfig
from ebpo_core.fusionroute.experts.references import ExpertReference
from ebpo_core.kernels import select_add

from .columns import encode, extra_columns
from .guard import STEP
from .submodels import build, expert_config


class FusionRouteForCausalLM(nn.Module):
    """A router and n experts that see every token of a step; a token's logits are the router's plus one expert's.

    Inside an engine's step no sub-model can be skipped (the paged caches know one length per request), so the experts
    are not lazy here. What is per row is the expert's LM head and the sum, as in the paper: the expert is
    ``argmax W h_t``, the fused logits are ``z_router + alpha z_expert``, and all that an engine does to logits
    (grammars, biases, penalties, sampling) is done to those.

    Attributes:
        router, expert_0, expert_1, ...: vLLM's models.
        route_head: W, ``[n, hidden]`` float32, on every rank.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config: Any = vllm_config.model_config
        config: FusionRouteConfig = model_config.hf_config
        self.config = config
        self.vocab_size = int(config.vocab_size or 0)
        experts = [ExpertReference.from_dict(expert) for expert in config.experts or []]
        router: Any = config.router_config
        self.router = build(vllm_config, router, model_config.model, "router", prefix)
        self.widths = [router.get_text_config().hidden_size]
        self.secondary_weights = []
        for index, expert in enumerate(experts):
            own = expert_config(expert, trust_remote_code=model_config.trust_remote_code)
            folder = str(expert.path)
            setattr(self, f"expert_{index}", build(vllm_config, own, folder, f"expert_{index}", prefix))
            self.widths.append(own.get_text_config().hidden_size)
            # vLLM's loader streams these after the checkpoint's own weights.
            self.secondary_weights.append(
                DefaultModelLoader.Source(folder, None, prefix=f"expert_{index}.", fall_back_to_pt=False)
            )
        self.route_head = nn.Linear(self.widths[0], len(experts), bias=False, dtype=torch.float32)

    @property
    def experts(self) -> list[nn.Module]:
        return [getattr(self, f"expert_{index}") for index in range(len(self.widths) - 1)]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The router's embeddings. They mean nothing to the experts; vLLM requires the method, and calls it for inputs
        other than tokens only."""
        embeddings: Tensor = self.router.embed_input_ids(self._clamped(input_ids))  # type: ignore[operator]
        return embeddings

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Tensor:
        """The last hidden states of router and experts side by side, ``[tokens, sum of hidden sizes]``.

        Whatever their width, an engine only selects rows of what a model returns before :meth:`compute_logits`.
        """
        del intermediate_tensors, inputs_embeds  # of pipeline stages and prompts of embeddings: refused at the start
        input_ids = self._clamped(input_ids)
        hidden = [model(input_ids, positions) for model in (self.router, *self.experts)]
        return torch.cat(hidden, dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Fused logits and the routing's columns, ``[rows, V + n + 2]`` float32."""
        hidden, *expert_hidden = hidden_states.split(self.widths, dim=-1)
        weights = self.route_head(hidden.to(torch.float32))
        ids = weights.argmax(-1)
        if get_tensor_model_parallel_world_size() > 1:
            # Ranks agree on hidden states to the bit only as far as their sums were reduced in one order. Should they
            # ever select different experts, their LM heads would wait for each other forever.
            ids = get_tp_group().broadcast(ids, src=0)
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
        alpha = float(self.config.alpha)
        fused: Tensor = router_logits.new_empty(len(ids), V + extra_columns(len(parts)), dtype=torch.float32)
        if self.config.complementary:
            fused[:, :V] = select_add(router_logits, ids, parts, alpha=alpha, vocab_size=V)
        else:
            for part, rows in zip(parts, order.split(counts), strict=True):
                fused[rows, :V] = part[:, :V].to(torch.float32)
        columns = encode(ids, weights, own)
        # Relative to the sum of the others, whatever the logits' size: a log-softmax gives back what was encoded.
        torch.add(fused[:, :V].logsumexp(-1, keepdim=True), columns, out=fused[:, V:])
        STEP.record(ids, own)
        return fused

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Hand each sub-model its weights, as they come: ``router.*``, ``route_head.weight``, ``expert_<i>.*``.

        Returns:
            Names of the parameters that have their values now.

        Raises:
            ValueError: weights of something that is no part of the model.
        """
        loaded: set[str] = set()

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name == "route_head.weight":
                    with torch.no_grad():
                        self.route_head.weight.copy_(tensor)
                    loaded.add(name)
                else:
                    yield name, tensor

        for part, group in groupby(others(), key=lambda item: item[0].partition(".")[0]):
            child: Any = dict(self.named_children()).get(part)
            if child is None:
                experts = len(self.widths) - 1
                raise ValueError(f"weights of {part!r}: a FusionRoute model of {experts} experts has no such part")
            try:
                names = child.load_weights((name.partition(".")[2], tensor) for name, tensor in group)
            except (AssertionError, KeyError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"{self._named(part)}: its weights do not fit vLLM's {type(child).__name__}: {error}"
                ) from error
            if names is None:  # some models do not tell
                names = {name for name, _ in child.named_parameters()}
            loaded |= {f"{part}.{name}" for name in names}
        return loaded

    def _named(self, part: str) -> str:
        """A part as people know it."""
        if not part.startswith("expert_"):
            return part
        expert: Any = (self.config.experts or [])[int(part.removeprefix("expert_"))]
        return f"expert {expert['name']!r} ({expert['path']})"

    def _clamped(self, input_ids: Tensor) -> Tensor:
        """Ids from V on are nobody's tokens, and vLLM lets them through in prompts: no embedding must be read out of
        its bounds for them."""
        return input_ids.clamp(max=self.vocab_size - 1)
