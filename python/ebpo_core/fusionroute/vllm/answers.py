"""Routed tokens and their texts from the log-probabilities in an answer of OpenAI's API. Needs no torch.

The answer may be JSON or what the ``openai`` package made of it, of a chat or of a text completion, whole or one chunk
of a stream. The request must have asked for the routing: see :mod:`.columns` and :func:`routing_request`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ebpo_core.fusionroute.traces.trace import RoutedToken
from ebpo_core.fusionroute.vllm.columns import decode, routing_ids

_PLACEHOLDER = "token_id:"  # how vLLM writes a token where return_tokens_as_token_ids is set
_SHOWN = 300


class _Row(NamedTuple):
    """One token of an answer: its placeholder, log-probabilities by placeholder, and its own text if it is said."""

    token: str
    values: Mapping[str, Any]
    text: str | None


def routing_request(vocab_size: int, num_experts: int, *, chat: bool) -> dict[str, Any]:
    """The fields of a request that ask for the routing of every token.

    With the ``openai`` package: ``client.chat.completions.create(..., extra_body=routing_request(V, n, chat=True))``.

    Args:
        vocab_size: V of the checkpoint, the server's metric ``fusionroute_vocab_size``.
        num_experts: n.
        chat: Of ``/chat/completions`` (True) or ``/completions``, whose ``logprobs`` is a number.
    """
    ids = routing_ids(vocab_size, num_experts)
    return {
        "logprobs": True if chat else len(ids),
        "logprob_token_ids": ids,
        "return_tokens_as_token_ids": True,
    }


def routed_tokens(logprobs: Any, vocab_size: int, num_experts: int, text: str | None = None) -> list[RoutedToken]:
    """The tokens of one choice.

    Args:
        logprobs: The choice's ``logprobs``, as a dict or an object of the ``openai`` package.
        vocab_size: V of the checkpoint.
        num_experts: n.
        text: The choice's text, where the tokens are to have theirs: they concatenate to it. A chat's log-probabilities
            hold what each token adds, so that each gets its own. Where that is missing, as in text completions of
            several tokens, or does not agree with ``text``, what is left of it goes to the last token and the others
            get "".

    Raises:
        ValueError: No log-probabilities, tokens that are not ids, or columns that do not carry the routing.
    """
    rows = _rows(logprobs)
    ids = [f"{_PLACEHOLDER}{column}" for column in routing_ids(vocab_size, num_experts)]
    tokens = []
    texts = _texts(text, rows)
    for index, row in enumerate(rows):
        known = [value for value in map(row.values.get, ids) if isinstance(value, int | float)]
        if len(known) < len(ids):
            missing = next(one for one in ids if not isinstance(row.values.get(one), int | float))
            raise ValueError(
                f"token {index} has no log-probability of {missing!r}: the request must have "
                f"logprob_token_ids {ids[0].removeprefix(_PLACEHOLDER)} to {ids[-1].removeprefix(_PLACEHOLDER)} and "
                "return_tokens_as_token_ids (see routing_request), and the server must serve that FusionRoute "
                "checkpoint with vLLM"
            )
        column = decode(known)
        token = _id(row.token)
        tokens.append(RoutedToken(token, column.expert, column.weight, token != column.own, texts[index]))
    return tokens


def _rows(logprobs: Any) -> list[_Row]:
    """The tokens in either of the API's two forms."""
    dumped = logprobs.model_dump() if hasattr(logprobs, "model_dump") else logprobs
    try:
        if "tokens" in dumped:
            pairs = zip(dumped["tokens"], dumped["top_logprobs"], strict=True)
            return [_Row(str(token), dict(top or {}), None) for token, top in pairs]
        return [
            _Row(
                str(entry["token"]),
                {top["token"]: top["logprob"] for top in entry.get("top_logprobs") or []},
                _own_text(entry.get("bytes")),
            )
            for entry in dumped["content"]
        ]
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # of another form, somewhere
        raise ValueError(
            f"logprobs={str(dumped)[:_SHOWN]}: expected the logprobs of a chat completion (with content) or of a text "
            "completion (with tokens and top_logprobs); the request must ask for them, see routing_request"
        ) from error


def _id(placeholder: str) -> int:
    digits = placeholder.removeprefix(_PLACEHOLDER)
    if digits == placeholder or not (digits.isascii() and digits.isdigit()):
        raise ValueError(f"token={placeholder!r}: expected an id; the request must have return_tokens_as_token_ids")
    return int(digits)


def _own_text(content: Any) -> str | None:
    """A token's text from its bytes: vLLM gives a character's to the token that completes it."""
    try:
        return bytes(content).decode()
    except (TypeError, ValueError):
        return None


def _texts(text: str | None, rows: Sequence[_Row]) -> list[str | None]:
    """The part of ``text`` that each row wrote."""
    if text is None or not rows:
        return [None] * len(rows)
    parts: list[str | None] = []
    for row in rows[:-1]:
        if row.text is None or not text.startswith(row.text):
            break
        parts.append(row.text)
        text = text[len(row.text) :]
    parts += [""] * (len(rows) - 1 - len(parts))
    return [*parts, text]
