"""From the rows that people have (messages, prompts with completions, preference pairs) to labelled token sequences."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError

from .losses import IGNORE
from .sequences import PreferencePairs, TokenSequences, common_prefix

Ids = list[int]
Row = tuple[Ids, Ids]  # input_ids and labels
TrainOn = Literal["completion", "all"]

SAMPLE_FORMS = (
    '{"messages": [...]}, {"prompt": ..., "completion": ...} (strings or lists of messages), {"text": ...}, '
    '{"conversations": [{"from": ..., "value": ...}, ...]}, {"input_ids": [...], "labels": [...]}'
)
PAIR_FORMS = (
    '{"prompt": ..., "chosen": ..., "rejected": ...} (strings or lists of messages), {"chosen": ..., "rejected": ...} '
    'with the prompt inside, {"conversations": [...], "chosen": {...}, "rejected": {...}}, '
    '{"prompt_ids": [...], "chosen_ids": [...], "rejected_ids": [...]}'
)

_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\b")


def tokenize_samples(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    train_on: TrainOn = "completion",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> TokenSequences:
    """Tokenize SFT rows.

    Strings are joined as they are (a space between prompt and completion is yours to give) and end with EOS. Messages
    go through the tokenizer's chat template; where that puts nothing after the last reply, EOS is added, since a model
    would not learn to stop. With ``train_on="completion"`` the labels are the completion, or every reply of the
    assistant in ``messages`` (by the template's ``{% generation %}`` blocks if it has them, else by comparing what the
    template makes of longer and longer conversations). Every token of a ``text`` has a label. ShareGPT's conversations
    are messages under other names. Rows that have ``labels`` are taken as they are.

    Args:
        rows: ``{"messages"}``, ``{"prompt", "completion"}``, ``{"text"}``, ``{"conversations"}`` (ShareGPT's, or of
            messages; a ``system`` column goes in front) or ``{"input_ids", "labels"}``, or a mixture of them.
        tokenizer: a transformers tokenizer; may be None if every row is tokenized.
        max_length: longer rows are cut at their end and counted; None never cuts.
        train_on: what has labels, "completion" or "all" tokens.
        chat_template_kwargs: further arguments of the chat template.

    Raises:
        TypeError: a row that is no mapping.
        ValueError: a row of no known form, without anything to learn, or whose chat template cannot be masked; a bad
            ``train_on`` or ``max_length``.
    """

    if train_on not in ("completion", "all"):
        raise ValueError(f"train_on={train_on!r}: expected 'completion' or 'all'")

    def one(row: Mapping[str, Any]) -> list[Row]:
        if row.get("input_ids") is not None:
            if row.get("labels") is None:
                raise ValueError(f"input_ids without labels: give labels too, {IGNORE} where nothing is to be learnt")
            return [_tokenized(row)]
        _need(tokenizer)
        for name in ("messages", "conversations"):
            if row.get(name) is not None:
                return [_chat(tokenizer, _conversation(row, name), train_on, chat_template_kwargs or {})]
        if row.get("prompt") is not None and row.get("completion") is not None:
            prompt, completions = _turns(row["prompt"], row["completion"])
            sides, start = _continuations(tokenizer, prompt, completions, chat_template_kwargs or {})
            return [(sides[0], _labels(sides[0], 0 if train_on == "all" else start))]
        if row.get("text") is not None:
            ids = _with_eos(tokenizer, _encode(tokenizer, _text(row["text"])))
            return [(ids, list(ids))]
        raise ValueError(f"columns {sorted(row)}: a row of SFT data must be one of {SAMPLE_FORMS}")

    return _collect(rows, one, max_length)


def tokenize_pairs(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PreferencePairs:
    """Tokenize preference rows; the labels are the completions', EOS included.

    Strings, messages and EOS are treated as in :func:`tokenize_samples`. Without a prompt column the prompt is what the
    two sides have in common: their first messages, or their first tokens.

    Args:
        rows: ``{"prompt", "chosen", "rejected"}``, ``{"chosen", "rejected"}``, ``{"conversations", "chosen",
            "rejected"}`` (ShareGPT's) or ``{"prompt_ids", "chosen_ids", "rejected_ids"}``.
        tokenizer: a transformers tokenizer; may be None if every row is tokenized.
        max_length: longer sides are cut at their end and counted; a pair is dropped, and counted, if nothing is left of
            one completion.
        chat_template_kwargs: further arguments of the chat template.

    Raises:
        TypeError: a row that is no mapping.
        ValueError: a row of no known form, or without anything to learn.
    """

    def one(row: Mapping[str, Any]) -> list[Row]:
        if row.get("prompt_ids") is not None:
            prompt, *sides = (_ids(row, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
            return [(prompt + side, _labels(prompt + side, len(prompt))) for side in sides]
        _need(tokenizer)
        if row.get("chosen") is None or row.get("rejected") is None:
            raise ValueError(f"columns {sorted(row)}: a row of preference data must be one of {PAIR_FORMS}")
        begin: Any = row.get("prompt")
        if begin is None and row.get("conversations") is not None:
            begin = _conversation(row, "conversations")
        prompt, completions = _turns(begin, row["chosen"], row["rejected"])
        ids, start = _continuations(tokenizer, prompt, completions, chat_template_kwargs or {})
        return [(side, _labels(side, start)) for side in ids]

    return PreferencePairs(_collect(rows, one, max_length))


def _collect(
    rows: Iterable[Mapping[str, Any]], one: Callable[[Mapping[str, Any]], list[Row]], max_length: int | None
) -> TokenSequences:
    if max_length is not None and (not isinstance(max_length, int) or max_length < 2):
        raise ValueError(
            f"max_length={max_length!r}: give a whole number of at least 2, a token and the one to predict"
        )
    kept: list[Row] = []
    truncated = dropped = 0
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"row {index} is {row!r:.60}, a {type(row).__name__}: give rows as mappings of columns")
        try:
            parts = one(row)
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from error
        except (TemplateError, TypeError) as error:  # of a library, which knows nothing of rows
            raise ValueError(
                f"row {index}: the tokenizer or its chat template does not take it ({error}): mend or leave out the "
                "row, or give another template (chat_template_kwargs)"
            ) from error
        for ids, labels in parts:
            if len(ids) != len(labels):
                raise ValueError(f"row {index}: {len(ids)} input_ids and {len(labels)} labels: give one per token")
            if not _learnable(labels):
                raise ValueError(
                    f"row {index}: nothing to learn, every label after the first token is {IGNORE}: leave it out"
                )
        if max_length is not None and any(len(ids) > max_length for ids, _ in parts):
            truncated += sum(len(ids) > max_length for ids, _ in parts)
            parts = [(ids[:max_length], labels[:max_length]) for ids, labels in parts]
            if not all(_learnable(labels) for _, labels in parts):
                dropped += 1
                continue
        kept += parts
    return TokenSequences.of(kept, truncated=truncated, dropped=dropped)


def _learnable(labels: Ids) -> bool:
    return any(label != IGNORE for label in labels[1:])


def _labels(ids: Ids, start: int) -> Ids:
    return [IGNORE] * start + ids[start:]


def _ids(row: Mapping[str, Any], name: str) -> Ids:
    """A column of token ids, labels or a mask: ``[n]``, or ``[1, n]`` as tokenizers return a single text."""
    values = row.get(name)
    try:
        found = np.asarray(values)
        found = found[0] if found.ndim == 2 and len(found) == 1 else found
        with np.errstate(invalid="ignore"):  # NaN, which is equal to nothing afterwards
            whole = found.astype(np.int64) if found.dtype.kind in "biuf" else None
    except ValueError:  # rows of different lengths
        whole = None
    limit = 2**31  # sequences are int32
    if whole is None or whole.ndim != 1 or not ((whole == found) & (whole < limit) & (whole >= -limit)).all():
        raise ValueError(f"{name} is {values!r:.80}: give a list of whole numbers below 2**31, one per token")
    ids: Ids = whole.tolist()
    return ids


def _tokenized(row: Mapping[str, Any]) -> Row:
    """Tokens and labels without the padding that an attention mask marks."""
    ids, labels = _ids(row, "input_ids"), _ids(row, "labels")
    if row.get("attention_mask") is not None and len(ids) == len(labels):
        mask = _ids(row, "attention_mask")
        if len(mask) != len(ids):
            raise ValueError(f"{len(ids)} input_ids and an attention_mask of {len(mask)}: give one entry per token")
        kept = [i for i, real in enumerate(mask) if real]
        ids, labels = [ids[i] for i in kept], [labels[i] for i in kept]
    return ids, labels


def _need(tokenizer: Any) -> None:
    if tokenizer is None:
        raise ValueError("the row is not tokenized and there is no tokenizer: pass processing_class")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, with which completions end: set tokenizer.eos_token")


# ------------------------------------------------------------------------------------- prompts and their continuations

Messages = list[dict[str, Any]]


def _turns(prompt: Any, *completions: Any) -> tuple[Any, list[Any]]:
    """A prompt and its completions in one form: all strings, or all lists of messages; the prompt may be None."""
    chats = [not isinstance(part, str) for part in (prompt, *completions) if part is not None]
    if not any(chats):
        return prompt, list(completions)
    sides: list[Messages] = [_messages(completion, "assistant") for completion in completions]
    if prompt is None or (isinstance(prompt, str) and all(side[0].get("role") != "assistant" for side in sides)):
        # The sides hold the whole conversation; a prompt that is a string beside them only repeats a part of it.
        shared = 0
        shortest = min(len(side) for side in sides)
        while shared < shortest - 1 and all(side[shared] == sides[0][shared] for side in sides):
            shared += 1
        if shared == 0:
            raise ValueError("chosen and rejected have no first message in common and there is no prompt: add one")
        return sides[0][:shared], [side[shared:] for side in sides]
    return _messages(prompt, "user"), sides


def _messages(part: Any, role: str) -> Messages:
    messages = [part] if isinstance(part, Mapping) else part
    messages = [{"role": role, "content": part}] if isinstance(part, str) else messages
    messages = list(messages) if isinstance(messages, Iterable) else []
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(
            f'{part!r} is not a list of messages: give [{{"role": ..., "content": ...}}, ...], or a string'
        )
    return [_message(message) for message in messages]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message, or ShareGPT's ``{"from", "value"}`` as one."""
    if message.get("from") is None or message.get("role") is not None:
        return dict(message)
    if not isinstance(message["from"], str) or message["from"] not in _SHAREGPT_ROLES:
        raise ValueError(f"from={message['from']!r}: use one of {sorted(_SHAREGPT_ROLES)}")
    return {"role": _SHAREGPT_ROLES[message["from"]], "content": _text(message.get("value"))}


def _conversation(row: Mapping[str, Any], name: str) -> Messages:
    """The messages of a row's column, behind those of its ``system`` column."""
    system = [] if not row.get("system") else [{"role": "system", "content": _text(row["system"])}]
    return system + _messages(row[name], "user")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is a {type(value).__name__}: give a string")
    return value


def _continuations(
    tokenizer: Any, prompt: Any, completions: Sequence[Any], options: Mapping[str, Any]
) -> tuple[list[Ids], int]:
    """Each completion behind the prompt, with EOS, and where the completions start.

    A completion starts where prompt + completion ceases to equal the prompt alone: tokenizers may merge across the
    seam, and templates may end a prompt differently when a reply follows.
    """
    if prompt is None:
        sides = [_with_eos(tokenizer, _encode(tokenizer, completion)) for completion in completions]
        return sides, min(common_prefix(sides[0], sides[-1]), min(len(side) for side in sides) - 1)
    if isinstance(prompt, str):
        alone = _encode(tokenizer, prompt)
        sides = [_with_eos(tokenizer, _encode(tokenizer, prompt + completion)) for completion in completions]
    else:
        alone = _render(tokenizer, prompt, options, add_generation_prompt=True)
        sides = [_rendered_to_the_end(tokenizer, prompt + completion, options) for completion in completions]
    return sides, min(common_prefix(alone, side) for side in sides)


def _encode(tokenizer: Any, text: str) -> Ids:
    ids: Ids = tokenizer(text)["input_ids"]
    return ids


def _with_eos(tokenizer: Any, ids: Ids) -> Ids:
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


# ---------------------------------------------------------------------------------------------------------------- chats


def _render(tokenizer: Any, messages: Messages, options: Mapping[str, Any], **more: Any) -> Ids:
    out = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **{**options, **more})
    ids: Ids = out["input_ids"]
    return ids


