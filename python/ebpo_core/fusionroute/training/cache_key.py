"""What an expert cache was computed from, as hashes, and how two such keys differ in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CacheKey:
    """Identifies the content of an :class:`~.expert_cache.ExpertCache`.

    Attributes:
        experts: per expert, in the order of the route head's rows, what decides its outputs: the hash of its weights
            and how they are loaded.
        tokenizer: of the vocabulary, see :func:`tokenizer_fingerprint`.
        data: of the token ids and labels, see :attr:`~.sequences.TokenSequences.fingerprint`.
        vocab_size: V.
    """

    experts: tuple[str, ...]
    tokenizer: str
    data: str
    vocab_size: int

    @classmethod
    def of(cls, content: dict[str, Any]) -> CacheKey:
        """From the object in a manifest."""
        return cls(tuple(content["experts"]), content["tokenizer"], content["data"], content["vocab_size"])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"experts": list(self.experts)}

    @property
    def digest(self) -> str:
        """SHA-256 of all parts."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def changes(self, now: CacheKey, names: Sequence[str] = ()) -> list[str]:
        """Which parts differ in ``now``, in words; ``names`` are the experts' of ``now``."""
        found = []
        if len(self.experts) != len(now.experts):
            found.append(f"the number of experts ({len(self.experts)}, now {len(now.experts)})")
        for i, (old, new) in enumerate(zip(self.experts, now.experts, strict=False)):
            if old != new:
                name = f" {names[i]!r}" if i < len(names) else ""
                found.append(f"expert {i}{name} (its weights, or how they are loaded)")
        if self.tokenizer != now.tokenizer:
            found.append("the tokenizer")
        if self.data != now.data:
            found.append("the data (token ids or labels)")
        if self.vocab_size != now.vocab_size:
            found.append(f"vocab_size ({self.vocab_size}, now {now.vocab_size})")
        return found


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary (tokens and their ids); ``"none"`` for None."""
    if tokenizer is None:
        return "none"
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
