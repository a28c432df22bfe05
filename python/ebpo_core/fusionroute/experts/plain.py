"""Experts as plain folders: which are none, and how one becomes a folder of ordinary safetensors that engines load."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .copies import COMPANIONS, WEIGHT_PATTERNS, copy_folder
from .expert import Expert, Experts
from .loading import explained
from .references import ExpertReference, Source
from .tokenizers import TOKENIZER_FILES, load_tokenizer
from .weights import COMMIT, FILES, check_hash, commit_hash, kind, sources_hash, weight_files

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


def needs_conversion(reference: ExpertReference) -> str | None:
    """Why an engine that loads plain folders only, such as vLLM, cannot serve an expert as it is.

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


def write_plain(
    expert: ExpertReference | PreTrainedModel,
    name: str,
    folder: Path,
    *,
    dtype: str | None = None,
    default_dtype: str | None = None,
    verify: bool = True,
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

    Returns:
        A reference to ``folder``, with its hash, and what was done, in a few words.

    Raises:
        FileNotFoundError, ImportError, OSError, ValueError: the expert cannot be loaded, is not the one the router was
            trained with, or its adapter cannot be merged.
    """
    if isinstance(expert, PreTrainedModel):
        model = copy.deepcopy(expert).to(getattr(torch, dtype)) if dtype else expert
        (loaded,) = Experts.load({name: model})
        reference, done = loaded.reference, "live model saved"
        _save(loaded, folder)
    else:
        reference = replace(expert, name=name)
        done = _what_to_do(reference, dtype)
        if done == _COPIED:
            _copy_plain(reference, folder, verify)
        else:
            reference = _convert(reference, folder, dtype, default_dtype, verify)
    written = sources_hash(Source(str(folder), None, None, "", folder), None)
    gone: dict[str, Any] = {"adapter": None, "adapter_revision": None, "quantization_config": None, "gguf_file": None}
    return replace(reference, path=str(folder), revision=None, subfolder=None, hash=written, **gone), done


def _what_to_do(reference: ExpertReference, dtype: str | None) -> str:
    source, stored = reference.source(), None
    if source.gguf_file is None:
        with explained(reference.name, source):
            config = transformers.AutoConfig.from_pretrained(
                source.path, revision=source.revision, subfolder=source.subfolder
            )
        stored = getattr(config, "quantization_config", None)
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


def _copy_plain(reference: ExpertReference, folder: Path, verify: bool) -> None:
    source, recorded = reference.source(), reference.hash if verify else None
    with explained(reference.name, source):
        origin = _fetched(source, *COMPANIONS, *WEIGHT_PATTERNS)  # no pickles
        weights = weight_files(origin)
        if recorded is not None and kind(recorded) in (FILES, COMMIT):
            found = sources_hash(source, None) if kind(recorded) == FILES else commit_hash(source, None)
            check_hash(reference.name, recorded, found)
    if recorded is not None and kind(recorded) not in (FILES, COMMIT):
        Experts.load([replace(reference, device=None, offload=False)])  # of tensors: compared when they are loaded
    copy_folder(origin, weights, folder)


def _fetched(source: Source, *patterns: str) -> Path:
    """The folder of a source; of a hub id its snapshot, with the files of these patterns."""
    if source.folder is not None:
        return source.folder
    from huggingface_hub import snapshot_download

    wanted = [f"{source.subfolder}/{pattern}".lstrip("/") for pattern in patterns]
    return Path(snapshot_download(source.path, revision=source.revision, allow_patterns=wanted)) / source.subfolder


def _convert(
    reference: ExpertReference, folder: Path, dtype: str | None, default_dtype: str | None, verify: bool
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
    (expert,) = Experts.load([loading], default_dtype=default_dtype, verify=verify and reference.hash is not None)
    if expert.adapter is not None:
        _merge(expert)
    _save(expert, folder)
    _save_companions(reference, folder)
    return replace(reference, dtype=dtype, vocab_size=expert.vocab_size)


def _save(expert: Expert, folder: Path) -> None:
    with explained(expert.name):
        expert.model.save_pretrained(folder)


def _merge(expert: Expert) -> None:
    """Put an expert's adapter into the weights of its base, in place, and take PEFT's modules out of the model."""
    from peft.functional import set_adapter
    from peft.tuners.tuners_utils import BaseTunerLayer

    model, adapter = expert.model, str(expert.adapter)
    try:
        if getattr(model.peft_config[adapter], "layer_replication", None):
            raise ValueError("it repeats layers of the base, which then share weights")
        set_adapter(model, adapter, inference_mode=True)
        _untie(model)
        options: dict[str, Any] = {"safe_merge": True, "adapter_names": [adapter]}
        merged: list[str] = []
        for path, module in list(model.named_modules()):
            if any(path.startswith(f"{outer}.") for outer in merged):
                continue  # inside of one that is gone
            if hasattr(module, "unload_and_optionally_merge_module"):
                plain = module.unload_and_optionally_merge_module(merge=True, **options)
            elif isinstance(module, BaseTunerLayer):
                module.merge(**options)
                plain = module.get_base_layer()
            else:
                continue
            model.set_submodule(path, plain)
            merged.append(path)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"expert {expert.name!r}: its adapter cannot be merged into the base: {error}. Name a folder with both in "
            f"one: expert_paths={{{expert.name!r}: {{'path': ..., 'adapter': None}}}} with verify_experts=False"
        ) from error
    del model.peft_config
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embeddings.weight.data_ptr() != head.weight.data_ptr():
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _untie(model: Any) -> None:
    """Where an adapter changes the embeddings or the head, give each weights of its own: it may change one alone."""
    outer = [model.get_input_embeddings(), model.get_output_embeddings()]
    inner = [_innermost(module) for module in outer]
    if inner != outer and inner[0].weight is inner[1].weight:
        inner[1].weight = nn.Parameter(inner[1].weight.detach().clone(), requires_grad=False)


def _innermost(module: Any) -> Any:
    """What PEFT has wrapped."""
    while (inner := getattr(module, "original_module", None) or getattr(module, "base_layer", None)) is not None:
        module = inner
    return module


def _save_companions(reference: ExpertReference, folder: Path) -> None:
    """Licences, and the tokenizer: the adapter's own, where there is one, else its base's."""
    source, adapter = reference.source(), reference.adapter_source()
    with explained(reference.name, source):
        folders = [_fetched(each, *COMPANIONS) for each in (source, adapter) if each is not None]
    tokenizers = [each for each in folders if any((each / name).is_file() for name in TOKENIZER_FILES)]
    if not tokenizers and source.gguf_file is not None:
        load_tokenizer(reference).save_pretrained(folder)
    for each in folders:
        for pattern in COMPANIONS:
            if pattern.endswith("*") or tokenizers[-1:] == [each]:  # licences end in *
                for file in each.glob(pattern):
                    if file.name not in _REPLACED:
                        shutil.copyfile(file, folder / file.name)
