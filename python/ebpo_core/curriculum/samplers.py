"""Orders of a data set for training: shuffled, from easy to hard, or in batches of one topic (arXiv 2602.05165, §3.4).

A sampler yields indices, as PyTorch's do, and needs no torch itself. It is seeded, and each rank gets a strided part of
one order that all ranks share, so every index comes up exactly once an epoch over all ranks. Its state is a few
numbers: an interrupted run goes on at the next index, also on another number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Order = Literal["shuffled", "easy_to_hard", "topic", "topic_blocks"]
Indices = NDArray[np.int64]

_STATE_VERSION = 1


def easy_to_hard(pass_rates: Sequence[float], rng: np.random.Generator) -> Indices:
    """Indices by falling pass rate; ties, frequent with few rollouts, are in random order."""
    rates = np.asarray(pass_rates, dtype=np.float64)
    return np.lexsort((rng.permutation(len(rates)), -rates)).astype(np.int64)


def topic_batches(
    topics: Sequence[Hashable], batch_size: int, rng: np.random.Generator, *, blocks: bool = False
) -> Indices:
    """Indices in which every ``batch_size`` neighbours, from the start, share a topic as far as that is possible.

    Each topic is shuffled and cut into batches. With ``blocks`` the topics come one after another, in random order;
    else their batches are shuffled together. What is left of each topic, less than a batch, comes last, topic by topic.
    """
    members: dict[Hashable, list[int]] = {}
    for index, topic in enumerate(topics):
        members.setdefault(topic, []).append(index)
    whole: list[Indices] = []
    rest: list[Indices] = []
    for position in rng.permutation(len(members)):
        indices = rng.permutation(np.asarray(list(members.values())[position], dtype=np.int64))
        cut = len(indices) - len(indices) % batch_size
        whole.extend(indices[:cut].reshape(-1, batch_size))
        rest.append(indices[cut:])
    if not blocks:
        whole = [whole[position] for position in rng.permutation(len(whole))]
    return np.concatenate([*whole, *rest])


class CurriculumSampler:
    """Indices of a data set in the order of a curriculum; pass it as ``sampler=`` to a ``DataLoader``.

    Args:
        size: Rows of the data set.
        order: ``"shuffled"``; ``"easy_to_hard"``, by falling ``pass_rates``; ``"topic"``: batches of one topic in
            random order; ``"topic_blocks"``: batches of one topic, one topic after another.
        pass_rates: ``(size,)`` pass rates of the base model in [0, 1], for ``"easy_to_hard"``.
        topics: ``(size,)`` labels, for the topic orders.
        batch_size: Prompts of a batch over *all* ranks: what the topic orders make coherent and ``drop_last`` cuts to.
        rank: This process, 0..world_size - 1.
        world_size: Processes that share the data.
        seed: The same on every rank; each epoch has an order of its own.
        drop_last: Leave out the last, smaller batch of an epoch. Otherwise all indices come up, and where
            ``world_size`` does not divide ``size`` the first ranks get one more than the others.

    Without :meth:`set_epoch` an epoch that was read to its end is followed by the next one. State counts the indices
    *drawn* from the sampler, so worker processes of a loader, which draw ahead, need torchdata's
    ``StatefulDataLoader``: it saves the sampler's state as of the batch that it handed out.
    """

    def __init__(
        self,
        size: int,
        order: Order = "shuffled",
        *,
        pass_rates: Sequence[float] | None = None,
        topics: Sequence[Hashable] | None = None,
        batch_size: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if order not in get_args(Order):
            raise ValueError(f"order={order!r}: choose one of {', '.join(get_args(Order))}")
        if size < 1 or batch_size < 1 or world_size < 1:
            raise ValueError(f"size={size}, batch_size={batch_size}, world_size={world_size}: expected at least 1 each")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: expected 0 to {world_size - 1} for world_size={world_size}")
        if seed < 0:
            raise ValueError(f"seed={seed}: expected at least 0")
        wanted = {"easy_to_hard": ("pass_rates", pass_rates), "topic": ("topics", topics)}
        for name, values in [wanted[key] for key in wanted if order.startswith(key)]:
            if values is None or len(values) != size:
                given = "none" if values is None else len(values)
                raise ValueError(f"{name}: order={order!r} needs one for each of the {size} rows, got {given}")
        if order == "easy_to_hard":
            rates = np.asarray(pass_rates, dtype=np.float64)
            if not ((rates >= 0) & (rates <= 1)).all():
                raise ValueError(f"pass_rates[{int(np.argmin((rates >= 0) & (rates <= 1)))}] is not in [0, 1]")
            pass_rates = rates.tolist()
        self.size, self.order, self.batch_size = size, order, batch_size
        self.pass_rates, self.topics = pass_rates, topics
        self.rank, self.world_size = rank, world_size
        self.seed, self.drop_last = seed, drop_last
        self.epoch = 0
        self._drawn = 0  # of this epoch, over all ranks
        self._resume = 0  # where the next iteration starts, over all ranks

    def plan(self, epoch: int | None = None) -> Indices:
        """An epoch's whole order over all ranks, the same on each: ``(size,)``, or less with ``drop_last``."""
        rng = np.random.default_rng([self.seed, self.epoch if epoch is None else epoch])
        if self.order == "easy_to_hard" and self.pass_rates is not None:
            indices = easy_to_hard(self.pass_rates, rng)
        elif self.topics is not None and self.order.startswith("topic"):
            indices = topic_batches(self.topics, self.batch_size, rng, blocks=self.order == "topic_blocks")
        else:
            indices = rng.permutation(self.size).astype(np.int64)
        return indices[: self._used()]

    def _used(self) -> int:
        return self.size - self.size % self.batch_size if self.drop_last else self.size

    def __iter__(self) -> Iterator[int]:
        """The rest of the epoch for this rank."""
        start, self._resume = self._resume, 0
        self._drawn = start
        for index in self.plan()[start:][self.rank :: self.world_size]:
            self._drawn += self.world_size
            yield int(index)
        self.epoch += 1
        self._drawn = 0

    def __len__(self) -> int:
        """Indices of a whole epoch for this rank."""
        return len(range(self.rank, self._used(), self.world_size))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; a place loaded for that very epoch is kept."""
        if epoch < 0:
            raise ValueError(f"epoch={epoch}: expected at least 0")
        if epoch != self.epoch:
            self.epoch, self._drawn, self._resume = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """The place of the sampler, JSON-safe. The same on every rank after the same number of indices."""
        return {
            "version": _STATE_VERSION,
            "epoch": self.epoch,
            "drawn": min(max(self._drawn, self._resume), self._used()),
            "curriculum": self._fingerprint(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` stood, also with another ``world_size``.

        Raises:
            ValueError: The state is of another order, seed, data set or batch size, or not a state; nothing changes.
        """
        epoch, drawn = state.get("epoch"), state.get("drawn")
        if state.get("version") != _STATE_VERSION or not isinstance(epoch, int) or not isinstance(drawn, int):
            raise ValueError(f"state={dict(state)!r}: pass what CurriculumSampler.state_dict() returned")
        if state.get("curriculum") != self._fingerprint():
            raise ValueError(
                "the state is of a curriculum with another order, seed, size, batch_size or drop_last, or with other "
                "topics or pass rates: build the sampler as it was when the state was saved"
            )
        if epoch < 0 or not 0 <= drawn <= self._used():
            raise ValueError(f"state has epoch={epoch} and drawn={drawn}: this curriculum has {self._used()} indices")
        self.epoch, self._drawn, self._resume = epoch, drawn, drawn

    def _fingerprint(self) -> str:
        """Everything that the order depends on, in 16 hex digits."""
        labels = self.topics if self.order.startswith("topic") else None
        rates = self.pass_rates if self.order == "easy_to_hard" else None
        parts = [self.size, self.order, self.batch_size, self.seed, self.drop_last, rates, labels and list(labels)]
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
