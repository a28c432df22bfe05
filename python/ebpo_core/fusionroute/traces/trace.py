"""The record of which expert wrote which token, as generation returns it, and its JSON form. Needs no torch.

One object per sequence::

    {"format": "fusionroute/trace", "version": 1,
     "experts": ["math", "code"],        # distinct names; a token's "expert" is an index into this list
     "prompt": "..." | null,
     "text": "..." | null,               # the response; the tokens' texts, where they are there, concatenate to it
     "tokens": [{"id": 12, "text": " the" | null, "expert": 0, "weight": 0.93, "overruled": false}, ...]}

A file holds one object, a JSON array of them, or one object a line. ``prompt`` and the two ``text`` may be left out
when they are null; everything else is required, and a key that is not in this list is refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ebpo_core.files import write_text
from ebpo_core.fusionroute.traces.token_texts import token_texts

FORMAT = "fusionroute/trace"
VERSION = 1
LINES_SUFFIX = ".jsonl"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RoutedToken:
    """One emitted token.

    Attributes:
        id: Its id in the shared vocabulary.
        expert: Index of the expert whose log-probabilities were added to the router's.
        weight: softmax(W h_t) at that expert, in [0, 1].
        overruled: The token differs from that expert's own argmax, so the router (or sampling) changed it.
        text: What the token adds to the text, "" where it adds nothing yet; None where nobody decoded it.
    """

    id: int
    expert: int
    weight: float
    overruled: bool
    text: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("id", self.id), ("expert", self.expert)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r}: expected a whole number of at least 0")
        number = isinstance(self.weight, (int, float)) and not isinstance(self.weight, bool)
        if not number or not 0 <= self.weight <= 1:
            raise ValueError(f"weight={self.weight!r}: expected a number in [0, 1], softmax(W h) of the expert")
        if not isinstance(self.overruled, bool):
            raise ValueError(f"overruled={self.overruled!r}: expected true or false")
        _check_text("text", self.text)

    def to_dict(self) -> dict[str, Any]:
        """The token's JSON object."""
        return {
            "id": self.id,
            "text": self.text,
            "expert": self.expert,
            "weight": self.weight,
            "overruled": self.overruled,
        }

    @classmethod
    def from_dict(cls, content: Any) -> RoutedToken:
        """The token of a JSON object; ValueError names what is missing, unknown, or of a wrong type."""
        _check_keys("token", content, required=("id", "expert", "weight", "overruled"), optional=("text",))
        return cls(**content)


