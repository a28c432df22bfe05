"""FusionRoute (arXiv 2601.05106): a router LM picks one frozen expert LM at each token and adds its own logits to it.

Importing this registers the model with transformers, so that ``AutoModelForCausalLM.from_pretrained`` loads it.
"""

from __future__ import annotations

try:
    import torch  # noqa: F401
    import transformers
except ModuleNotFoundError as error:
    if error.name not in ("torch", "transformers"):
        raise
    raise ImportError(
        f'ebpo_core.fusionroute needs {error.name}: pip install "ebpo-core[fusionroute]" (Python 3.11 or newer)'
    ) from error

from transformers import AutoConfig, AutoModelForCausalLM

from ebpo_core.traces.trace import RoutedToken, RoutingTrace

from .config import FusionRouteConfig
from .decoding.cache import FusionRouteCache
from .decoding.routing import RoutingOptions
from .experts.expert import Expert, Experts
from .experts.references import ExpertReference
from .experts.tokenizers import check_tokenizers
from .model import FusionRouteForCausalLM, FusionRouteOutput

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

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 16):
    raise ImportError(
        f"ebpo_core.fusionroute needs transformers 5.16 or newer, found {transformers.__version__}: "
        'pip install "ebpo-core[fusionroute]"'
    )

AutoConfig.register(FusionRouteConfig.model_type, FusionRouteConfig, exist_ok=True)
AutoModelForCausalLM.register(FusionRouteConfig, FusionRouteForCausalLM, exist_ok=True)
