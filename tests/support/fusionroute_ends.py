"""Ends of rows: by a criterion that differs from row to row, and by strings."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, StoppingCriteria


def character(token: int) -> str:
    return chr(0x61 + token)


def at_string(*stops: int) -> dict[str, Any]:
    """Arguments that end a row at any of some tokens."""
    return {"stop_strings": [character(stop) for stop in stops], "tokenizer": character_tokenizer()}


def character_tokenizer() -> Any:
    """One character a token, which transformers' search for stop strings can take apart."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE({character(token): token for token in range(200)}, []))
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


class After(StoppingCriteria):
    """Row i ends after ``counts[i]`` new tokens; like many criteria it says so in that step only.

    ``seen`` are the tokens that it was shown, step by step.
    """

    def __init__(self, prompt: int, counts: list[int]) -> None:
        self.ends = torch.tensor([prompt + count for count in counts])
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: Any, *_: Any, **__: Any) -> Any:
        self.seen.append(input_ids.clone())
        return self.ends[: len(input_ids)] == input_ids.shape[1]
