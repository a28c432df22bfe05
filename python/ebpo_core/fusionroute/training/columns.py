"""Columns of a data set that a model computes once: an Arrow file, made shard by shard, named for what it is made from.

The finished file is ``<name>-<fingerprint>.arrow``, one row per sequence or pair, in the data's order. While it is
being made its shards lie in ``<name>-<fingerprint>.arrow.shards/``, each whole or absent, so that a build that was
killed goes on with the first shard that is missing. The schema of every file says what the numbers depend on (weights,
tokenizer, data), so that a change can be named.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from datasets import Dataset

from ebpo_core.files import write_bytes

from .ranks import everywhere, on_main, world

logger = logging.getLogger(__name__)

OnChange = Literal["raise", "rebuild"]
# The columns of a range of rows: per name one value or array per row.
Compute = Callable[[range], Mapping[str, Sequence[Any]]]

SHARD_ROWS = 512
_MADE_FROM = b"made_from"
_SHARED_SECONDS = 60.0


class StoredColumns:
    """Columns in one Arrow file of a folder.

    Args:
        folder: where the file is, made if missing.
        name: how the file's name begins.
        rows: how many rows the columns have.
        columns: a pyarrow type per column name.
        made_from: everything that the numbers depend on, as strings.
        words: how messages name an entry of ``made_from``; one that is missing is shown with both values.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        rows: int,
        columns: Mapping[str, pa.DataType],
        made_from: Mapping[str, str],
        words: Mapping[str, str],
    ) -> None:
        self.folder, self.name, self.rows, self.made_from, self.words = folder, name, rows, dict(made_from), words
        content = json.dumps(self.made_from, sort_keys=True)
        self.schema = pa.schema(columns.items(), metadata={_MADE_FROM: content})
        self.file = folder / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.arrow"
        self._shards = self.file.with_name(f"{self.file.name}.shards")

    def settle(self, on_change: OnChange) -> None:
        """Refuse or remove files of this name that were made from something else; one rank calls this.

        Raises:
            ValueError: there is one, and ``on_change="raise"``; or a damaged file.
        """
        others = [path for path in self.folder.glob(f"{self.name}-*") if path not in (self.file, self._shards)]
        files = [file for path in others for file in (sorted(path.glob("*.arrow")) if path.is_dir() else [path])]
        if files:
            then = json.loads((read(files[0]).schema.metadata or {}).get(_MADE_FROM, b"{}"))
            changes = ", ".join(
                self.words.get(name, f"{name} ({then.get(name)}, now {now})")
                for name, now in self.made_from.items()
                if then.get(name) != now
            )
            if on_change == "raise":
                raise ValueError(
                    f"{str(files[0])!r} was computed from something else; changed since: {changes}. "
                    "Use another folder, or on_change='rebuild' to replace it"
                )
            logger.warning("replacing %s; changed: %s", files[0], changes)
        remove(others)
        if self.file.exists():
            read(self.file)
            remove([self._shards])  # of a build that was killed at its very end

    def missing(self, shard_rows: int = SHARD_ROWS) -> list[range]:
        """The shards that are to be made."""
        shards = [] if self.file.exists() else self._all_shards(shard_rows)
        return [rows for rows in shards if not self._shard(rows).exists()]

    def compute(
        self,
        model: Callable[[], AbstractContextManager[Compute]],
        *,
        shard_rows: int = SHARD_ROWS,
        able: bool = True,
        advance: Callable[[int], None] = lambda _: None,
    ) -> Dataset:
        """The columns, after computing what is missing of them.

        Every rank of a torch process group must call this. They compute a shard each, round by round, and the first one
        writes, so that no rank waits for another much longer than a shard takes.

        Args:
            model: entered before the first shard of this rank, and not at all if it has none to make.
            shard_rows: rows of a shard.
            able: False on a rank that cannot compute.
            advance: called with the number of rows that were computed since the last call, by all ranks.

        Raises:
            ValueError: a rank that does not see the folder of the first one.
        """
        missing = on_main(lambda: self.missing(shard_rows))
        workers = [rank for rank, can in enumerate(everywhere(lambda: able)) if can]
        rank, _ = world()
        turn = workers.index(rank) if able else len(workers)
        with ExitStack() as stack:
            # Entered within a share, where an error reaches all ranks.
            opened = cache(lambda: stack.enter_context(model()))
            for start in range(0, len(missing), len(workers)):
                shards = missing[start : start + len(workers)]
                share = partial(self._share, opened, shards[turn] if turn < len(shards) else None)
                tables = everywhere(share)
                on_main(partial(self._keep, shards, [tables[worker] for worker in workers]))
                advance(sum(map(len, shards)))
        on_main(lambda: self._finish(shard_rows))
        everywhere(lambda: wait_for(self.file))
        return Dataset.from_file(str(self.file))

    def _all_shards(self, shard_rows: int) -> list[range]:
        return [range(i, min(i + shard_rows, self.rows)) for i in range(0, self.rows, shard_rows)]

    def _shard(self, rows: range) -> Path:
        return self._shards / f"{rows.start:08d}-{rows.stop:08d}.arrow"

    def _share(self, opened: Callable[[], Compute], rows: range | None) -> pa.Table | None:
        return None if rows is None else pa.table(dict(opened()(rows)), schema=self.schema)

    def _keep(self, shards: Sequence[range], tables: Sequence[pa.Table]) -> None:
        self._shards.mkdir(parents=True, exist_ok=True)
        for rows, table in zip(shards, tables, strict=False):
            write(self._shard(rows), table)

    def _finish(self, shard_rows: int) -> None:
        """Put the shards together."""
        if not self.file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            parts = (read(self._shard(rows)) for rows in self._all_shards(shard_rows))
            write(self.file, pa.concat_tables([self.schema.empty_table(), *parts]))
        remove([self._shards])


def read(file: Path) -> pa.Table:
    """The table in an Arrow file, mapped into memory.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
    except FileNotFoundError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{str(file)!r} cannot be read ({error}): it is damaged, remove it") from error


def write(file: Path, table: pa.Table) -> None:
    """Write an Arrow file that is whole or absent."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    write_bytes(file, sink.getvalue())


def remove(paths: Sequence[Path]) -> None:
    """Remove files and folders; those that are not there are passed over."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def wait_for(file: Path) -> None:
    """Wait until this rank sees a file of rank 0; a network file system may show it to other machines a little later.

    Raises:
        ValueError: it does not appear.
    """
    begun = time.monotonic()
    while not file.exists():
        if time.monotonic() - begun > _SHARED_SECONDS:
            raise ValueError(
                f"folder={str(file.parent)!r}: this rank does not see {file.name!r}, which rank 0 wrote there: use a "
                "folder on a file system that all ranks share"
            )
        time.sleep(0.1)