@dataclass(frozen=True, slots=True)
class RoutingTrace:
    """One response, token by token. Sequences given for ``experts`` and ``tokens`` are kept as tuples."""

    experts: tuple[str, ...]
    tokens: tuple[RoutedToken, ...] = ()
    prompt: str | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        for name in ("experts", "tokens"):
            value = getattr(self, name)
            if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
                raise ValueError(f"{name}={value!r}: expected a list")
            object.__setattr__(self, name, tuple(value))
        if not self.experts:
            raise ValueError("experts=[]: expected at least one name")
        for expert in self.experts:
            if not isinstance(expert, str) or not expert:
                raise ValueError(f"experts={list(self.experts)!r}: expected names, found {expert!r}")
            _check_text("experts", expert)
        if len(set(self.experts)) < len(self.experts):
            raise ValueError(f"experts={list(self.experts)!r}: expected distinct names")
        for index, token in enumerate(self.tokens):
            if not isinstance(token, RoutedToken):
                raise ValueError(f"tokens[{index}]={token!r}: expected a RoutedToken")
            if token.expert >= len(self.experts):
                raise ValueError(f"tokens[{index}].expert={token.expert}: there are {len(self.experts)} experts")
        _check_text("prompt", self.prompt)
        _check_text("text", self.text)
        if self.text is not None and self.decoded and self.text != "".join(token.text or "" for token in self.tokens):
            raise ValueError("text: the tokens' texts do not concatenate to it; make both with with_text(tokenizer)")

    @classmethod
    def from_columns(
        cls,
        experts: Sequence[str],
        ids: Any,
        expert: Any,
        weight: Any,
        overruled: Any,
        *,
        prompt: str | None = None,
    ) -> RoutingTrace:
        """A trace without texts from four columns of equal length T: lists, or 1-D arrays or tensors (``tolist``).

        Args:
            experts: The experts' names.
            ids: Token ids [T], whole numbers.
            expert: Selected experts [T], whole numbers.
            weight: softmax(W h_t) at them [T], float.
            overruled: Whether each token differs from its expert's argmax [T], bool.
            prompt: The prompt's text.

        Raises:
            ValueError: Columns of unequal length, or a value that :class:`RoutedToken` refuses.
        """
        columns = [column.tolist() if hasattr(column, "tolist") else list(column) for column in (ids, expert, weight)]
        columns.append(overruled.tolist() if hasattr(overruled, "tolist") else list(overruled))
        lengths = [len(column) for column in columns]
        if len(set(lengths)) > 1:
            raise ValueError(f"ids, expert, weight, overruled: lengths {lengths}, expected equal ones")
        return cls(tuple(experts), tuple(RoutedToken(*row) for row in zip(*columns, strict=True)), prompt=prompt)

    def to_dict(self) -> dict[str, Any]:
        """The sequence's JSON object, as in this module's docstring."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "experts": list(self.experts),
            "prompt": self.prompt,
            "text": self.text,
            "tokens": [token.to_dict() for token in self.tokens],
        }

    @classmethod
    def from_dict(cls, content: Any) -> RoutingTrace:
        """The trace of a JSON object.

        Raises:
            ValueError: Another format or version, a missing or unknown key, a value of a wrong type, an expert's index
                out of range, or token texts that do not concatenate to ``text``.
        """
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, Mapping) else type(content).__name__
            raise ValueError(f"format={found!r}: expected an object of format {FORMAT!r}")
        version = content.get("version")
        if version != VERSION or isinstance(version, bool):
            raise ValueError(
                f"version={version!r}: this ebpo_core reads {VERSION}; upgrade ebpo-core to the version that wrote it"
            )
        required = ("format", "version", "experts", "tokens")
        _check_keys("trace", content, required=required, optional=("prompt", "text"))
        if not isinstance(content["tokens"], list):
            raise ValueError(f"tokens: expected a list, found {type(content['tokens']).__name__}")
        tokens = [
            _at(f"tokens[{index}]", RoutedToken.from_dict, token) for index, token in enumerate(content["tokens"])
        ]
        return cls(content["experts"], tuple(tokens), content.get("prompt"), content.get("text"))

    @property
    def decoded(self) -> bool:
        """True if every token has its text."""
        return all(token.text is not None for token in self.tokens)

    @property
    def counts(self) -> dict[str, int]:
        """Tokens per expert, experts without any included."""
        counts = [0] * len(self.experts)
        for token in self.tokens:
            counts[token.expert] += 1
        return dict(zip(self.experts, counts, strict=True))

    @property
    def shares(self) -> dict[str, float]:
        """Share of the tokens per expert, summing to 1; NaN for each where there are no tokens."""
        return {name: count / len(self.tokens) if self.tokens else math.nan for name, count in self.counts.items()}

    @property
    def overruled_share(self) -> float:
        """Share of the tokens that differ from their expert's own argmax; NaN where there are no tokens."""
        return sum(token.overruled for token in self.tokens) / len(self.tokens) if self.tokens else math.nan

    @property
    def switches(self) -> int:
        """The number of tokens that come from another expert than the token before them."""
        return sum(a.expert != b.expert for a, b in zip(self.tokens, self.tokens[1:], strict=False))

    def with_text(
        self, tokenizer: Any, prompt_ids: Iterable[int] | None = None, *, skip_special_tokens: bool = True
    ) -> RoutingTrace:
        """This trace with the text of every token, and with ``text``, to which they concatenate.

        A token that ends inside a character (byte-level BPE, byte fallback) adds "" and the token which completes the
        character adds all of it. Bytes that never become valid UTF-8 show as U+FFFD, at the first of them. A special
        token adds "" unless ``skip_special_tokens`` is False.

        Args:
            tokenizer: A transformers tokenizer; its ``decode`` is called without cleaning up spaces.
            prompt_ids: The prompt's ids, without padding. With them ``text`` is what the response adds to the decoded
                prompt, which keeps the first word's space where a tokenizer drops it at the start of a text
                (SentencePiece), and ``prompt`` is decoded too if this trace has none.
            skip_special_tokens: As in ``tokenizer.decode``.
        """

        def decode(ids: list[int]) -> str:
            if not ids:
                return ""
            return str(
                tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
            )

        context = [int(token) for token in prompt_ids] if prompt_ids is not None else []
        pieces = token_texts(decode, context, [token.id for token in self.tokens])
        tokens = tuple(dataclasses.replace(token, text=piece) for token, piece in zip(self.tokens, pieces, strict=True))
        prompt = decode(context) if self.prompt is None and prompt_ids is not None else self.prompt
        return RoutingTrace(self.experts, tokens, prompt, "".join(pieces))


