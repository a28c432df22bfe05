"""SFT samples and preference pairs as one data set, and the batches that the trainers take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .expert_cache import ExpertCache
from .losses import IGNORE
from .sequences import PreferencePairs, TokenSequences


class SequenceRow(NamedTuple):
    """One sequence of T tokens with L labels, and what n experts say of them."""

    input_ids: NDArray[np.int32]  # [T]
    labels: NDArray[np.int32]  # [T]
    argmax: NDArray[np.int32]  # [L, n]
    logprobs: NDArray[np.float32]  # [L, n]


class MixDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """First the SFT samples, then the preference pairs; either may be missing. A map-style torch data set.

    An item is ``{"rows": [SequenceRow], "input_ids": ...}`` for a sample and ``{"rows": [chosen, rejected],
    "reference": [chosen, rejected], "input_ids": ...}`` for a pair; ``input_ids`` are the first row's, for samplers
    that group by length.

    Args:
        samples, sample_cache: SFT data and its expert cache.
        pairs, pair_cache: preference data and the expert cache of its ``sequences``.
        reference: ``[pairs, 2]`` float32, sums of log π_ref over the chosen and the rejected completion; may be set
            later, before items are read.
    """

    def __init__(
        self,
        samples: TokenSequences | None = None,
        sample_cache: ExpertCache | None = None,
        pairs: PreferencePairs | None = None,
        pair_cache: ExpertCache | None = None,
        reference: NDArray[np.float32] | None = None,
    ) -> None:
        self.samples, self.sample_cache = samples, sample_cache
        self.pairs, self.pair_cache, self.reference = pairs, pair_cache, reference
        self.num_samples = 0 if samples is None else len(samples)
        self.num_pairs = 0 if pairs is None else len(pairs)
        expected: list[tuple[Any, int]] = [(sample_cache, self.num_samples), (pair_cache, 2 * self.num_pairs)]
        for part, length in [*expected, *([] if reference is None else [(reference, self.num_pairs)])]:
            if (0 if part is None else len(part)) != length:
                raise ValueError(
                    f"{self.num_samples} samples and {self.num_pairs} pairs, but {type(part).__name__} has "
                    f"{0 if part is None else len(part)} entries where {length} are needed"
                )

    def __len__(self) -> int:
        return self.num_samples + self.num_pairs

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        if i < self.num_samples:
            row = SequenceRow(*self.samples[i], *self.sample_cache[i])  # type: ignore[index]
            return {"rows": [row], "input_ids": row.input_ids}
        pair = i - self.num_samples
        sides = (2 * pair, 2 * pair + 1)
        rows = [SequenceRow(*self.pairs.sequences[s], *self.pair_cache[s]) for s in sides]  # type: ignore[union-attr, index]
        return {"rows": rows, "reference": self.reference[pair], "input_ids": rows[0].input_ids}  # type: ignore[index]


class MixCollator:
    """Items of :class:`MixDataset` to one batch of ``n_s`` samples and ``n_p`` pairs.

    Rows are the samples, then the chosen, then the rejected sides: ``B = n_s + 2 n_p``, padded on the right to T. What
    belongs to labels has the last K columns alone, K − 1 of which have a label in some row, so that logits of prompts
    need not be computed (``logits_to_keep=K``)::

        input_ids, attention_mask   [B, T] int64
        labels                      [B, K] int64, -100 without a label; the first column always is
        informative                 [B, K] bool, S
        expert_logprobs             [B, K, n] float32, 0 without a label
        reference                   [n_p, 2] float32
        counts                      [2] int64, n_s and n_p
        order                       [n_s + n_p] int64, where the samples, then the pairs, stood among the items

    Args:
        pad_token_id: any id below V; padding is masked.
    """

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        samples = [item for item in items if "reference" not in item]
        pairs = [item for item in items if "reference" in item]
        order = sorted(range(len(items)), key=lambda i: "reference" in items[i])
        rows = [item["rows"][0] for item in samples]
        rows += [pair["rows"][side] for side in range(2) for pair in pairs]
        width = max(len(row.input_ids) for row in rows)
        experts = rows[0].argmax.shape[1]
        ids = np.full((len(rows), width), self.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        labels = np.full((len(rows), width), IGNORE, dtype=np.int64)
        informative = np.zeros((len(rows), width), dtype=bool)
        logprobs = np.zeros((len(rows), width, experts), dtype=np.float32)
        for b, row in enumerate(rows):
            length = len(row.input_ids)
            ids[b, :length], mask[b, :length], labels[b, :length] = row.input_ids, 1, row.labels
            at = np.flatnonzero(row.labels != IGNORE)
            informative[b, at] = (row.argmax != row.argmax[:, :1]).any(axis=1)
            logprobs[b, at] = row.logprobs
        first = int((labels != IGNORE).any(axis=0).argmax()) - 1
        reference = np.array([pair["reference"] for pair in pairs], dtype=np.float32).reshape(len(pairs), 2)
        arrays: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels[:, first:],
            "informative": informative[:, first:],
            "expert_logprobs": logprobs[:, first:],
            "reference": reference,
            "counts": np.array([len(samples), len(pairs)]),
            "order": np.array(order),
        }
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
