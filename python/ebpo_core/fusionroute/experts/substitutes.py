"""Tokens that the router has and an expert lacks, and what the expert reads and scores in their place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

_EXAMPLE = "pass substitutes={token: a token that the expert has}"


class Substitutes:
    """One expert's substitutes, as two tables over the ids below V.

    Args:
        ids: from an id that the expert lacks to one that it has.
        rows: of the expert's embedding.
        width: of its logits.

    Attributes:
        vocab_size: the width of its logits with the substitutes' among them.

    Raises:
        ValueError: a substitute that the expert lacks, too, or an id that it lacks below others and that has none.
    """

    def __init__(self, ids: Mapping[int, int], rows: int, width: int) -> None:
        for lacking, own in ids.items():
            if own >= min(rows, width) or own in ids:
                raise ValueError(
                    f"substitutes names {own} for {lacking}: name an id below {min(rows, width)} that has none itself"
                )
        self.vocab_size = max(width, 1 + max(ids))
        read, lent = list(range(rows)), list(range(width))
        for table in (read, lent):
            for token in range(len(table), self.vocab_size):
                if token not in ids:
                    raise ValueError(f"substitutes names {max(ids)}, and none for {token} below it: name one, too")
                table.append(ids[token])
        for lacking, own in ids.items():
            read[lacking] = lent[lacking] = own
        self._read, self._lent = torch.tensor(read), torch.tensor(lent)

    def read(self, ids: Tensor) -> Tensor:
        """What the expert reads for ``ids``, int64 of any shape."""
        self._read = self._read.to(ids.device)
        return self._read[ids]

    def lent(self, logits: Tensor) -> Tensor:
        """The expert's logits ``[..., width]`` as those of V tokens, ``[..., vocab_size]``."""
        self._lent = self._lent.to(logits.device)
        return logits[..., self._lent]


def named_ids(substitutes: Mapping[Any, Any], tokenizer: Any) -> dict[int, int]:
    """``substitutes`` of tokens or ids as ids.

    Raises:
        ValueError: a token that the router's tokenizer does not have, or tokens without a tokenizer.
    """
    known: dict[str, int] = {} if tokenizer is None else tokenizer.get_vocab()

    def found(token: Any) -> int:
        if isinstance(token, str):
            if token not in known:
                raise ValueError(f"substitutes names {token!r}: the router's tokenizer has no such token; pass its id")
            return known[token]
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ValueError(f"substitutes names {token!r}: pass a token of the router's tokenizer, or its id")
        return token

    return {found(lacking): found(own) for lacking, own in substitutes.items()}


def check_needed(needed: Mapping[int, str], missing: Mapping[str, Set[int]], vocab_size: int) -> None:
    """Raise a ValueError for an id at or beyond V, or that any of the experts lacks.

    Args:
        needed: from ids to what needs them, such as "EOS '<|im_end|>'".
        missing: those that an expert lacks, by its name.
        vocab_size: V.
    """
    for token, what in needed.items():
        lacking = [name for name, tokens in missing.items() if token in tokens]
        if lacking:
            raise ValueError(f"{what} has id {token}, which expert {lacking[0]!r} lacks: {_EXAMPLE}")
        if token >= vocab_size:
            raise ValueError(f"{what} has id {token}: pass a vocab_size above it, not {vocab_size}")


def needed_ids(tokenizer: Any, configs: Iterable[Any], width: int) -> dict[int, str]:
    """Ids below the router's width that ending, padding and the chat template need, and which of them does.

    Args:
        tokenizer: the router's, or None.
        configs: the router's config and generation config.
        width: of the router's logits.
    """
    ids: dict[int, str] = {}

    def add(what: str, tokens: Any) -> None:
        for token in tokens if isinstance(tokens, Sequence) else [tokens]:
            if isinstance(token, int) and 0 <= token < width:
                name = "" if tokenizer is None else f" {tokenizer.convert_ids_to_tokens(token)!r}"
                ids.setdefault(token, f"{what}{name}")

    for holder in (*configs, tokenizer):
        add("EOS", getattr(holder, "eos_token_id", None))
        add("padding", getattr(holder, "pad_token_id", None))
    if getattr(tokenizer, "chat_template", None):
        add("the chat template's", _template_ids(tokenizer))
    return ids


def _template_ids(tokenizer: Any) -> list[int]:
    """Added tokens that a chat template names, or that are in a chat."""
    template = tokenizer.chat_template
    text = "\n".join(template.values()) if isinstance(template, dict) else str(template)
    ids = [index for token, index in tokenizer.get_added_vocab().items() if token in text]
    for roles in (("system", "user", "assistant"), ("user", "assistant"), ("user",)):
        messages = [{"role": role, "content": "a"} for role in roles]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:  # noqa: S112 -- a template may refuse a role in whatever way
            continue
        return [*ids, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    return ids
