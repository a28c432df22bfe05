"""Files that are whole or absent, however the process that writes them ends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` so that a reader sees all of it or no file (or the old one)."""
    # A rename is atomic only within one file system, hence the temporary file beside its target.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object as :func:`write_bytes` does."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_arrays(path: Path, arrays: dict[str, NDArray[Any]], metadata: dict[str, str]) -> None:
    """Write a safetensors file as :func:`write_bytes` does."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_bytes(path, save(contiguous, metadata))


def read_json(path: Path, *, form: str, version: int, what: str) -> dict[str, Any]:
    """Read a JSON object that names its ``format`` and ``version``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, another format, or a version that this package does not read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {what} at {str(path)!r}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}): it is damaged, remove it") from error
    if not isinstance(content, dict) or content.get("format") != form:
        raise ValueError(f"{str(path)!r} is no {what} (format {form!r})")
    if content.get("version") != version:
        raise ValueError(
            f"{str(path)!r} has version {content.get('version')!r} and this ebpo_core reads {version}: upgrade "
            "ebpo-core to the version that wrote it, or remove it"
        )
    return content
