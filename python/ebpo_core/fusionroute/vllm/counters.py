"""Tokens per expert, from the processes that run the model to the ``/metrics`` of the one that answers requests.

The engine runs in processes of its own, whose numbers vLLM sends on in a fixed form. So each of them adds to a small
file that it maps into memory, and a Prometheus collector in the server's process sums the files when it is asked. Where
vLLM starts several servers, Prometheus does the same with files of its own.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import numpy as np

FOLDER = "EBPO_FUSIONROUTE_COUNTERS"  # the environment variable that tells an engine's processes where
_TOKENS, _OVERRULED = "fusionroute_tokens", "fusionroute_overruled_tokens"
_SHARE, _VOCAB_SIZE = "fusionroute_token_share", "fusionroute_vocab_size"
_HELP = {
    _TOKENS: "Tokens emitted with this expert's logits",
    _OVERRULED: "Of these, tokens that are not the expert's own argmax",
    _SHARE: "Share of the emitted tokens, 0 before the first",
    _VOCAB_SIZE: "Vocabulary ids before the routing's",
}


class Counts(Protocol):
    """The counter of an engine's process."""

    def add(self, expert: int, *, overruled: bool) -> None:
        """One more token of the expert with this index."""


def publish(names: Sequence[str], vocab_size: int) -> None:
    """Make the folder of counts, tell later processes of it, and show the sums in the server's ``/metrics``.

    Args:
        names: of the experts.
        vocab_size: V, which clients need to ask for the routing.
    """
    from prometheus_client import REGISTRY

    folder = os.environ.get(FOLDER)
    if folder is None or not Path(folder).is_dir():
        folder = tempfile.mkdtemp(prefix="fusionroute-")
        os.environ[FOLDER] = folder
        owner = os.getpid()
        atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    for known in list(REGISTRY._collector_to_names):
        if isinstance(known, Collector):  # of an engine that was built before in this process
            REGISTRY.unregister(known)
    REGISTRY.register(Collector(Path(folder), names, vocab_size))


def open_counts(names: Sequence[str], vocab_size: int) -> Counts | None:
    """The counter of this engine's process; None where no server asked for one."""
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        return PrometheusCounts(names, vocab_size)
    folder = os.environ.get(FOLDER)
    return MappedCounts(Path(folder), names) if folder and Path(folder).is_dir() else None


class MappedCounts:
    """Counts of one process in a file, ``[n, 2]`` int64: tokens, overruled tokens."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        file = folder / f"{os.getpid()}-{uuid4().hex}.counts"
        self._counts = np.memmap(file, dtype=np.int64, mode="w+", shape=(len(names), 2))
        # Written last: a reader that finds it finds the counts, too.
        file.with_suffix(".json").write_text(json.dumps(list(names)), encoding="utf-8")

    def add(self, expert: int, *, overruled: bool) -> None:
        self._counts[expert, 0] += 1
        self._counts[expert, 1] += overruled


class PrometheusCounts:
    """Counts by prometheus_client itself, in the mode that several servers of one vLLM are in. Shares are left to the
    reader: a sum over processes is all that this mode can do.
    """

    def __init__(self, names: Sequence[str], vocab_size: int) -> None:
        from prometheus_client import Counter, Gauge

        labels = [(name, str(index)) for index, name in enumerate(names)]
        self._counters = []
        for metric in (_TOKENS, _OVERRULED):
            counter = Counter(metric, _HELP[metric], ["expert", "index"])
            self._counters.append([counter.labels(*label) for label in labels])
        Gauge(_VOCAB_SIZE, _HELP[_VOCAB_SIZE], multiprocess_mode="max").set(vocab_size)

    def add(self, expert: int, *, overruled: bool) -> None:
        tokens, others = self._counters
        tokens[expert].inc()
        if overruled:
            others[expert].inc()


class Collector:
    """A Prometheus collector of the sums over all files in a folder."""

    def __init__(self, folder: Path, names: Sequence[str], vocab_size: int) -> None:
        self._folder, self._names, self._vocab_size = folder, list(names), vocab_size

    def sums(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens and overruled tokens per expert, ``[n, 2]``."""
        total = np.zeros((len(self._names), 2), dtype=np.int64)
        for file in self._folder.glob("*.json"):
            if json.loads(file.read_text(encoding="utf-8")) == self._names:
                total += np.fromfile(file.with_suffix(".counts"), dtype=np.int64).reshape(total.shape)
        return total

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        sums = self.sums()
        labels = [[name, str(index)] for index, name in enumerate(self._names)]
        for column, metric in enumerate((_TOKENS, _OVERRULED)):
            family = CounterMetricFamily(metric, _HELP[metric], labels=["expert", "index"])
            for label, value in zip(labels, sums[:, column], strict=True):
                family.add_metric(label, float(value))
            yield family
        share = GaugeMetricFamily(_SHARE, _HELP[_SHARE], labels=["expert", "index"])
        for label, value in zip(labels, sums[:, 0] / max(int(sums[:, 0].sum()), 1), strict=True):
            share.add_metric(label, float(value))
        yield share
        yield GaugeMetricFamily(_VOCAB_SIZE, _HELP[_VOCAB_SIZE], value=self._vocab_size)
