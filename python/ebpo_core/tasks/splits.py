"""Train and test splits that cannot overlap, and the clusters of a task taking turns."""

from __future__ import annotations

import random
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

_TEST_SHARE = 4


def split_of(key: str) -> str:
    """The split, "train" or "test", of the problem named ``key``; one key in four is in the test split.

    Whatever the seeds and the sizes, no training set and no warm-up can then contain a test problem.
    """
    return "test" if blake2b(key.encode(), digest_size=1).digest()[0] % _TEST_SHARE == 0 else "train"


def check_choice(name: str, values: Sequence[Hashable], known: Sequence[Hashable]) -> None:
    """Raise a ValueError where ``values`` is empty or holds anything that is not in ``known``."""
    if not values or any(value not in known for value in values):
        raise ValueError(f"{name}={list(values)!r}: choose some of {list(known)}")


def draws(
    stream: str, size: int, topics: Sequence[str], levels: Sequence[int]
) -> Iterator[tuple[random.Random, str, int]]:
    """``size`` times a random generator with the (topic, level) to draw next, the clusters taking turns.

    ``stream`` seeds the generator: the task, the split and the seed in one text.
    """
    clusters = [(topic, level) for topic in topics for level in levels]
    rng = random.Random(stream)
    for index in range(size):
        yield rng, *clusters[index % len(clusters)]