def _rendered_to_the_end(tokenizer: Any, messages: Messages, options: Mapping[str, Any]) -> Ids:
    """The conversation, and EOS where the template puts nothing behind the last reply."""
    ids = _render(tokenizer, messages, options)
    last = messages[-1]
    if last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        return ids
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return _with_eos(tokenizer, ids) if text.rstrip().endswith(last["content"].strip()) else ids


def _chat(tokenizer: Any, conversation: Any, train_on: TrainOn, options: Mapping[str, Any]) -> Row:
    messages = _messages(conversation, "user")
    ids = _rendered_to_the_end(tokenizer, messages, options)
    if train_on == "all":
        return ids, list(ids)
    labels = [IGNORE] * len(ids)
    if _GENERATION_BLOCK.search(str(options.get("chat_template") or tokenizer.chat_template or "")):
        out = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
        )
        mask = list(out["assistant_masks"])
        mask += [mask[-1]] * (len(ids) - len(mask))  # EOS that was added
        return ids, [token if own else IGNORE for token, own in zip(ids, mask, strict=True)]
    for turn, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        last = turn == len(messages) - 1
        until = ids if last else _render(tokenizer, messages[: turn + 1], options)
        before = _render(tokenizer, messages[:turn], options, add_generation_prompt=True) if turn else []
        if ids[: len(until)] != until:
            raise ValueError(
                f"the chat template writes the conversation up to message {turn} differently when more follows, so its "
                "replies cannot be found: give a template with {% generation %} blocks, prompt and completion columns "
                'with the last reply alone, or train_on="all"'
            )
        start = common_prefix(before, until)
        labels[start : len(until)] = until[start:]
    return ids, labels
