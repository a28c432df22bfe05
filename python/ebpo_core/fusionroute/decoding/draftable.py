"""What drafts go with: everything else is refused by name, before a model runs."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import GenerationMode

from ebpo_core.fusionroute.compat import CACHE

from .cache import FusionRouteCache
from .columns import ROLLBACK
from .ragged import windows_of

DraftTokens = int | Literal["auto"]

_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
_ARGUMENTS = ("attention_mask", "position_ids", "use_cache", "logits_to_keep", "tokenizer", CACHE)


def check_draft_tokens(draft_tokens: Any, arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError unless ``draft_tokens`` is None, "auto" or a number, and transformers' loop is not replaced.

    Args:
        draft_tokens: as given to ``generate``.
        arguments: the others, by keyword.
    """
    if draft_tokens is None:
        return
    if isinstance(draft_tokens, str):
        known = draft_tokens == "auto"
    else:
        whole = isinstance(draft_tokens, int) and not isinstance(draft_tokens, bool)
        known = whole and 1 <= draft_tokens <= ROLLBACK
    if not known:
        raise ValueError(f"draft_tokens is {draft_tokens!r}: pass 1 to {ROLLBACK}, 'auto', or None for no drafts")
    if arguments.get("custom_generate") is not None:
        _refuse(draft_tokens, "custom_generate", "a decoding loop of its own")


def check_drafts(draft_tokens: DraftTokens, mode: GenerationMode, config: Any, arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError for what drafts do not go with.

    Args:
        draft_tokens: as given to ``generate``.
        mode: that transformers derived from the arguments.
        config: the call's own ``GenerationConfig``, with all that was given in whatever way.
        arguments: of the model's forward.
    """
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        _refuse(draft_tokens, mode.value, "which is neither greedy decoding nor sampling")
    if config.use_cache is False:
        _refuse(draft_tokens, "use_cache=False", "without which nothing is verified in one chunk")
    kind = config.cache_implementation
    if kind not in (None, "dynamic"):
        _refuse(draft_tokens, f"cache_implementation={kind!r}", "while single rows are cropped in dynamic caches only")
    for name in _OUTPUTS:
        if getattr(config, name, None):
            _refuse(draft_tokens, f"{name}=True", "which is not kept")
    for name, value in arguments.items():
        if name not in _ARGUMENTS and value is not None:
            _refuse(draft_tokens, name, "which the forwards of a round do not take")


def check_croppable(draft_tokens: DraftTokens, cache: FusionRouteCache, experts: Sequence[Any]) -> None:
    """Raise a ValueError for caches from which a row's last tokens cannot be taken back, or not so many."""
    router = cache.router
    if type(router) is not DynamicCache or router.offloading:
        _refuse(draft_tokens, f"a {type(router).__name__}", "while single rows are cropped in dynamic caches only")
    for layer in router.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            kind = type(layer).__name__
            _refuse(draft_tokens, f"{kind}s in the router", "which cannot take back a token that they have read")
    for expert in experts:
        if windows_of(expert.config) is None:
            _refuse(
                draft_tokens,
                f"expert {expert.name!r}",
                "whose recurrent layers cannot take back a token they have read",
            )
    limit = shortest_window(router)
    if draft_tokens != "auto" and limit is not None and draft_tokens > limit:
        raise ValueError(f"draft_tokens is {draft_tokens}, and the router's windows see {limit} tokens: pass {limit}")


def _refuse(draft_tokens: DraftTokens, what: str, why: str) -> None:
    raise ValueError(f"draft_tokens={draft_tokens!r} with {what}, {why}: leave one of the two out")


def shortest_window(cache: Any) -> int | None:
    return min((int(layer.sliding_window) for layer in cache.layers if layer.is_sliding), default=None)
