"""The adapted stream: the router's forward with the experts' low-rank terms, over keys and values the router wrote."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from ebpo_core.fusionroute.compat import CACHE

from .lending import LendingCache
from .lowrank import LowRank, added


def lending(router: Any, cache: Cache | None) -> LendingCache:
    """``cache``, or an empty one where there is none, ready to take in a forward of ``router`` and to lend it then."""
    return LendingCache(DynamicCache(config=router.config.get_text_config()) if cache is None else cache)


def adapted_logits(
    router: Any,
    adapters: LowRank,
    modules: Mapping[str, nn.Module],
    cache: LendingCache,
    ids: Tensor,
    *,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    """Logits of the adapted stream, ``[B, K, V_router]``, in the router's dtype.

    The keys and values of K columns are computed once more, as part of the router's forward, and dropped: with MHA
    that is a sixth of a layer's linear algebra in a Llama, with GQA of four heads a group some 4 %.

    Args:
        router: the model that ``cache`` was filled by.
        adapters, modules: the terms, and the modules that they belong to.
        cache: which the router's forward of at least these columns went through.
        ids: the expert of each position, ``[B, K]`` int64.
        input_ids, position_ids: of the last K columns, ``[B, K]``.
        attention_mask: of all columns, ``[B, T]``, 0 at padding; None without any.
    """
    with added(adapters.terms(modules, ids)):
        out = router(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            return_dict=True,
            **{CACHE: cache.lend(input_ids.shape[1])},
        )
    logits: Tensor = out.logits
    return logits
