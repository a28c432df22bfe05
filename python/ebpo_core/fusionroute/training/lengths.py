"""What is said of the lengths of training data: rows that were cut, and texts beyond what a model reads."""

from __future__ import annotations

import logging
from typing import Any

from ebpo_core.fusionroute.context import check_positions

from .sequences import TokenSequences

logger = logging.getLogger(__name__)


def report_cuts(name: str, sequences: TokenSequences, max_length: int | None) -> None:
    """Warn of rows that ``max_length`` cut or dropped; ``name`` is that of the data."""
    if sequences.truncated or sequences.dropped:
        logger.warning(
            "%s: %d sequences were cut to max_length=%s, %d rows had nothing to learn left and were dropped",
            name,
            sequences.truncated,
            max_length,
            sequences.dropped,
        )


def check_lengths(name: str, sequences: TokenSequences, model: Any) -> None:
    """Warn of a text beyond the shortest context among router and experts.

    Args:
        name: of the data.
        sequences: at least one.
        model: the FusionRoute model.

    Raises:
        ValueError: a model that has no positions for the text.
    """
    longest, shortest = int(sequences.lengths.max()), model.config.max_position_embeddings
    if shortest is None or longest <= shortest:
        return
    models = [("router", model.router), *((f"expert {each.name!r}", each.model) for each in model.experts)]
    check_positions(f"{name}: a sequence", longest, models, "pass max_length={limit}")
    logger.warning(
        "%s: a sequence has %d tokens, and the shortest context among router and experts is %d: pass "
        "max_length=%d, or that model is asked beyond its context",
        name,
        longest,
        shortest,
        shortest,
    )
