"""The files of a model in a folder or repository: its weights, what stands beside them, where they are here."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .references import ADAPTER_CONFIG, EXPERTS_FOLDER, ExpertReference, Source

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.gguf")
# What may stand beside the weights; anything else in the folder (training states, data, pickles) stays where it is.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "quantization_config.json",
    "quantize_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
CODE_PATTERN = "*.py"  # of a model that brings its own code
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


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


def code_files(folder: Path) -> dict[str, Path]:
    """The Python files in a folder and below it, among them all that transformers runs of a model's own code."""
    found = (file for file in folder.rglob(CODE_PATTERN) if file.is_file())
    return {file.relative_to(folder).as_posix(): file for file in found}


def copy_model(folder: Path, weights: Mapping[str, Path], target: Path, *, code: bool = False) -> None:
    """Copy weight files, by their names in ``target``, and what may stand beside them in ``folder``.

    Args:
        folder, weights, target: from where, which, and where to.
        code: copy Python files too.
    """
    files = dict(weights) | (code_files(folder) if code else {})
    for pattern in (*COMPANIONS, "*.safetensors.index.json"):
        files |= {file.name: file for file in folder.glob(pattern) if file.is_file()}
    for name, file in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)


def local_folder(source: Source) -> Path:
    """The folder of a source: its own, or its snapshot in the hub's local cache.

    Raises:
        FileNotFoundError: a hub id that was never fetched.
    """
    if source.folder is not None:
        return source.folder
    from huggingface_hub import try_to_load_from_cache

    prefix = f"{source.subfolder}/" if source.subfolder else ""
    for name in (source.gguf_file, "config.json", ADAPTER_CONFIG):
        if name is not None:
            found = try_to_load_from_cache(source.path, prefix + name, revision=source.revision)
            if isinstance(found, str):
                return Path(found).parent
    raise FileNotFoundError(
        f"{source.path!r} at revision {source.revision or 'main'!r} is not in the local cache: fetch it once with the "
        "hub in reach, or give a local folder"
    )


def fetched_folder(source: Source, *patterns: str, access: Mapping[str, Any] | None = None) -> Path:
    """The folder of a source; of a hub id its snapshot, after fetching the files of these patterns.

    Args:
        source: the place.
        patterns: of the files' names.
        access: how the hub is reached, of :func:`hub_access`.
    """
    if source.folder is not None:
        return source.folder
    from huggingface_hub import snapshot_download

    wanted = [f"{source.subfolder}/{pattern}".lstrip("/") for pattern in patterns]
    how = {"revision": source.revision, "allow_patterns": wanted, **(access or {})}
    return Path(snapshot_download(source.path, **how)) / source.subfolder


def hub_access(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """How the hub is reached, out of the arguments of ``from_pretrained``: with which token, through which cache."""
    names = ("token", "cache_dir", "local_files_only", "force_download")
    return {name: arguments[name] for name in names if arguments.get(name) is not None}


def checkpoint_folder(
    references: Sequence[ExpertReference],
    checkpoint: str | os.PathLike[str] | None,
    revision: str | None,
    *,
    subfolder: str = "",
    access: Mapping[str, Any] | None = None,
) -> Path | None:
    """The local folder in which experts' relative paths are looked up.

    Args:
        references: the checkpoint's experts. Those that a checkpoint on the hub brings along are fetched.
        checkpoint: a folder, a hub id, or None.
        revision, subfolder: of the hub id.
        access: how the hub is reached, of :func:`hub_access`.

    Returns:
        The folder; None without a checkpoint, or for a hub id that brings no expert along.
    """
    if checkpoint is None or Path(checkpoint).is_dir():
        return None if checkpoint is None else Path(checkpoint)
    prefix = f"{EXPERTS_FOLDER}/"
    if not any((path or "").startswith(prefix) for each in references for path in (each.path, each.adapter)):
        return None
    source = Source(os.fspath(checkpoint), None, revision, subfolder, None)
    # Only what is loaded: no pickles.
    code = [CODE_PATTERN] if any(each.code_hash for each in references) else []
    patterns = [f"{prefix}*/{pattern}" for pattern in (*COMPANIONS, *WEIGHT_PATTERNS, *code)]
    return fetched_folder(source, *patterns, access=access)


def free_folder(output: Path) -> Path:
    """The folder to write, absolute, after checking that nothing is in the way.

    Raises:
        FileExistsError: a file, a folder that is not empty, or a mount point.
    """
    target = output.expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"output={str(output)!r} is a file: give a folder that does not exist yet")
    if target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"output={str(output)!r} is not empty: give another folder, or empty it")
    if target.is_mount():
        raise FileExistsError(f"output={str(output)!r} is a mount point: give a folder in it that does not exist yet")
    return target
