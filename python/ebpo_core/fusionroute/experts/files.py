"""Copies of experts in a checkpoint that brings them along: files verbatim, live models by ``save_pretrained``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .loading import explained
from .references import EXPERTS_FOLDER, ExpertReference
from .roster import unused_name
from .weights import FILES, adapter_files, local_folder, sources_hash, weight_files

if TYPE_CHECKING:
    from .expert import Expert

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
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.gguf")


def copy_experts(experts: Iterable[Expert], checkpoint_dir: Path) -> list[ExpertReference]:
    """Copy experts into ``checkpoint_dir/experts``; returns references to the copies, relative to the checkpoint.

    An expert without an adapter goes to the folder of its name, and so does an adapter. A base model that only adapters
    use goes to a folder of its own name. Experts with the same files share one copy. Folders of these names that are
    there already are replaced, after everything is copied.

    Raises:
        FileNotFoundError, ValueError: weights that are not there any more, or pickles, with the expert's name.
    """
    experts = list(experts)
    taken = {expert.name.casefold() for expert in experts}
    copies = _Copies(checkpoint_dir / EXPERTS_FOLDER)
    bases: dict[object, str] = {}
    for expert in experts:
        if not expert.live and expert.reference.adapter is None:
            bases.setdefault(expert.reference.source(), expert.name)
    result = []
    try:
        for expert in experts:
            reference = replace(expert.reference, revision=None, subfolder=None, adapter_revision=None)
            if expert.live:
                copies.add(expert.name, partial(_save, expert))
                result.append(replace(reference, path=f"{EXPERTS_FOLDER}/{expert.name}", hash=None))
                continue
            source, adapter = expert.reference.source(), expert.reference.adapter_source()
            if source not in bases:
                bases[source] = unused_name(Path(source.gguf_file or source.path).name.removesuffix(".gguf"), taken)
            changes: dict[str, Any] = {"path": f"{EXPERTS_FOLDER}/{bases[source]}", "gguf_file": source.gguf_file}
            with explained(expert.name):
                folder = local_folder(source)
                copies.add(bases[source], partial(copy_folder, folder, weight_files(folder, source.gguf_file)))
                if adapter is not None:
                    folder = local_folder(adapter)
                    copies.add(expert.name, partial(copy_folder, folder, adapter_files(folder)))
                    changes["adapter"] = f"{EXPERTS_FOLDER}/{expert.name}"
            result.append(replace(reference, **changes, hash=expert.hash))
    except BaseException:
        copies.discard()
        raise
    copies.finish()
    return [_with_files_hash(reference, checkpoint_dir) for reference in result]


class _Copies:
    """Folders filled beside their targets, and moved there at the end: an expert may be copied from where another one
    goes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: dict[str, Path] = {}

    def add(self, name: str, fill: Callable[[Path], None]) -> None:
        if name not in self.made:
            self.made[name] = folder = self.root / f".{name}.{os.getpid()}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            fill(folder)

    def finish(self) -> None:
        for name, folder in self.made.items():
            target = self.root / name
            if target.exists():
                shutil.rmtree(target)
            folder.replace(target)

    def discard(self) -> None:
        for folder in self.made.values():
            shutil.rmtree(folder, ignore_errors=True)


def copy_folder(folder: Path, weights: Mapping[str, Path], target: Path) -> None:
    """Copy weight files, by their names in ``target``, and what may stand beside them."""
    files = dict(weights)
    for pattern in (*COMPANIONS, "*.safetensors.index.json"):
        files |= {file.name: file for file in folder.glob(pattern) if file.is_file()}
    for name, file in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)


def _save(expert: Expert, target: Path) -> None:
    expert.model.save_pretrained(target)


def _with_files_hash(reference: ExpertReference, checkpoint_dir: Path) -> ExpertReference:
    if reference.hash is not None and reference.hash.startswith(FILES):
        return reference
    return replace(
        reference, hash=sources_hash(reference.source(checkpoint_dir), reference.adapter_source(checkpoint_dir))
    )
