"""Token sequences and preference pairs in memory: flat arrays with offsets, as long as the data and no longer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .losses import IGNORE


class Padded(NamedTuple):
    """B sequences, padded on the right to T tokens: ``[B, T]`` int64 each.

    Attributes:
        input_ids, attention_mask, labels: padding has a given id, mask 0 and label -100.
        keep: K, the last columns; all but the last of them predict a label in some row, logits of earlier ones are of
            no use.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    labels: NDArray[np.int64]
    keep: int


@dataclass(frozen=True, eq=False)
class TokenSequences:
    """Sequences of token ids with a label per token (-100: nothing to learn), stored one behind the other.

    The first label of a sequence is always -100: nothing comes before it that could predict it.

    Attributes:
        input_ids, labels: ``[total]`` int32.
        offsets: ``[len + 1]`` int64; sequence ``i`` is ``offsets[i]:offsets[i + 1]``.
        truncated: number of sequences that were cut to ``max_length``, the dropped ones among them.
        dropped: number of rows that are left out because cutting left them without a label.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]
    truncated: int = 0
    dropped: int = 0

    @classmethod
    def of(cls, rows: Iterable[tuple[ArrayLike, ArrayLike]], *, truncated: int = 0, dropped: int = 0) -> TokenSequences:
        """From (input_ids, labels) rows."""
        ids: list[NDArray[np.int32]] = []
        labels: list[NDArray[np.int32]] = []
        for row, (row_ids, row_labels) in enumerate(rows):
            ids.append(np.array(row_ids, dtype=np.int32).reshape(-1))
            labels.append(np.array(row_labels, dtype=np.int32).reshape(-1))
            if ids[-1].shape != labels[-1].shape:
                raise ValueError(
                    f"row {row}: {len(ids[-1])} input_ids and {len(labels[-1])} labels: give one label per token, "
                    f"{IGNORE} where there is nothing to learn"
                )
            labels[-1][:1] = IGNORE
        offsets = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum([len(x) for x in ids], out=offsets[1:])
        empty = [np.zeros(0, dtype=np.int32)]
        return cls(np.concatenate(ids or empty), np.concatenate(labels or empty), offsets, truncated, dropped)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(input_ids, labels) of sequence ``i``."""
        if not 0 <= i < len(self):
            raise IndexError(f"sequence {i} of {len(self)}")
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.input_ids[part], self.labels[part]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """``[len]``, tokens of each sequence."""
        return np.diff(self.offsets)

    @cached_property
    def label_counts(self) -> NDArray[np.int64]:
        """``[len]``, labels of each sequence that are not -100."""
        counted = np.concatenate([[0], np.cumsum(self.labels != IGNORE)])
        return np.asarray(counted[self.offsets[1:]] - counted[self.offsets[:-1]], dtype=np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every token id and label, in order."""
        digest = hashlib.sha256()
        for array in (self.offsets, self.input_ids, self.labels):
            digest.update(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes())
        return digest.hexdigest()

    def batches(self, indices: Iterable[int], tokens: int) -> Iterator[list[int]]:
        """The sequences ``indices`` in batches of at most ``tokens``, padding included (one sequence may have more).

        From long to short: what does not fit into memory fails at once.
        """
        lengths = self.lengths
        batch: list[int] = []
        for i in sorted(set(indices), key=lambda i: (-lengths[i], i)):
            if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def padded(self, batch: Sequence[int]) -> Padded:
        """The sequences ``batch``, at least one of which has a label."""
        return pad([self[i] for i in batch])

    def check(self, vocab_size: int) -> None:
        """Raise for ids that the models do not have and for sequences without a label.

        Raises:
            ValueError: naming the first such sequence.
        """
        labelled = self.labels != IGNORE
        wrong = (self.input_ids < 0) | (self.input_ids >= vocab_size)
        wrong |= labelled & ((self.labels < 0) | (self.labels >= vocab_size))
        if wrong.any():
            at = int(wrong.argmax())
            row = int(np.searchsorted(self.offsets, at, side="right")) - 1
            raise ValueError(
                f"sequence {row}: input id {self.input_ids[at]} with label {self.labels[at]} at position "
                f"{at - self.offsets[row]}: token ids must be below vocab_size={vocab_size}, the width that all "
                "sub-models share"
            )
        if len(self) and not self.label_counts.all():
            row = int((self.label_counts == 0).argmax())
            raise ValueError(f"sequence {row} has no label besides {IGNORE} after its first token: leave it out")


@dataclass(frozen=True, eq=False)
class PreferencePairs:
    """Pairs of a preferred and a rejected continuation of one prompt; only completion tokens have labels.

    Attributes:
        sequences: twice as many sequences as pairs: chosen ``2 i``, rejected ``2 i + 1``.
    """

    sequences: TokenSequences

    def __post_init__(self) -> None:
        if len(self.sequences) % 2:
            raise ValueError(f"sequences has {len(self.sequences)} rows: give chosen and rejected for every pair")

    def __len__(self) -> int:
        return len(self.sequences) // 2


def pad(rows: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]], pad_token_id: int = 0) -> Padded:
    """Rows of (input_ids, labels) as one batch; at least one of them has a label behind its first token."""
    width = max(len(ids) for ids, _ in rows)
    input_ids = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    mask = np.zeros_like(input_ids)
    labels = np.full_like(input_ids, IGNORE)
    for b, (row_ids, row_labels) in enumerate(rows):
        real = slice(len(row_ids))
        input_ids[b, real], mask[b, real], labels[b, real] = row_ids, 1, row_labels
    # The position before the first label of any row is the first that predicts one.
    first = int((labels != IGNORE).any(axis=0).argmax()) - 1
    return Padded(input_ids, mask, labels, width - first)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of leading ids that two sequences share."""
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return min(len(first), len(second))
