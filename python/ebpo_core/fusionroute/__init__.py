"""FusionRoute (arXiv 2601.05106): a router LM picks one frozen expert LM at each token and adds its own logits to it.

Importing this registers the model with transformers, so that ``AutoModelForCausalLM.from_pretrained`` loads it. torch
and transformers are imported when a name below is used; traces, ``vllm.client`` and the commands' help need neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .registration import register_with_transformers

if TYPE_CHECKING:
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
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise ImportError(
            f'{__name__}.{name} needs {error.name}: pip install "ebpo-core[fusionroute]" (Python 3.11 or newer)'
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
