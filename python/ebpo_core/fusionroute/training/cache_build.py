"""Making an expert cache: what is missing of it, each rank's share of the shards, one expert after the other."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open

from ebpo_core.files import read_json, write_arrays, write_json

from .annotation import ExpertSource, annotate
from .cache_key import CacheKey
from .sequences import TokenSequences

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
FORMAT = "ebpo-core/expert-cache"
VERSION = 1
OnChange = Literal["raise", "rebuild"]

_OURS = re.compile(r"(shard-\d+|part-\d+-\d+)\.safetensors|failed-\d+\.json|\.(shard|part|manifest)[^/]*")
_LEFTOVER = re.compile(r"failed-\d+\.json|\.(shard|part)[^/]*")  # of ranks that were killed
_SHARED_SECONDS = 60.0


class Work:
    """The shards that one rank has to make."""

    def __init__(
        self,
        folder: Path,
        key: CacheKey,
        sequences: TokenSequences,
        experts: Sequence[ExpertSource],
        shard_size: int,
        batch_tokens: int,
    ) -> None:
        self.folder, self.key, self.sequences, self.experts = folder, key, sequences, experts
        self.shard_size, self.batch_tokens = shard_size, batch_tokens
        self.metadata = {"key": key.digest}

    def run(self, shards: Sequence[int], progress: bool) -> None:
        todo = [(e, s) for e in range(len(self.experts)) for s in shards if not part_path(self.folder, s, e).exists()]
        total = sum(len(self._rows(shard)) for _, shard in todo)
        with ExitStack() as stack:
            bar = stack.enter_context(_bar(total)) if progress and total else None
            done = 0

            def advance(count: int) -> None:
                nonlocal done
                done += count
                if bar is not None:
                    bar.update(done, note)

            for e, source in enumerate(self.experts):
                mine = [shard for i, shard in todo if i == e]
                if not mine:
                    continue
                note = source.name
                expert = source.load()
                for shard in mine:
                    self._part(expert, source.name, e, shard, advance)
                del expert  # before the next one is loaded
        for shard in shards:
            self._merge(shard)

    def _rows(self, shard: int) -> range:
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.sequences)))

    def _part(self, expert: Any, name: str, e: int, shard: int, advance: Any) -> None:
        try:
            found = annotate(
                expert,
                self.sequences,
                self._rows(shard),
                vocab_size=self.key.vocab_size,
                batch_tokens=self.batch_tokens,
                advance=advance,
            )
        except FloatingPointError as error:
            raise FloatingPointError(
                f"expert {name!r}, {error}: its weights or its dtype are at fault, or the token is one it excludes"
            ) from error
        arrays: dict[str, Any] = {
            "argmax": np.concatenate([one.argmax for one in found]),
            "logprobs": np.concatenate([one.logprobs for one in found]),
        }
        write_arrays(part_path(self.folder, shard, e), arrays, self.metadata)

    def _merge(self, shard: int) -> None:
        parts = [part_path(self.folder, shard, e) for e in range(len(self.experts))]
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(part, framework="np")) for part in parts]
            arrays: dict[str, Any] = {
                name: np.stack([file.get_tensor(name) for file in files], axis=1) for name in ("argmax", "logprobs")
            }
        rows = self._rows(shard)
        counts = self.sequences.label_counts[rows.start : rows.stop]
        arrays["offsets"] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        write_arrays(shard_path(self.folder, shard), arrays, self.metadata)
        for part in parts:
            part.unlink()


def prepare(
    folder: Path, key: CacheKey, names: list[str], sequences: int, shard_size: int, on_change: OnChange
) -> tuple[int, list[int]]:
    """The shard size, and the shards that are missing; leaves a folder with this key's manifest."""
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size}: give at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(folder) if (folder / MANIFEST_NAME).exists() else None
    if manifest is not None and CacheKey.of(manifest["key"]) != key:
        changes = CacheKey.of(manifest["key"]).changes(key, names)
        if on_change == "raise":
            raise ValueError(changed(folder, changes))
        logger.warning("replacing the expert cache in %s; changed: %s", folder, ", ".join(changes))
        (folder / MANIFEST_NAME).unlink()  # first: files without a manifest are removed by whoever comes next
        manifest = None
    if manifest is None:
        _remove(folder, _OURS)
        manifest = {"format": FORMAT, "version": VERSION, "key": key.to_dict(), "names": names}
        manifest |= {"sequences": sequences, "shard_size": shard_size}
        write_json(folder / MANIFEST_NAME, manifest)
    size: int = manifest["shard_size"]
    missing = missing_shards(folder, sequences, size)
    _remove(folder, _LEFTOVER)
    for part in folder.glob("part-*.safetensors"):
        if int(part.name.split("-")[1]) not in missing:  # the shard was made of it already
            part.unlink()
    return size, missing


def read_manifest(folder: Path) -> dict[str, Any]:
    return read_json(folder / MANIFEST_NAME, form=FORMAT, version=VERSION, what="expert cache")


def changed(folder: Path, changes: list[str]) -> str:
    return (
        f"the expert cache in {str(folder)!r} was computed from something else; changed since: {', '.join(changes)}. "
        "Use another folder, or on_change='rebuild' to replace it"
    )


def _remove(folder: Path, names: re.Pattern[str]) -> None:
    for file in folder.iterdir():
        if names.fullmatch(file.name):
            file.unlink()


def see(folder: Path) -> None:
    """Wait for the manifest: a network file system may show a new file to other machines a little later."""
    begun = time.monotonic()
    while not (folder / MANIFEST_NAME).exists():
        if time.monotonic() - begun > _SHARED_SECONDS:
            raise ValueError(
                f"folder={str(folder)!r}: this rank does not see what rank 0 wrote there: use a folder on a file "
                "system that all ranks share"
            )
        time.sleep(0.1)


def wait(folder: Path, files: Sequence[Path]) -> None:
    """Until every rank has done its share. By looking at files: a collective would time out on a long build."""
    left = [file for file in files if not file.exists()]
    while left:
        failed = next(folder.glob("failed-*.json"), None)
        if failed is not None:
            raise RuntimeError(f"another rank could not do its share of the expert cache: {failed.read_text().strip()}")
        time.sleep(0.2)
        left = [file for file in left if not file.exists()]


def shard_count(sequences: int, shard_size: int) -> int:
    return -(-sequences // shard_size)


def missing_shards(folder: Path, sequences: int, shard_size: int) -> list[int]:
    return [s for s in range(shard_count(sequences, shard_size)) if not shard_path(folder, s).exists()]


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def part_path(folder: Path, shard: int, expert: int) -> Path:
    return folder / f"part-{shard:05d}-{expert:02d}.safetensors"


def _bar(total: int) -> Any:
    try:
        from rich.console import Console

        from ebpo_core.progress import bar
    except ModuleNotFoundError as error:
        raise ImportError(
            f'the progress bar needs {error.name!r}: pip install "ebpo-core[fusionroute]", or pass progress=False'
        ) from error
    return bar(Console(stderr=True), "expert cache", total)
