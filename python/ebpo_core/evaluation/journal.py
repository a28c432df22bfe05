"""An append-only JSON Lines file of finished work that survives SIGKILL: what is in it is not done again.

The first line is a header with the settings that decide what a record holds; every further line is one record, known by
its key fields. A process that is killed can leave its last line cut: it is removed when the file is opened again.
Anything else that is wrong with the file raises, since it means that somebody edited it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

VERSION = 1

Record = dict[str, Any]
Key = tuple[Any, ...]


def _lock(file: IO[bytes], path: Path) -> None:
    """Keep a second process from appending to the same file; platforms without ``flock`` go unprotected."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{str(path)!r} is being written by another process: wait, or give another file") from error


def _differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is {theirs.get(name)!r} in the file and {mine.get(name)!r} now"
        for name in sorted({*mine, *theirs})
        if mine.get(name) != theirs.get(name)
    ]


class Journal:
    """Records of one kind, on disk as soon as :meth:`append` returns. A context manager.

    Args:
        path: The file, made with its folders if it is missing.
        kind: What the records are, in one word: the header's format is ``ebpo-core/<kind>``.
        settings: JSON-safe; everything that decides what a record holds. They must be those of the file.
        key: The fields that name a record.

    Attributes:
        records: Every record of the file by its key, in the file's order.

    Raises:
        ValueError: The file has other settings, holds something else, is damaged before its last line, or is being
            written by another process. It is left as it was.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str, settings: Mapping[str, Any], key: tuple[str, ...]):
        self.path, self.key = Path(path), key
        header = {"format": f"ebpo-core/{kind}", "version": VERSION, "settings": dict(settings)}
        # As it comes back from the file: tuples become lists there.
        self.header: dict[str, Any] = json.loads(json.dumps(header, allow_nan=False))
        self.records: dict[Key, Record] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            _lock(self._file, self.path)
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if lines:
            self._check_header(lines[0])
        for number, line in enumerate(lines[1:], start=2):
            record = self._parse(line, number)
            try:
                name = self._name(record)
            except KeyError as error:
                raise ValueError(f"{str(self.path)!r}, line {number}: the record has no {error}") from error
            if name in self.records:
                raise ValueError(f"{str(self.path)!r}, line {number}: {name} was there before; remove one of the two")
            self.records[name] = record
        if len(whole) != len(content):
            if not lines and not content.startswith(b'{"format"'[: len(content)]):
                raise ValueError(f"{str(self.path)!r} is not one of our files: give another name")
            self._file.truncate(len(whole))
        if not lines:
            self._write([self.header])

    def _parse(self, line: bytes, number: int) -> Record:
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{str(self.path)!r} is damaged: line {number} is not JSON ({error}); remove the line, or the file"
            ) from error
        if not isinstance(content, dict):
            raise ValueError(f"{str(self.path)!r} is damaged: line {number} is not an object; remove it")
        return content

    def _check_header(self, line: bytes) -> None:
        header = self._parse(line, 1)
        if header.get("format") != self.header["format"] or not isinstance(header.get("settings"), dict):
            raise ValueError(f"{str(self.path)!r} does not hold {self.header['format']!r}: give another file")
        if header.get("version") != VERSION:
            raise ValueError(
                f"{str(self.path)!r} has version {header.get('version')!r}, this ebpo_core reads {VERSION}: "
                "use the version that wrote it, or another file"
            )
        differences = _differences(self.header["settings"], header["settings"])
        if differences:
            raise ValueError(
                f"{str(self.path)!r} was written with other settings: {'; '.join(differences)}. "
                "Give the same settings to go on with it, or another file to start anew"
            )

    def _name(self, record: Mapping[str, Any]) -> Key:
        return tuple(record[field] for field in self.key)

    def __contains__(self, name: Key) -> bool:
        return name in self.records

    def append(self, records: Iterable[Record]) -> None:
        """Write records to the disk, in one piece as far as the system allows.

        Raises:
            ValueError: A record's key is in the file already; nothing is then written.
        """
        rows = list(records)
        new = {self._name(record): record for record in rows}
        known = [name for name in new if name in self.records]
        if known or len(new) != len(rows):
            raise ValueError(f"{str(self.path)!r} holds {known[:1] or 'the same record twice'}: append it once")
        if rows:
            self._write(rows)
            self.records.update(new)

    def _write(self, records: Iterable[Record]) -> None:
        self._file.write("".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode())
        self._file.flush()
        # Not every file system can; the file is then as safe as its operating system.
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, which gives its lock back."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_journal(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], list[Record]]:
    """The settings and records of a finished or running file, without locking or repairing it; a cut line is left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else, or is damaged before its last line.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r}: no such file")
    content = file.read_bytes()
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    try:
        header, *records = [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is damaged or empty ({error}): run the command that wrote it again") from error
    if not isinstance(header, dict) or header.get("format") != f"ebpo-core/{kind}":
        raise ValueError(f"{str(file)!r} does not hold 'ebpo-core/{kind}': give another file")
    if header.get("version") != VERSION:
        raise ValueError(
            f"{str(file)!r} has version {header.get('version')!r}, this ebpo_core reads {VERSION}: use the "
            "version that wrote it"
        )
    settings = header.get("settings")
    if not isinstance(settings, dict) or not all(isinstance(record, dict) for record in records):
        raise ValueError(
            f"{str(file)!r} is damaged: its lines are not all records; run the command that wrote it again"
        )
    return settings, records
