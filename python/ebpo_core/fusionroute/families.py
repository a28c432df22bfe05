"""What a model's family and config allow: being router or expert, decoding with a cache, texts of which length."""

from __future__ import annotations

import inspect
from typing import Any

from transformers.utils import logging

from .compat import CACHE

logger = logging.get_logger(__name__)

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
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


def context_length(config: Any) -> int | None:
    """Tokens that a model reads, prompt and answer together; None where its config names no limit."""
    text = config.get_text_config()
    found = next((getattr(text, name) for name in _LENGTHS if isinstance(getattr(text, name, None), int)), None)
    rope = getattr(text, "rope_parameters", None)
    if found is not None and isinstance(rope, dict) and rope.get("rope_type") == "yarn" and rope.get("factor"):
        # A config made longer by YaRN may still name the length before.
        found = max(found, int(rope["factor"] * (rope.get("original_max_position_embeddings") or found)))
    return found


def shortest_context(router: Any, experts: Any) -> int | None:
    """The shortest context among the router's config and the experts; a warning for experts that shorten it."""
    longest = context_length(router)
    lengths = {expert.name: length for expert in experts if (length := context_length(expert.config)) is not None}
    for name, length in lengths.items():
        if longest is None or length < longest:
            logger.warning(
                f"expert {name!r} reads {length} tokens, the router {longest or 'any number'}: prompt and answer "
                f"together may have {min(lengths.values())}"
            )
    return min([*lengths.values(), *([] if longest is None else [longest])], default=None)
