"""Experts written into folders: copied into a checkpoint as they are, or as ordinary safetensors that engines load."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .adapters import merge_adapter
from .errors import explained
from .expert import Expert
from .files import (
    CODE_PATTERN,
    COMPANIONS,
    WEIGHT_PATTERNS,
    adapter_files,
    copy_model,
    fetched_folder,
    local_folder,
    weight_files,
)
from .hashes import FILES, check_sources, sources_hash
from .loading import load_experts
from .naming import unused_name
from .references import EXPERTS_FOLDER, ExpertReference, Source
from .remote_code import code_hash, config_dict, with_code
from .tokenizers import TOKENIZER_FILES, load_tokenizer

logger = logging.get_logger(__name__)

_COPIED, _MERGED, _DEQUANTISED = "copied", "adapter merged into its base", "GGUF file dequantised"
# Written anew with the weights, or true of them no longer.
_REPLACED = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "quantization_config.json",
    "quantize_config.json",
)


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
    bases: dict[Source, str] = {}  # the folder of each base model: of an expert without an adapter, by its name
    for expert in experts:
        if not (expert.live or expert.touched) and expert.reference.adapter is None:
            bases.setdefault(expert.reference.source(), expert.name)
    root = checkpoint_dir / EXPERTS_FOLDER
    root.mkdir(parents=True, exist_ok=True)
    copies: list[ExpertReference] = []
    # Filled beside their targets, and moved there at the end: an expert may be copied from where another one goes.
    with TemporaryDirectory(dir=root, prefix=".") as staging:

        def add(name: str, fill: Callable[[Path], object]) -> str:
            folder = Path(staging) / name
            if not folder.exists():
                folder.mkdir()
                fill(folder)
            return f"{EXPERTS_FOLDER}/{name}"

        for expert in experts:
            copied = replace(expert.reference, revision=None, subfolder=None, adapter_revision=None)
            if expert.touched and expert.reference.adapter is not None:
                raise ValueError(
                    f"expert {expert.name!r} was changed in memory below its adapter, and neither's files hold that: "
                    "merge the adapter, save the model, and pass its folder as the expert"
                )
            if expert.live or expert.touched:
                path = add(expert.name, expert.model.save_pretrained)
                copies.append(replace(copied, path=path, hash=None))
                continue
            source, adapter = expert.reference.source(), expert.reference.adapter_source()
            if source not in bases:
                bases[source] = unused_name(Path(source.gguf_file or source.path).name.removesuffix(".gguf"), taken)
            with explained(expert.name):
                folder = local_folder(source)
                code = copied.code_hash is not None
                weights = weight_files(folder, source.gguf_file)
                path = add(bases[source], partial(copy_model, folder, weights, code=code))
                copied = replace(copied, path=path, gguf_file=source.gguf_file)
                if adapter is not None:
                    folder = local_folder(adapter)
                    path = add(expert.name, partial(copy_model, folder, adapter_files(folder)))
                    copied = replace(copied, adapter=path)
            copies.append(replace(copied, hash=expert.hash))
        for folder in Path(staging).iterdir():
            if (root / folder.name).exists():
                shutil.rmtree(root / folder.name)
            folder.replace(root / folder.name)
    return [_with_files_hash(copied, checkpoint_dir) for copied in copies]


def _with_files_hash(copied: ExpertReference, checkpoint_dir: Path) -> ExpertReference:
    source = copied.source(checkpoint_dir)
    if (
        copied.hash is None and copied.code_hash is not None
    ):  # a saved model brings along those files alone that it needs
        copied = replace(copied, code_hash=code_hash(local_folder(source)))
    if copied.hash is not None and copied.hash.startswith(FILES):
        return copied
    return replace(copied, hash=sources_hash(source, copied.adapter_source(checkpoint_dir)))


def needs_conversion(reference: ExpertReference) -> str | None:
    """The reason why an engine that loads folders of safetensors only, such as vLLM, cannot serve an expert as it is.

    Args:
        reference: paths in it do not depend on a checkpoint's folder (:meth:`ExpertReference.anchored`). No weights are
            read.

    Returns:
        The reason, to stand after "expert 'name': "; None for safetensors in a folder, repository or package, quantised
        on disk or not.

    Raises:
        FileNotFoundError, ValueError: as for :meth:`ExpertReference.source`.
    """
    if reference.path is None:
        return "it is a live model that was never saved"
    if reference.adapter is not None:
        return "it is a PEFT adapter on a base model"
    if reference.source().gguf_file is not None:
        return "it is a GGUF file"
    if reference.quantization_config:
        return "it is a model that its quantization_config quantises while loading"
    return None


def export_expert(
    expert: ExpertReference | PreTrainedModel,
    name: str,
    folder: Path,
    *,
    dtype: str | None = None,
    default_dtype: str | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
) -> tuple[ExpertReference, str]:
    """Write one expert into a folder: weights, config, generation config, tokenizer, licences.

    A folder of safetensors is copied file by file. A GGUF file is dequantised and an adapter merged into its base, in
    the dtype that FusionRoute runs them in, so that the written expert computes the same: to the bit after GGUF, to
    rounding after a merge. What a ``quantization_config`` quantises while loading is written as it was before, with a
    warning. Weights that are quantised on disk are copied as they are.

    Args:
        expert: a reference whose paths depend on no checkpoint, or a live model.
        name: its name.
        folder: empty, or not there yet.
        dtype: "float32", "bfloat16", ...: of the written weights; None: the reference's, or ``default_dtype``.
        default_dtype: of references without one: the router's.
        verify: compare the weights with the hash in the reference.
        trust_remote_code: run the code of an expert that brings its own, where it has to be loaded.

    Returns:
        A reference to ``folder``, with its hash, and what was done, in a few words.

    Raises:
        FileNotFoundError, ImportError, OSError, ValueError: the expert cannot be loaded, is not the one the router was
            trained with, or its adapter cannot be merged.
    """
    if isinstance(expert, PreTrainedModel):
        model = copy.deepcopy(expert).to(getattr(torch, dtype)) if dtype else expert
        (loaded,) = load_experts({name: model})
        reference, done = loaded.reference, "live model saved"
        _save(loaded, folder)
    else:
        reference = replace(expert, name=name)
        done = _what_to_do(reference, dtype)
        if done == _COPIED:
            _copy_files(reference, folder, verify, trust_remote_code)
        else:
            reference = _convert(reference, folder, dtype, default_dtype, verify, trust_remote_code)
    written = sources_hash(Source(str(folder), None, None, "", folder))
    gone: dict[str, Any] = {"adapter": None, "adapter_revision": None, "quantization_config": None, "gguf_file": None}
    gone |= {"code_hash": None if reference.code_hash is None else code_hash(folder)}
    return replace(reference, path=str(folder), revision=None, subfolder=None, hash=written, **gone), done


def _what_to_do(reference: ExpertReference, dtype: str | None) -> str:
    source, stored = reference.source(), None
    if source.gguf_file is None:
        with explained(reference.name, source):
            stored = config_dict(source).get("quantization_config")
    if stored is not None and reference.adapter is not None:
        raise ValueError(
            f"expert {reference.name!r}: the weights of its base {source.path!r} are quantised, and an adapter merged "
            "into them would be rounded with them: name the base's unquantised folder, "
            f"expert_paths={{{reference.name!r}: {{'path': ...}}}} with verify_experts=False"
        )
    if reference.adapter is not None:
        return _MERGED
    if source.gguf_file is not None:
        return _DEQUANTISED
    if stored is not None:  # a quantization_config in the reference could only have set how these are run
        return _COPIED
    if reference.quantization_config:
        return "original weights saved"
    return f"saved as {dtype}" if dtype else _COPIED


def _copy_files(reference: ExpertReference, folder: Path, verify: bool, trust_remote_code: bool) -> None:
    source = reference.source()
    with explained(reference.name, source):
        code = reference.code_hash is not None
        if verify:  # of code too, which is not run here
            with_code(reference, trust_remote_code=True)
        patterns = [*COMPANIONS, *WEIGHT_PATTERNS, *([CODE_PATTERN] if code else [])]
        origin = fetched_folder(source, *patterns)  # no pickles
        weights = weight_files(origin)
        compared = not verify or reference.hash is None or check_sources(reference.name, reference.hash, source)
    if not compared:
        # Of tensors: compared when they are loaded.
        load_experts([replace(reference, device=None, offload=False)], trust_remote_code=trust_remote_code)
    copy_model(origin, weights, folder, code=code)


def _convert(
    reference: ExpertReference,
    folder: Path,
    dtype: str | None,
    default_dtype: str | None,
    verify: bool,
    trust_remote_code: bool,
) -> ExpertReference:
    if reference.quantization_config:
        # Not the rounded weights, which the router was trained beside: engines would need them in formats of their own,
        # and dequantised they have the full size and the rounding both, and need the quantiser's package and often its
        # GPU. They approximate the original ones, and so do their logits.
        logger.warning(
            f"expert {reference.name!r} is quantised while loading: its original weights are written, and their logits "
            "differ a little from those that the router was trained with"
        )
    dtype = dtype or reference.dtype
    loading = replace(reference, dtype=dtype, quantization_config=None)
    # Where it runs, and by which attention, is nothing to its weights, and need not be at hand here.
    loading = replace(loading, device=None, offload=False, attn_implementation=None)
    (expert,) = load_experts(
        [loading],
        default_dtype=default_dtype,
        verify=verify and reference.hash is not None,
        trust_remote_code=trust_remote_code,
    )
    if expert.adapter is not None:
        merge_adapter(expert.model, expert.name, expert.adapter)
    _save(expert, folder)
    _save_companions(reference, folder)
    return replace(reference, dtype=dtype, vocab_size=expert.vocab_size)


def _save(expert: Expert, folder: Path) -> None:
    with explained(expert.name):
        expert.model.save_pretrained(folder)


def _save_companions(reference: ExpertReference, folder: Path) -> None:
    """Licences, and the tokenizer: the adapter's own, where there is one, else its base's."""
    source, adapter = reference.source(), reference.adapter_source()
    with explained(reference.name, source):
        folders = [fetched_folder(each, *COMPANIONS) for each in (source, adapter) if each is not None]
    tokenizers = [each for each in folders if any((each / name).is_file() for name in TOKENIZER_FILES)]
    if not tokenizers and source.gguf_file is not None:
        load_tokenizer(reference).save_pretrained(folder)
    for each in folders:
        for pattern in COMPANIONS:
            if pattern.endswith("*") or tokenizers[-1:] == [each]:  # licences end in *
                for file in each.glob(pattern):
                    if file.name not in _REPLACED:
                        shutil.copyfile(file, folder / file.name)
