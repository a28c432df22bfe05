"""Files that are whole or absent, however the process that writes them ends. Needs the standard library alone.

Every file that the package writes and reads again is written here: into a temporary file beside its target, flushed to
the disk, renamed over the target, and the rename flushed too. A reader, another process or the same run after a power
cut, sees the old content or the new one.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` so that a reader sees all of it, or what was there before.

    The temporary file is named ``.<name>.<8 hex digits>`` and lies beside the target, because a rename is atomic only
    within one file system; a process that is killed can leave it behind. A link is followed. What is no file, such as
    a pipe or ``/dev/stdout``, is written to as it is.

    Raises:
        OSError: the folder does not exist or cannot be written to; the target is as it was.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        target.write_bytes(content)
        return
    target = Path(os.path.realpath(target))
    # "x": two writers of one name (ranks, threads, hosts of one network drive) never share a temporary file.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` in UTF-8, its line ends as they are, as :func:`write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented and in ASCII, as :func:`write_bytes` does.

    Floats survive bit for bit: Python prints the shortest decimal that reads back as the same float.
    """
    write_text(path, json.dumps(dict(content), indent=2) + "\n")


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file of ``arrays`` and ``metadata`` as :func:`write_bytes` does."""
    import numpy as np
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_bytes(path, save(contiguous, dict(metadata)))


def read_json(path: str | os.PathLike[str], *, form: str, version: int, what: str) -> dict[str, Any]:
    """A JSON object that names its ``format`` and ``version``, as :func:`write_json` wrote it.

    Args:
        path: the file.
        form: its ``format``.
        version: the only version that the caller reads.
        what: the file's kind, for messages: "expert cache", "prior".

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, another format, or a version that this package does not read.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no {what} at {str(file)!r}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is not JSON ({error}): it is damaged, remove it") from error
    if not isinstance(content, dict) or content.get("format") != form:
        raise ValueError(f"{str(file)!r} is no {what} (format {form!r})")
    if content.get("version") != version:
        raise ValueError(
            f"{str(file)!r} has version {content.get('version')!r} and this ebpo_core reads {version}: upgrade "
            "ebpo-core to the version that wrote it, or remove it"
        )
    return content


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Flush a folder's list of names, so that a rename in it survives a power cut.

    File systems and platforms that cannot do it (Windows does not open folders) are left as they are.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
