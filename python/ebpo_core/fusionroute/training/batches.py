"""SFT samples and preference pairs as one data set, and the batches that the trainers take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from .expert_cache import annotation
from .losses import IGNORE
from .sequences import PreferencePairs, TokenSequences, pad


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
        samples, sample_experts: SFT data and its expert cache.
        pairs, pair_experts: preference data and the expert cache of its ``sequences``.
        reference: ``[pairs, 2]`` float32, sums of log π_ref over the chosen and the rejected completion; may be set
            later, before items are read.
    """

    def __init__(
        self,
        samples: TokenSequences | None = None,
        sample_experts: Dataset | None = None,
        pairs: PreferencePairs | None = None,
        pair_experts: Dataset | None = None,
        reference: NDArray[np.float32] | None = None,
    ) -> None:
        self.samples, self.sample_experts = samples, sample_experts
        self.pairs, self.pair_experts, self.reference = pairs, pair_experts, reference
        self.num_samples = 0 if samples is None else len(samples)
        self.num_pairs = 0 if pairs is None else len(pairs)
        expected: list[tuple[Any, int]] = [(sample_experts, self.num_samples), (pair_experts, 2 * self.num_pairs)]
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
            row = _row(self.samples, self.sample_experts, i)
            return {"rows": [row], "input_ids": row.input_ids}
        pair = i - self.num_samples
        rows = [_row(self.pairs.sequences, self.pair_experts, 2 * pair + side) for side in range(2)]  # type: ignore[union-attr]
        return {"rows": rows, "reference": self.reference[pair], "input_ids": rows[0].input_ids}  # type: ignore[index]


def _row(sequences: Any, experts: Dataset, i: int) -> SequenceRow:
    input_ids, labels = sequences[i]
    return SequenceRow(input_ids, labels, *annotation(experts, i))


def informative_positions(argmax: NDArray[np.int32], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """S: ``[...]`` bool, where there is a label and some pair of experts disagrees in its most likely token.

    Args:
        argmax: ``[..., n]``, the experts' argmaxes over v < V.
        labels: ``[...]``, -100 without a label.
    """
    return np.asarray((argmax != argmax[..., :1]).any(axis=-1) & (labels != IGNORE))


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
        # (B, T): tokens and labels; (B, T, n): what the experts say, in the places of the labels.
        ids, mask, labels, keep = pad([(row.input_ids, row.labels) for row in rows], self.pad_token_id)
        labelled = labels != IGNORE
        argmax = np.zeros((*labels.shape, rows[0].argmax.shape[1]), dtype=np.int32)
        logprobs = np.zeros(argmax.shape, dtype=np.float32)
        argmax[labelled] = np.concatenate([row.argmax for row in rows])
        logprobs[labelled] = np.concatenate([row.logprobs for row in rows])
        reference = np.array([pair["reference"] for pair in pairs], dtype=np.float32).reshape(len(pairs), 2)
        arrays: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels[:, -keep:],
            "informative": informative_positions(argmax, labels)[:, -keep:],
            "expert_logprobs": logprobs[:, -keep:],
            "reference": reference,
            "counts": np.array([len(samples), len(pairs)]),
            "order": np.array(order),
        }
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
