"""The lengths of texts: what each model's config names, what it can read at all, and the shortest of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_target_positions")
# Modules and buffers that hold a row for each position: what stands behind the last row cannot be read.
_TABLES = {"embed_positions", "pos_encoding", "position_embeddings", "positions_embed", "wpe"}
_FURTHER_ROWS = 2  # of OPT and its kin


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


def position_limit(model: Any) -> int | None:
    """Tokens that a model can read at all, where its table of positions ends; None where positions are computed."""
    limit = context_length(model.config)
    if limit is None or model.config.model_type == "mpt":  # whose table, of biases, is made in every forward
        return limit
    tables = [
        value.shape[0]
        for name, value in (*model.named_parameters(), *model.named_buffers())
        if _TABLES.intersection(name.split(".")) and not name.endswith(".weights")  # XGLM's, which grow as needed
    ]
    # Other tables of such a name, of images, have other sizes.
    return limit if any(limit <= rows <= limit + _FURTHER_ROWS for rows in tables) else None


def check_positions(text: str, tokens: int, models: Iterable[tuple[str, Any]], remedy: str) -> None:
    """Raise a ValueError for a model whose table of positions ends before a text does.

    Args:
        text: what it is, for the message.
        tokens: of the text.
        models: with who each is, "router" or "expert 'math'".
        remedy: for the message; ``{limit}`` in it is the length that the model can read.
    """
    for who, model in models:
        limit = position_limit(model)
        if limit is not None and tokens > limit:
            raise ValueError(
                f"{text} has {tokens} tokens, and {who} is a {type(model).__name__}, which has {limit} positions: "
                + remedy.format(limit=limit)
            )


def check_length(
    model: Any, columns: int, positions: Tensor | None, experts: Iterable[Any], allowed: Tensor | None
) -> None:
    """Refuse a text that a model which may run has no positions for; warn, once, beyond the experts' contexts.

    Args:
        model: the FusionRoute model.
        columns: T, padding included, over which some families count their positions.
        positions: that the caller gave, ``[B, S]``, or None.
        experts: those that run; none if the router runs alone.
        allowed: which of them each row may select, ``[B, n]`` bool; None for all.

    Raises:
        ValueError: with the model that has fewer positions.
    """
    if positions is not None and positions.numel():
        columns = max(columns, int(positions.max()) + 1)
    shortest = model.config.max_position_embeddings
    if shortest is None or columns <= shortest:
        return
    running = [(f"expert {expert.name!r}", expert.model) for expert in experts]
    may_run = [True] * len(running) if allowed is None else allowed.any(0).tolist()
    running = [one for one, may in zip(running, may_run, strict=True) if may]
    remedy = "shorten it to {limit}"
    check_positions("input_ids, with what a cache holds,", columns, [("router", model.router), *running], remedy)
    if running:
        logger.warning_once(
            f"a text is longer than {shortest} tokens, the shortest context among router and experts: shorten it, or "
            "the model that has it answers at random there"
        )
