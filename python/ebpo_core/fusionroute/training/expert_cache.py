"""Expert cache: what every frozen expert says about every label of a data set, computed once and kept on disk.

An Arrow file per expert (see :mod:`.columns`) holds, at every label, its most likely token and its log-probability of
the label: eight bytes, so a million labels of four experts take 32 MB. Informative positions, routing accuracy, CDPO's
bias and ``routing_loss="softmax"`` need no more. ``"normalized"`` needs full distributions, which are too large to
keep, and runs the experts again while it trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray
from rich.console import Console

from ebpo_core.fusionroute.context import check_positions
from ebpo_core.fusionroute.experts.expert import Expert
from ebpo_core.fusionroute.experts.tokenizers import fingerprint
from ebpo_core.progress import bar

from .columns import SHARD_ROWS, Compute, OnChange, StoredColumns, remove
from .losses import CHUNK_VALUES, IGNORE, label_logprobs
from .ranks import on_main, world
from .sequences import TokenSequences

if TYPE_CHECKING:
    import os

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
    """Argmaxes and label log-probabilities of a sequence with L labels: ``[L]`` each, or ``[L, n]`` of n experts."""

    argmax: NDArray[np.int32]
    logprobs: NDArray[np.float32]


def expert_columns(
    folder: str | os.PathLike[str],
    sequences: TokenSequences,
    experts: Sequence[ExpertSource],
    *,
    vocab_size: int,
    tokenizer: Any = None,
    on_change: OnChange = "raise",
    shard_rows: int = SHARD_ROWS,
    batch_tokens: int = 8192,
    progress: bool = True,
) -> Dataset:
    """The expert cache in ``folder``, after computing what is missing of it; an expert without gaps is not loaded.

    The experts run one after the other, so that only one needs memory. In a torch process group every rank must call
    this, with the same arguments; they share the work.

    Args:
        folder: made if missing; all ranks must see the same one.
        sequences: the data.
        experts: n of them, in the order of the route head's rows.
        vocab_size: V; argmax and log-softmax are over v < V.
        tokenizer: the data's, so that another one is noticed; None if there is none.
        on_change: what to do with columns of other experts, data, tokenizer or V: "raise" or "rebuild".
        shard_rows: sequences per shard, the unit of work that a killed build has to repeat.
        batch_tokens: tokens that an expert gets at once, padding included.
        progress: show a bar on stderr (lines where that is no terminal).

    Returns:
        A row per sequence, in arrow format, with the columns ``argmax_<i>`` (list of int32) and ``logprobs_<i>`` (list
        of float32) of expert ``i``, one value per label. :func:`annotation` reads a row.

    Raises:
        ValueError: data outside the vocabulary, a sequence that an expert has no positions for, columns of something
            else with ``on_change="raise"``, or a folder that the ranks do not share.
        FloatingPointError: an expert's log-probability that is not finite.
    """
    if on_change not in ("raise", "rebuild"):
        raise ValueError(f"on_change={on_change!r}: use 'raise' or 'rebuild'")
    if shard_rows < 1:
        raise ValueError(f"shard_rows={shard_rows}: give at least 1")
    if not experts:
        raise ValueError("experts is empty: give the model's experts, in the order of the route head's rows")
    sequences.check(vocab_size)
    data = {
        "tokenizer": "none" if tokenizer is None else fingerprint(tokenizer, vocab_size),
        "data": sequences.fingerprint,
        "vocab_size": str(vocab_size),
    }
    stored = [
        StoredColumns(
            Path(folder),
            f"expert-{i:02d}",
            len(sequences),
            {f"argmax_{i}": pa.list_(pa.int32()), f"logprobs_{i}": pa.list_(pa.float32())},
            {"weights": source.identity, **data},
            {
                "weights": f"expert {i} {source.name!r} (its weights, or how they are loaded)",
                "tokenizer": "the tokenizer",
                "data": "the data (token ids or labels)",
            },
        )
        for i, source in enumerate(experts)
    ]
    # Before anything is computed, for all experts.
    left = on_main(lambda: _settle(Path(folder), stored, on_change, shard_rows))
    with _progress(left if progress and world()[0] == 0 else 0) as advance:
        columns = [
            each.compute(
                partial(_loaded, source, i, sequences, vocab_size, batch_tokens),
                shard_rows=shard_rows,
                advance=partial(advance, source.name),
            )
            for i, (source, each) in enumerate(zip(experts, stored, strict=True))
        ]
    return concatenate_datasets(columns, axis=1).with_format("arrow")


def annotation(columns: Dataset, i: int) -> Annotation:
    """Annotation of sequence ``i`` by n experts, ``[L, n]`` arrays, from a row of :func:`expert_columns`."""
    row = columns[i]  # a table of one row, each value of which is a list of L
    lists = {name: row[name].combine_chunks().flatten().to_numpy() for name in row.column_names}
    experts = len(lists) // 2
    return Annotation(
        np.stack([lists[f"argmax_{e}"] for e in range(experts)], axis=1),
        np.stack([lists[f"logprobs_{e}"] for e in range(experts)], axis=1),
    )


@torch.no_grad()
def annotate(
    model: Callable[..., Any],
    sequences: TokenSequences,
    indices: Sequence[int],
    *,
    name: str,
    device: torch.device | str,
    vocab_size: int,
    batch_tokens: int = 8192,
) -> list[Annotation]:
    """Run ``model`` over the sequences ``indices``, in batches of similar length, without gradient.

    Args:
        model: called as :class:`ExpertSource` says of an expert.
        sequences: the data.
        indices: which sequences; the result has their order.
        name: of the model, for messages.
        device: where its inputs go.
        vocab_size: V; argmax and log-softmax are over v < V, in float32.
        batch_tokens: tokens of a batch, padding included.

    Raises:
        FloatingPointError: a log-probability that is not finite, with the sequence that has it.
    """
    found: dict[int, Annotation] = {}
    for batch in sequences.batches(indices, min(batch_tokens, max(1, _BATCH_LOGITS // vocab_size))):
        ids, mask, labels, keep = sequences.padded(batch)  # (B, T) three times
        logits = model(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            use_cache=False,
            logits_to_keep=keep,
        ).logits[:, -keep:-1]  # (B, K - 1, V_i), of the positions that predict a label
        wanted = torch.from_numpy(labels[:, 1 - keep :]).to(logits.device)  # (B, K - 1)
        at = wanted != IGNORE
        # From here on all labels of the batch in a row, P of them; in chunks, since float32 logits are wide.
        chunk = max(1, CHUNK_VALUES // vocab_size)
        best, logprobs = [], []
        for z, y in zip(torch.split(logits[at], chunk), torch.split(wanted[at], chunk), strict=True):
            wide = z[:, :vocab_size].float()
            best.append(wide.argmax(dim=-1).int().cpu())
            logprobs.append(label_logprobs(wide, y).cpu())
        # And back to sequences.
        ends = np.cumsum(at.sum(dim=1).cpu().numpy())[:-1]
        argmax, chosen = (np.split(torch.cat(parts).numpy(), ends) for parts in (best, logprobs))
        for i, one_argmax, one_logprobs in zip(batch, argmax, chosen, strict=True):
            found[i] = Annotation(one_argmax, one_logprobs)
            if not np.isfinite(found[i].logprobs).all():
                raise FloatingPointError(
                    f"{name}, sequence {i}: a label has log-probability {found[i].logprobs.min()}: its weights or its "
                    "dtype are at fault, or the token is one it excludes"
                )
    return [found[i] for i in indices]


@contextmanager
def _loaded(
    source: ExpertSource, i: int, sequences: TokenSequences, vocab_size: int, batch_tokens: int
) -> Iterator[Compute]:
    """Expert ``i``, for as long as it computes."""
    expert = source.load()
    if isinstance(expert, Expert):
        one = (f"expert {source.name!r}", expert.model)
        check_positions(
            "a sequence", int(sequences.lengths.max()), [one], "cut the data to {limit} tokens, max_length={limit}"
        )

    def compute(rows: range) -> Mapping[str, Sequence[Any]]:
        found = annotate(
            expert,
            sequences,
            rows,
            name=f"expert {source.name!r}",
            device=expert.device,
            vocab_size=vocab_size,
            batch_tokens=batch_tokens,
        )
        return {f"argmax_{i}": [one.argmax for one in found], f"logprobs_{i}": [one.logprobs for one in found]}

    yield compute


def _settle(folder: Path, stored: Sequence[StoredColumns], on_change: OnChange, shard_rows: int) -> int:
    """Number of rows that are left to compute, after refusing or removing what is of other experts or data."""
    found = folder.glob("expert-[0-9][0-9]-*")
    surplus = [path for path in found if int(path.name.split("-")[1]) >= len(stored)]
    if surplus:
        then = 1 + max(int(path.name.split("-")[1]) for path in surplus)
        if on_change == "raise":
            raise ValueError(
                f"the expert cache in {str(folder)!r} was computed from something else; changed since: the number of "
                f"experts ({then}, now {len(stored)}). Use another folder, or on_change='rebuild' to replace it"
            )
        remove(surplus)
    for each in stored:
        each.settle(on_change)
    return sum(len(rows) for each in stored for rows in each.missing(shard_rows))


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr that is moved on by (expert, rows); nothing if there is nothing to do."""
    if not total:
        yield lambda name, rows: None  # noqa: ARG005
        return
    done = 0
    with bar(Console(stderr=True), "expert cache", total) as shown:

        def advance(name: str, rows: int) -> None:
            nonlocal done
            done += rows
            shown.update(done, name)

        yield advance
