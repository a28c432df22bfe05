"""Merging of model folders: tensor by tensor from their shards, so that memory is a tensor times the models."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import safe_open

from ebpo_core.fusionroute.experts.files import copy_model, free_folder, weight_files

from .merging import StateDict, task_arithmetic

Merge = Callable[[StateDict, Sequence[StateDict]], dict[str, torch.Tensor]]


class _Tensor(NamedTuple):
    """What the header of a safetensors file says of a tensor: where it is, its dtype ("BF16") and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def merge_folders(
    base: str | os.PathLike[str],
    tuned: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    method: Merge = task_arithmetic,
) -> Path:
    """Merge models in folders of safetensors, each one file or shards with an index, into a folder like the base's.

    The result is that of ``method`` on whole state dicts. It is written into the base's shards, with its config,
    tokenizer and licences. At a time one tensor of each model is in memory, and what ``method`` makes of them.

    Args:
        base: folder of the model that all were fine-tuned from.
        tuned: their folders, sharded as they are.
        output: a folder that does not exist, or is empty. It is filled under another name beside it and moved at the
            end; when anything fails, nothing is left.
        method: called with state dicts of one tensor: :func:`task_arithmetic`, or others with their settings filled
            in, such as ``partial(ties, weights=0.5, density=0.2)``.

    Returns:
        The output folder, absolute.

    Raises:
        FileExistsError, FileNotFoundError: an output that is in use, a folder without weights or with a shard missing.
        ValueError: pickles, a damaged file, tensors that a model lacks or has beyond the base's (its tied embeddings
            untied, for instance), other shapes or dtypes, all before anything is merged; or what ``method`` raises.
    """
    target = free_folder(Path(output))
    if not tuned:
        raise ValueError("tuned=[]: give the folder of at least one fine-tuned model")
    root = Path(base).expanduser()
    start = _tensors(root)
    others = [_tensors(Path(folder).expanduser()) for folder in tuned]
    for folder, tensors in zip(tuned, others, strict=True):
        _check_same(root, start, Path(folder), tensors)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside, ExitStack() as stack:
        staging = Path(beside) / target.name
        staging.mkdir()
        opened: dict[Path, Any] = {}

        def read(tensors: Mapping[str, _Tensor], name: str) -> dict[str, torch.Tensor]:
            file = tensors[name].file
            if file not in opened:
                opened[file] = stack.enter_context(safe_open(file, framework="pt"))
            return {name: opened[file].get_tensor(name)}

        for shard, file in weight_files(root).items():
            with (staging / shard).open("wb") as out:
                # Names, dtypes and shapes stay, and so does the header, which says where each tensor's bytes are.
                for name in _copy_header(file, out):
                    merged = method(read(start, name), [read(tensors, name) for tensors in others])[name]
                    out.write(_bytes(merged))
        copy_model(root, {}, staging)
        if target.exists():
            target.rmdir()
        staging.replace(target)
    return target


def _header(file: Path) -> tuple[bytes, dict[str, Any]]:
    """The first bytes of a safetensors file, its length and JSON header, and what that says.

    Raises:
        ValueError: there is none.
    """
    try:
        with safe_open(file, framework="pt"):  # checks that the header is sound and the file as long as it says
            pass
    except Exception as error:
        raise ValueError(f"{str(file)!r} is no whole safetensors file ({error}): fetch or save it again") from error
    with file.open("rb") as stream:
        length = stream.read(8)
        text = stream.read(int.from_bytes(length, "little"))
    return length + text, json.loads(text)


def _copy_header(file: Path, out: BinaryIO) -> list[str]:
    """Write the header of ``file``; returns the tensors' names in the order of their bytes."""
    raw, header = _header(file)
    out.write(raw)
    places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return sorted(places, key=places.__getitem__)


def _tensors(folder: Path) -> dict[str, _Tensor]:
    """Every tensor of a model by name, from the headers of its files."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r}: there is no such folder; give the folder of a model")
    found: dict[str, _Tensor] = {}
    for file in weight_files(folder).values():
        for name, entry in _header(file)[1].items():
            if name == "__metadata__":
                continue
            if name in found:
                raise ValueError(
                    f"{str(folder)!r}: {name!r} is in {found[name].file.name!r} and in {file.name!r}; save it again"
                )
            found[name] = _Tensor(file, entry["dtype"], tuple(entry["shape"]))
    return found


def _check_same(base: Path, start: Mapping[str, _Tensor], folder: Path, tensors: Mapping[str, _Tensor]) -> None:
    """Raise a ValueError for a model whose tensors are not the base's by name, shape and dtype."""
    lacking, further = sorted(start.keys() - tensors.keys()), sorted(tensors.keys() - start.keys())
    if lacking or further:
        owner, other, names = (folder, base, lacking) if lacking else (base, folder, further)
        tied = [path for path in (base, folder) if _ties(path)]
        hint = "merge models that were fine-tuned from this base"
        if len(tied) == 1:
            hint = f"{str(tied[0])!r} ties its embeddings and the other does not: save both alike"
        raise ValueError(
            f"{str(owner)!r} lacks {names[0]!r}, which {str(other)!r} has ({len(lacking) + len(further)} names differ "
            f"in all): {hint}"
        )
    for name, one in start.items():
        two = tensors[name]
        for what, mine, its in (("shape", one.shape, two.shape), ("dtype", one.dtype, two.dtype)):
            if mine != its:
                remedy = "merge models of one architecture" if what == "shape" else "save them in one dtype"
                raise ValueError(
                    f"{str(folder)!r}: {name!r} has {what} {its}, and in the base {str(base)!r} {mine}: {remedy}"
                )


def _ties(folder: Path) -> bool:
    file = folder / "config.json"
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return bool(values.get("tie_word_embeddings"))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
