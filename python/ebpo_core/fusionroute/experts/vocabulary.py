"""The one vocabulary of router and experts: V, substitutes for what experts lack, the comparison of tokenizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from .expert import Expert
from .experts import Experts
from .references import ExpertReference
from .substitutes import check_needed, named_ids, needed_ids
from .tokenizers import check_tokenizers, load_tokenizer


def shared_vocabulary(
    router: PreTrainedModel,
    tokenizer: Any,
    experts: Experts,
    *,
    vocab_size: int | None = None,
    substitutes: Mapping[Any, Any] | None = None,
    renamed_ids: Iterable[int] = (),
    trust_remote_code: bool = False,
) -> int:
    """V, after the experts have got their substitutes. Arguments and errors are those of ``from_experts``."""
    load = partial(load_tokenizer, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        where = router.config._name_or_path
        tokenizer = load(ExpertReference(name="router", path=where)) if where else None
    tokenizers = {"router": tokenizer, **{expert.name: load(expert.reference) for expert in experts}}
    tokenizers = {name: found for name, found in tokenizers.items() if found is not None}
    if substitutes:
        _substitute(experts, named_ids(substitutes, tokenizer), tokenizers)
    router_width = router.config.get_text_config().vocab_size
    widest = min([router_width, *(expert.vocab_size for expert in experts)])
    if vocab_size is None:
        vocab_size = widest
    elif not 1 <= vocab_size <= widest:
        raise ValueError(f"vocab_size is {vocab_size}: pass 1 to {widest}, the smallest width among the models")
    check_tokenizers(tokenizers, vocab_size=vocab_size, renamed_ids=renamed_ids)
    needed = needed_ids(tokenizer, (router.config, router.generation_config), router_width)
    check_needed(needed, {expert.name: _missing(expert, needed, tokenizers) for expert in experts}, vocab_size)
    return vocab_size


def _missing(expert: Expert, needed: Iterable[int], tokenizers: Mapping[str, Any]) -> set[int]:
    """Those of the ids ``needed`` that an expert lacks: beyond its width, or of its matrices alone.

    A row that pads the matrices of an expert whose tokenizer has no such token was never trained.
    """
    own, routers = tokenizers.get(expert.name), tokenizers.get("router")
    missing = {token for token in needed if token >= expert.vocab_size}
    if own is None or routers is None:
        return missing
    untrained = set(routers.get_vocab().values()) - set(own.get_vocab().values())
    untrained -= {int(token) for token in expert.reference.substitutes or {}}
    return missing | untrained.intersection(needed)


def _substitute(experts: Experts, ids: Mapping[int, int], tokenizers: Mapping[str, Any]) -> None:
    """Give each expert the substitutes of those ids that it lacks: beyond its width, or not in its tokenizer."""
    used: set[int] = set()
    for expert in experts:
        known = tokenizers.get(expert.name)
        tokens = None if known is None else set(known.get_vocab().values())
        lacking = {
            token: own
            for token, own in ids.items()
            if token >= expert.width or (tokens is not None and token not in tokens)
        }
        if lacking:
            expert.substitute(
                {**{int(key): own for key, own in (expert.reference.substitutes or {}).items()}, **lacking}
            )
        used |= lacking.keys()
    unused = sorted(ids.keys() - used)
    if unused:
        raise ValueError(f"substitutes names {unused}, which every expert has: leave them out")
