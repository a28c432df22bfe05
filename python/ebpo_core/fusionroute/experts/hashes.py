"""Content hashes of an expert's weights, by which a checkpoint notices that an expert changed after training.

A hash names its kind::

    sha256:files:<hex>     of safetensors or GGUF files (and the adapter's), however they are reached
    sha256:tensors:<hex>   of a live model's tensors: names, dtypes, shapes, bytes
    commit:<hex>           of a hub snapshot whose files are not in the local cache
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .references import Source

FILES = "sha256:files:"
TENSORS = "sha256:tensors:"
COMMIT = "commit:"

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_BLOCK = 1 << 24

_digests: dict[tuple[str, int, int], str] = {}
_digests_lock = threading.Lock()


def weight_files(folder: str | os.PathLike[str], gguf_file: str | None = None) -> dict[str, Path]:
    """The files that hold a model's weights, in name order: the GGUF file, ``model.safetensors``, or all of its shards.

    Raises:
        FileNotFoundError: no weights, or a shard of the index is missing.
        ValueError: the folder holds pickles only, which are never loaded.
    """
    root = Path(folder)
    if gguf_file is not None:
        names = [gguf_file]
    elif (root / WEIGHTS).is_file():
        names = [WEIGHTS]
    elif (root / INDEX).is_file():
        index = json.loads((root / INDEX).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    else:
        raise _no_weights(root, WEIGHTS)
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{str(root)!r} lacks {missing} of its weights: restore the folder")
    return {name: root / name for name in names}


def adapter_files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The file that holds a PEFT adapter's weights. Errors as for :func:`weight_files`."""
    file = Path(folder) / ADAPTER_WEIGHTS
    if not file.is_file():
        raise _no_weights(Path(folder), ADAPTER_WEIGHTS)
    return {ADAPTER_WEIGHTS: file}


def _no_weights(root: Path, wanted: str) -> Exception:
    pickles = sorted(file.name for pattern in _PICKLES for file in root.glob(pattern))
    if pickles:
        return ValueError(
            f"{str(root)!r} has its weights as pickles ({', '.join(pickles[:3])}), which can run code and are never "
            f"loaded: save the model again with safetensors, as save_pretrained does, so that {wanted} is there"
        )
    return FileNotFoundError(f"{str(root)!r} has no {wanted}: restore the folder, or correct the path")


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


def sources_hash(source: Source, adapter: Source | None) -> str:
    """The hash of an expert's files: its own, and its adapter's under ``adapter/``.

    A hub id counts by its files in the local cache, where loading has put them, else by :func:`commit_hash`.

    Raises:
        FileNotFoundError, ValueError: as for :func:`weight_files`.
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


def commit_hash(source: Source, adapter: Source | None) -> str:
    """Commits of the snapshots that a hub id, and its adapter's, stand for in the local cache."""
    return COMMIT + "+".join(_commit(local_folder(part)) for part in (source, adapter) if part is not None)


def local_folder(source: Source) -> Path:
    """The folder of a source: its own, or its snapshot in the hub's local cache.

    Raises:
        FileNotFoundError: a hub id that was never fetched.
    """
    if source.folder is not None:
        return source.folder
    from huggingface_hub import try_to_load_from_cache

    prefix = f"{source.subfolder}/" if source.subfolder else ""
    for name in (source.gguf_file, "config.json", "adapter_config.json"):
        if name is not None:
            found = try_to_load_from_cache(source.path, prefix + name, revision=source.revision)
            if isinstance(found, str):
                return Path(found).parent
    raise FileNotFoundError(
        f"{source.path!r} at revision {source.revision or 'main'!r} is not in the local cache: fetch it once with the "
        "hub in reach, or give a local folder"
    )


def _commit(folder: Path) -> str:
    """Of a folder in a snapshot, ``.../snapshots/<commit>/...``; of another folder, "local"."""
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
