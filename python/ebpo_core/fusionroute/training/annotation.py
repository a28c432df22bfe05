"""One frozen expert over many sequences: its most likely token and its log-probability of the label, at every label."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .losses import CHUNK_VALUES, IGNORE
from .sequences import TokenSequences

# Logits of one batch, at most: 1 Gi values are 2 GiB in bfloat16.
_BATCH_LOGITS = 1 << 30


class ExpertSource(NamedTuple):
    """An expert that is loaded when its turn comes.

    Attributes:
        name: shown in messages.
        identity: a string that changes whenever the expert's outputs may: hash of its weights, dtype, quantisation.
        load: returns the expert: callable with ``input_ids``, ``attention_mask``, ``use_cache`` and ``logits_to_keep``,
            returning an object with ``logits``; its ``device`` is where inputs go.
    """

    name: str
    identity: str
    load: Callable[[], Any]


class Annotation(NamedTuple):
    """Of one sequence with L labels: ``argmax`` int32 and ``logprobs`` float32; ``[L]``, or ``[L, n]`` of n experts."""

    argmax: NDArray[np.int32]
    logprobs: NDArray[np.float32]


def annotate(
    expert: Any,
    sequences: TokenSequences,
    indices: Sequence[int],
    *,
    vocab_size: int,
    batch_tokens: int = 8192,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Annotation]:
    """Run ``expert`` over the sequences ``indices``, in batches of similar length, without gradient.

    Args:
        expert: see :class:`ExpertSource`.
        sequences: the data.
        indices: which sequences; the result has their order.
        vocab_size: V; argmax and log-softmax are over v < V, in float32.
        batch_tokens: tokens of a batch, padding included.
        advance: called with the number of sequences done since the last call.

    Raises:
        FloatingPointError: a log-probability that is not finite, with the sequence that has it.
    """
    batch_tokens = min(batch_tokens, max(1, _BATCH_LOGITS // vocab_size))
    found: dict[int, Annotation] = {}
    for batch in sequences.batches(indices, batch_tokens):
        found |= zip(batch, _run(expert, sequences, batch, vocab_size), strict=True)
        advance(len(batch))
    return [found[i] for i in indices]


@torch.no_grad()
def _run(expert: Any, sequences: TokenSequences, batch: list[int], vocab_size: int) -> Iterator[Annotation]:
    ids, mask, labels, keep = sequences.padded(batch)
    logits = expert(
        input_ids=torch.from_numpy(ids).to(expert.device),
        attention_mask=torch.from_numpy(mask).to(expert.device),
        use_cache=False,
        logits_to_keep=keep,
    ).logits[:, -keep:-1]
    wanted = torch.from_numpy(labels[:, 1 - keep :]).to(logits.device)
    at = wanted != IGNORE
    rows, y = logits[at], wanted[at]
    best, picked = [], []
    for part in range(0, len(y), max(1, CHUNK_VALUES // vocab_size)):
        chunk = slice(part, part + max(1, CHUNK_VALUES // vocab_size))
        z = rows[chunk, :vocab_size].float()
        best.append(z.argmax(dim=-1).int().cpu())
        picked.append((z.gather(1, y[chunk, None])[:, 0] - z.logsumexp(dim=-1)).cpu())
    argmax, logprobs = torch.cat(best).numpy(), torch.cat(picked).numpy()
    ends = np.cumsum(at.sum(dim=1).cpu().numpy())
    for i, argmax_i, logprobs_i in zip(batch, np.split(argmax, ends[:-1]), np.split(logprobs, ends[:-1]), strict=True):
        if not np.isfinite(logprobs_i).all():
            raise FloatingPointError(f"sequence {i}: a label has log-probability {logprobs_i.min()}")
        yield Annotation(argmax_i, logprobs_i)
