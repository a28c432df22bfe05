"""What both served forms of a FusionRoute model share: the route, the routing's columns, the weights by part."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group

from ebpo_core.fusionroute.config import FusionRouteConfig

from .columns import encode, extra_columns
from .guard import STEP

Weights = Iterable[tuple[str, Tensor]]


class Part(NamedTuple):
    """Something that weights are for: its name in messages, and what loads them and returns the names it has set."""

    title: str
    load: Callable[[Weights], Iterable[str]]


class RoutedModel(nn.Module):
    """A router, a route head, and what else a subclass adds logits of.

    Attributes:
        router: vLLM's model.
        route_head: W, ``[n, hidden]`` float32, on every rank.
        readable: ids of tokens that every model has an embedding of: V, or more.
    """

    def __init__(self, config: FusionRouteConfig, router: nn.Module, width: int) -> None:
        """``width`` is the engine's vocabulary, see :mod:`.startup`: it may end behind the routing's columns."""
        super().__init__()
        self.config = config
        self.vocab_size, self.width = int(config.vocab_size or 0), width
        self.router = router
        text: Any = config.router_config
        self.hidden_size = int(text.get_text_config().hidden_size)
        self.readable = int(text.get_text_config().vocab_size)
        self.route_head = nn.Linear(self.hidden_size, config.num_experts, bias=False, dtype=torch.float32)

    def parts(self) -> dict[str, Part]:
        """Parts of the model by the first component of their weights' names, without the route head."""
        raise NotImplementedError

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The router's embeddings. They mean nothing to other models; vLLM requires the method, and calls it for inputs
        other than tokens only."""
        embeddings: Tensor = self.router.embed_input_ids(self.clamped(input_ids))  # type: ignore[operator]
        return embeddings

    def clamped(self, input_ids: Tensor) -> Tensor:
        """vLLM lets more ids through in prompts than every model has: no embedding must be read out of its bounds."""
        return input_ids.clamp(max=self.readable - 1)

    def routing_weights(self, hidden: Tensor) -> Tensor:
        """``W h_t``, ``[rows, n]`` float32."""
        weights: Tensor = self.route_head(hidden.to(torch.float32))
        return weights

    def selected(self, weights: Tensor) -> Tensor:
        """The experts of rows, ``[rows]`` int64, the same on every rank."""
        ids = weights.argmax(-1)
        if get_tensor_model_parallel_world_size() > 1:
            # Ranks agree on hidden states to the bit only as far as their sums were reduced in one order. Should they
            # ever select different experts, they would wait for each other forever, or add parts of different ones.
            ids = get_tp_group().broadcast(ids, src=0)
        return ids

    def empty_logits(self, like: Tensor) -> Tensor:
        """Room for fused logits and the routing's columns, ``[rows, width]`` float32."""
        return like.new_empty(len(like), self.width, dtype=torch.float32)

    def with_routing(self, fused: Tensor, ids: Tensor, weights: Tensor, own: Tensor) -> Tensor:
        """``fused``, its columns filled, the selections recorded for the guard.

        Args:
            fused: of :meth:`empty_logits`, its first V columns filled.
            ids, weights, own: as for :func:`.columns.encode`.
        """
        V = self.vocab_size
        end = V + extra_columns(self.config.num_experts)
        columns = encode(ids, weights, own)
        # Relative to the sum of the others, whatever the logits' size: a log-softmax gives back what was encoded.
        torch.add(fused[:, :V].logsumexp(-1, keepdim=True), columns, out=fused[:, V:end])
        fused[:, end:] = -math.inf
        STEP.record(ids, own)
        return fused

    def load_weights(self, weights: Weights) -> set[str]:
        """Hand each part its weights, as they come: ``router.*``, ``route_head.weight``, and what the subclass has.

        Returns:
            Names of the parameters that have their values now.

        Raises:
            ValueError: weights of something that is no part of the model, or that do not fit.
        """
        loaded: set[str] = set()
        parts = self.parts()

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name == "route_head.weight":
                    with torch.no_grad():
                        self.route_head.weight.copy_(tensor)
                    loaded.add(name)
                else:
                    yield name, tensor

        for name, group in groupby(others(), key=lambda item: item[0].partition(".")[0]):
            part = parts.get(name)
            if part is None:
                experts = self.config.num_experts
                raise ValueError(f"weights of {name!r}: a FusionRoute model of {experts} experts has no such part")
            try:
                loaded |= set(part.load((key.partition(".")[2], tensor) for key, tensor in group))
            except (AssertionError, KeyError, RuntimeError, ValueError) as error:
                raise ValueError(f"{part.title}: its weights do not fit vLLM's model: {error}") from error
        return loaded


def model_part(title: str, name: str, model: Any) -> Part:
    """The part that is vLLM's model, as module ``name``."""

    def load(weights: Weights) -> list[str]:
        names = model.load_weights(weights)
        if names is None:  # some models do not tell
            names = [parameter for parameter, _ in model.named_parameters()]
        return [f"{name}.{parameter}" for parameter in names]

    return Part(f"{title} ({type(model).__name__})", load)
