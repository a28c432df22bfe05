"""``ExpertCache``: what every frozen expert says about every label of a data set, computed once and kept on disk.

A folder holds ``manifest.json`` and one safetensors file per ``shard_size`` sequences, in the data's order::

    shard-00000.safetensors    offsets int64 [sequences + 1], argmax int32 [L, n], logprobs float32 [L, n]
    part-00001-00.safetensors  of one expert, while a shard is being made: argmax int32 [L], logprobs float32 [L]

L counts the labels of a shard's sequences, n the experts. Eight bytes per label and expert, so a million labels of four
experts take 32 MB. Files are renamed into place when they are whole, so a build that was killed goes on where it was.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from ebpo_core.files import write_json

from .annotation import Annotation, ExpertSource
from .cache_build import (
    MANIFEST_NAME,
    OnChange,
    Work,
    changed,
    missing_shards,
    prepare,
    read_manifest,
    see,
    shard_count,
    shard_path,
    wait,
)
from .cache_key import CacheKey, tokenizer_fingerprint
from .ranks import on_main, world
from .sequences import TokenSequences

if TYPE_CHECKING:
    import os

_OPEN_FILES = 64


class ExpertCache:
    """Per sequence, the experts' argmaxes and label log-probabilities. Make one with :meth:`build` or :meth:`open`.

    ``cache[i]`` is an :class:`~.annotation.Annotation` of sequence ``i``: ``argmax`` int32 ``[L, n]`` over v < V and
    ``logprobs`` float32 ``[L, n]`` of log-softmax over v < V, a row per label that is not -100, in their order. Reading
    maps the files into memory and copies one sequence; a cache may be pickled and be used in data loading workers.

    Attributes:
        folder: where it is.
        key: what it was computed from.
        names: the experts' names when it was computed.
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.key = CacheKey.of(manifest["key"])
        self.names: list[str] = list(manifest["names"])
        self._length = int(manifest["sequences"])
        self._shard_size = int(manifest["shard_size"])
        self._files: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> Annotation:
        if not 0 <= i < len(self):
            raise IndexError(f"sequence {i} of {len(self)}")
        shard, row = divmod(i, self._shard_size)
        file = self._file(shard)
        start, end = file.get_slice("offsets")[row : row + 2].tolist()
        return Annotation(file.get_slice("argmax")[start:end], file.get_slice("logprobs")[start:end])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}  # maps do not pickle; they are opened again where needed

    def _file(self, shard: int) -> Any:
        if shard not in self._files:
            file: Any = safe_open(shard_path(self.folder, shard), framework="np")
            if (file.metadata() or {}).get("key") != self.key.digest:
                raise ValueError(
                    f"{str(shard_path(self.folder, shard))!r} belongs to another cache than {MANIFEST_NAME} beside it: "
                    "remove the folder and build it again"
                )
            self._files[shard] = file
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(shard)
        return self._files[shard]

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, key: CacheKey | None = None) -> ExpertCache:
        """Open a finished cache.

        Args:
            folder: where it is.
            key: what it must have been computed from; None takes it as it is.

        Raises:
            FileNotFoundError: no cache there, or one that is not finished.
            ValueError: a damaged manifest, or another key, with what differs.
        """
        path = Path(folder)
        manifest = read_manifest(path)
        cache = cls(path, manifest)
        if key is not None and key != cache.key:
            raise ValueError(changed(path, cache.key.changes(key, cache.names)))
        missing, total = missing_shards(path, len(cache), cache._shard_size), shard_count(len(cache), cache._shard_size)
        if missing:
            raise FileNotFoundError(
                f"the expert cache in {str(path)!r} is not finished, {len(missing)} of its {total} shards are missing: "
                "build it again, it goes on where it was"
            )
        return cache

    @classmethod
    def build(
        cls,
        folder: str | os.PathLike[str],
        sequences: TokenSequences,
        experts: Sequence[ExpertSource],
        *,
        vocab_size: int,
        tokenizer: Any = None,
        on_change: OnChange = "raise",
        shard_size: int = 512,
        batch_tokens: int = 8192,
        progress: bool = True,
    ) -> ExpertCache:
        """Compute what is missing in ``folder`` and open it; with nothing missing no expert is loaded.

        The experts run one after the other, so that only one needs memory. In a torch process group every rank must
        call this, with the same arguments: each computes a share of the shards and waits for the others.

        Args:
            folder: made if missing; all ranks must see the same one.
            sequences: the data.
            experts: in the order of the route head's rows.
            vocab_size: V.
            tokenizer: the data's, for the key; None if there is none.
            on_change: what to do with a cache of other experts, data, tokenizer or V: "raise" or "rebuild".
            shard_size: sequences per file; a cache that is already begun keeps its own.
            batch_tokens: tokens that an expert gets at once, padding included.
            progress: show a bar on stderr (lines where that is no terminal).

        Raises:
            ValueError: data outside the vocabulary, a cache of another key with ``on_change="raise"``, or a folder
                that the ranks do not share.
            FloatingPointError: an expert's log-probability that is not finite.
        """
        if on_change not in ("raise", "rebuild"):
            raise ValueError(f"on_change={on_change!r}: use 'raise' or 'rebuild'")
        path = Path(folder)
        sequences.check(vocab_size)
        identities = tuple(expert.identity for expert in experts)
        key = CacheKey(identities, tokenizer_fingerprint(tokenizer), sequences.fingerprint, vocab_size)
        names = [expert.name for expert in experts]
        size, missing = on_main(lambda: prepare(path, key, names, len(sequences), shard_size, on_change))
        see(path)
        rank, ranks = world()
        work = Work(path, key, sequences, experts, size, batch_tokens)
        try:
            work.run(missing[rank::ranks], progress and rank == 0)
        except Exception as error:
            if ranks > 1:
                write_json(path / f"failed-{rank}.json", {"error": f"{type(error).__name__}: {error}"})
            raise
        wait(path, [shard_path(path, shard) for shard in missing])
        return cls.open(path, key=key)
