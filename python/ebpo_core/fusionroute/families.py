"""What a model's family allows: being router or expert, decoding with a cache."""

from __future__ import annotations

import inspect
from typing import Any

from .compat import CACHE

_POSITIONS = (
    "counts its positions from another number than 0 where it makes them itself, so its forward and its generate "
    "disagree about the same text"
)
_REFUSED = {
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm"), _POSITIONS),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl", "xmod"), _POSITIONS),
    "cpmant": "puts a prompt of its own in front of every chunk, which no cache of ours can follow",
    "reformer": "caches hashed buckets in place of keys and values, which no expert could catch up on",
    "xlm": "cuts its input by its cache on its own",
}
_OWN_CACHE = ("minimax",)
# Their code in transformers goes on from a state by one token only, and takes longer chunks for new texts.
_ONE_TOKEN_AT_A_TIME = ("mamba", "mamba2", "falcon_mamba", "recurrent_gemma")


def check_config(config: Any, who: str) -> None:
    """Raise a ValueError for a config whose model cannot be router or expert.

    Args:
        config: of the model.
        who: "router" or "expert 'math'", for the message.
    """
    reason = _REFUSED.get(config.model_type)
    if reason is not None:
        raise ValueError(f"{who} is a {config.model_type!r}, which {reason}: choose a model of another family")


def check_router(config: Any) -> None:
    """Raise a ValueError for a router's config that cannot be a router, or not be loaded again."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING  # not at the top: configs are registered before it exists

    check_config(config, "router")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"router has a {type(config).__name__}, for which AutoModelForCausalLM has no class, so a checkpoint could "
            "not be loaded: choose a model of another family"
        )


def check_cached(router: Any, experts: Any) -> None:
    """Raise a ValueError unless the router and all experts can decode with a cache."""
    named = [("router", router), *((f"expert {expert.name!r}", expert.model) for expert in experts)]
    for who, model in named:
        if model is not router and model.config.model_type in _ONE_TOKEN_AT_A_TIME:
            raise ValueError(
                f"{who} is a {type(model).__name__}, which cannot catch up on several tokens at once: pass "
                "use_cache=False, or choose an expert with attention, at least in some layers"
            )
        if not keeps_cache(model):
            raise ValueError(
                f"{who} is a {type(model).__name__}, which takes no key/value cache of transformers: pass "
                "use_cache=False, with which every model reads the whole text at every token"
            )


def keeps_cache(model: Any) -> bool:
    """True for a model whose forward takes transformers' cache (RWKV and GPT-1 do not, MiniMax has one of its own)."""
    return model.config.model_type not in _OWN_CACHE and CACHE in inspect.signature(type(model).forward).parameters
