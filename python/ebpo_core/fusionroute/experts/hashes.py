"""Content hashes of an expert's weights, by which a checkpoint notices that an expert changed after training.

A hash names its kind::

    sha256:files:<hex>     of safetensors or GGUF files (and the adapter's), however they are reached
    sha256:tensors:<hex>   of a live model's tensors: names, dtypes, shapes, bytes
    commit:<hex>           of a hub snapshot whose files are not in the local cache
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import adapter_files, local_folder, weight_files
from .references import Source

FILES = "sha256:files:"
TENSORS = "sha256:tensors:"
COMMIT = "commit:"

_BLOCK = 1 << 24

_digests: dict[tuple[str, int, int], str] = {}
_digests_lock = threading.Lock()


def files_hash(files: Mapping[str, Path]) -> str:
    """The hash of named files; several are read by several threads.

    A file's digest is kept in this process until its size or time of modification changes.
    """
    names = sorted(files)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1, max(len(names), 1))) as pool:
        digests = list(pool.map(_file_digest, (files[name] for name in names)))
    lines = "".join(f"{digest} {name}\n" for digest, name in zip(digests, names, strict=True))
    return FILES + hashlib.sha256(lines.encode()).hexdigest()


def _file_digest(file: Path) -> str:
    file = file.resolve()  # the hub's cache is made of links
    status = file.stat()
    key = (str(file), status.st_size, status.st_mtime_ns)
    with _digests_lock:
        known = _digests.get(key)
    if known is None:
        digest = hashlib.sha256()
        with file.open("rb", buffering=0) as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
        known = digest.hexdigest()
        with _digests_lock:
            _digests[key] = known
    return known


def tensors_hash(tensors: Mapping[str, Any]) -> str:
    """The hash of a state dict, in name order. Entries that are no tensors (of a quantizer) count by their repr."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        if not isinstance(value, Tensor):
            digest.update(f"{name} {value!r}\n".encode())
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, flat.numel(), _BLOCK):
            digest.update(flat[start : start + _BLOCK].cpu().numpy().data)
    return TENSORS + digest.hexdigest()


def sources_hash(source: Source, adapter: Source | None = None) -> str:
    """The hash of an expert's files: its own, and its adapter's under ``adapter/``.

    A hub id counts by its files in the local cache, where loading has put them, else by :func:`commit_hash`.

    Raises:
        FileNotFoundError, ValueError: as for :func:`~.files.weight_files`.
    """
    try:
        files = dict(weight_files(local_folder(source), source.gguf_file))
        if adapter is not None:
            found = adapter_files(local_folder(adapter))
            files |= {f"adapter/{name}": file for name, file in found.items()}
    except FileNotFoundError:
        if source.folder is not None:
            raise
        return commit_hash(source, adapter)
    return files_hash(files)


def commit_hash(source: Source, adapter: Source | None = None) -> str:
    """Commits of the snapshots that a hub id, and its adapter's, stand for in the local cache."""
    return COMMIT + "+".join(_commit(local_folder(part)) for part in (source, adapter) if part is not None)


def _commit(folder: Path) -> str:
    """The commit of a folder in a snapshot, ``.../snapshots/<commit>/...``; "local" for another folder."""
    parts = folder.parts
    return parts[len(parts) - parts[::-1].index("snapshots")] if "snapshots" in parts else "local"


def check_hash(expert: str, recorded: str, actual: str) -> None:
    """Compare the hash in a checkpoint with the one of what was found.

    Raises:
        ValueError: they differ.
    """
    if recorded != actual:
        raise ValueError(
            f"the weights of expert {expert!r} are not those the router was trained with: the checkpoint has "
            f"{recorded}, found {actual}. Restore the expert's folder, train the router again, or pass "
            "verify_experts=False (verify=False to Experts.load) to use it as it is"
        )


def check_sources(expert: str, recorded: str, source: Source, adapter: Source | None = None) -> bool:
    """Compare the hash in a checkpoint with an expert's files, or with the commits they are from.

    Returns:
        False for a hash of tensors, which only a loaded model can be compared with; True after comparing.

    Raises:
        FileNotFoundError, ValueError: they differ, a file is missing, or a hash of no known kind.
    """
    if kind(recorded) == TENSORS:
        return False
    found = sources_hash(source, adapter) if kind(recorded) == FILES else commit_hash(source, adapter)
    check_hash(expert, recorded, found)
    return True


def kind(recorded: str) -> str:
    """The kind of a recorded hash: :data:`FILES`, :data:`TENSORS` or :data:`COMMIT`.

    Raises:
        ValueError: none of them.
    """
    for prefix in (FILES, TENSORS, COMMIT):
        if recorded.startswith(prefix):
            return prefix
    raise ValueError(
        f"hash {recorded!r} is of no known kind: upgrade ebpo-core to the version that wrote it, or pass "
        "verify_experts=False"
    )