def dump(path: str | os.PathLike[str], traces: RoutingTrace | Sequence[RoutingTrace]) -> Path:
    """Write traces: one object, an array of several, or one object a line where ``path`` ends in ``.jsonl``.

    A reader sees the old file or the new one, never half of one. Returns the file's path; ValueError for no trace.
    """
    several = [traces] if isinstance(traces, RoutingTrace) else list(traces)
    if not several:
        raise ValueError("traces=[]: expected at least one")
    target = Path(path)
    objects = [trace.to_dict() for trace in several]
    if target.suffix == LINES_SUFFIX:
        text = "".join(json.dumps(item, ensure_ascii=False, allow_nan=False) + "\n" for item in objects)
    else:
        content = objects[0] if len(objects) == 1 else objects
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, text)
    return target


def load(path: str | os.PathLike[str]) -> list[RoutingTrace]:
    """Read what :func:`dump` wrote, or the same written by others, whatever the file's name.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not JSON, or an object that is not a trace; the message has the file and the place in it.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"path={str(file)!r}: no such file; give a trace that dump() or `--routing` wrote")
    try:
        text = file.read_text(encoding="utf-8")
        content = _parse(text)
    except ValueError as error:
        raise ValueError(f"path={str(file)!r}: not JSON ({error})") from error
    if not content:
        raise ValueError(f"path={str(file)!r}: holds no trace")
    return [_at(f"path={str(file)!r}, {place}", RoutingTrace.from_dict, item) for place, item in content]


def _parse(text: str) -> list[tuple[str, Any]]:
    """The objects in a file's text, each with its place for errors."""
    if not text.strip():
        return []
    try:
        content = json.loads(text)
    except ValueError:
        # JSON escapes a newline inside a string, so "\n" separates the lines and nothing else does.
        lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        if not (lines[0][1].startswith("{") and lines[0][1].rstrip().endswith("}")):
            raise
        return [(place, _at(place, json.loads, line)) for place, line in lines]
    if isinstance(content, list):
        return [(f"trace {index}", item) for index, item in enumerate(content)]
    return [("trace 0", content)]


def _at(place: str, function: Callable[[Any], T], argument: Any) -> T:
    """``function(argument)``, with the place in front of what a ValueError says."""
    try:
        return function(argument)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _check_text(name: str, value: Any) -> None:
    """Text that UTF-8 can hold (a lone surrogate cannot be printed nor written), or None."""
    if value is None:
        return
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r}: expected text or null")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}={value!r}: holds a lone surrogate, which is not a character") from error


def _check_keys(what: str, content: Any, *, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    if not isinstance(content, Mapping):
        raise ValueError(f"expected an object for a {what}, found {type(content).__name__}")
    missing = [key for key in required if key not in content]
    unknown = [str(key) for key in content if key not in required + optional]
    if missing or unknown:
        parts = ["missing " + ", ".join(map(repr, missing))] if missing else []
        parts += ["unknown " + ", ".join(map(repr, unknown))] if unknown else []
        raise ValueError(f"{what}: {'; '.join(parts)}; the keys are {', '.join(required + optional)}")
