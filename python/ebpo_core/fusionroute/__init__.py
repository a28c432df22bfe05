"""FusionRoute (arXiv 2601.05106): a router LM picks one frozen expert LM at each token and adds its own logits to it.

Importing this registers the model with transformers, so that ``AutoModelForCausalLM.from_pretrained`` loads it. torch
and transformers are imported when a name below is used; traces, ``vllm.client`` and the commands' help need neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpo_core.lazy import lazily

from .registration import register_with_transformers

if TYPE_CHECKING:
    from .compiled.compilation import compile  # noqa: A004
    from .config import FusionRouteConfig
    from .decoding.cache import FusionRouteCache
    from .decoding.routing import RoutingOptions
    from .experts.expert import Expert
    from .experts.experts import Experts
    from .experts.references import ExpertReference
    from .experts.tokenizers import check_tokenizers
    from .model import FusionRouteForCausalLM, FusionRouteOutput
    from .traces.trace import RoutedToken, RoutingTrace

__all__ = [
    "Expert",
    "ExpertReference",
    "Experts",
    "FusionRouteCache",
    "FusionRouteConfig",
    "FusionRouteForCausalLM",
    "FusionRouteOutput",
    "RoutedToken",
    "RoutingOptions",
    "RoutingTrace",
    "check_tokenizers",
    "compile",
]

_HOMES = {
    "Expert": "experts.expert",
    "ExpertReference": "experts.references",
    "Experts": "experts.experts",
    "FusionRouteCache": "decoding.cache",
    "FusionRouteConfig": "config",
    "FusionRouteForCausalLM": "model",
    "FusionRouteOutput": "model",
    "RoutedToken": "traces.trace",
    "RoutingOptions": "decoding.routing",
    "RoutingTrace": "traces.trace",
    "check_tokenizers": "experts.tokenizers",
    "compile": "compiled.compilation",
}

__getattr__ = lazily(__name__, _HOMES, "fusionroute")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
