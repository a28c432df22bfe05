"""Experts loaded from references: base models once for all that share them, adapters on top, hashes compared."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from ebpo_core.fusionroute.families import check_config
from ebpo_core.models import load_weights

from .adapters import AdapterSwitch, load_adapter
from .errors import check_complete, explained, require
from .expert import Expert
from .files import (
    CODE_PATTERN,
    COMPANIONS,
    WEIGHT_PATTERNS,
    checkpoint_folder,
    fetched_folder,
    local_folder,
    weight_files,
)
from .hashes import FILES, TENSORS, check_hash, check_sources, kind, sources_hash, tensors_hash
from .naming import parse_experts
from .offload import OffloadPool, exact_device
from .references import ExpertReference, Source
from .remote_code import class_of_code, code_hash, is_code_of_a_folder, with_code

_FSDP_SETTING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def load_experts(
    experts: Iterable[Any] | Mapping[str, Any],
    *,
    base_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    default_dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
) -> list[Expert]:
    """Experts in the order given. Arguments and errors are those of :meth:`~.experts.Experts.load`."""
    parsed = parse_experts(experts)
    folder = checkpoint_folder([reference for reference, _ in parsed], base_dir, revision)
    default_device = exact_device(device)
    loaded: dict[int, Expert] = {}
    shared: dict[str, list[tuple[int, ExpertReference]]] = {}
    for number, (reference, model) in enumerate(parsed):
        if model is not None:
            loaded[number] = _live(reference, model)
        else:
            anchored = reference.anchored(folder)
            reference = with_code(anchored, trust_remote_code=trust_remote_code, verify=verify)
            recorded = reference.hash if verify else None
            shared.setdefault(_base_of(reference), []).append((number, replace(reference, hash=recorded)))
    pool = OffloadPool()
    for members in shared.values():
        own = members[0][1].device
        where = default_device if own is None else exact_device(own)
        for expert, (number, _) in zip(_load_shared(members, pool, default_dtype, where, verify), members, strict=True):
            loaded[number] = expert
    return [loaded[number] for number in range(len(parsed))]


def _base_of(reference: ExpertReference) -> str:
    """A key that is equal for references whose base model is loaded once."""
    own: dict[str, Any] = {"adapter": None, "adapter_revision": None, "substitutes": None, "hash": None}
    return repr(replace(reference, name="", vocab_size=None, **own))


def _live(reference: ExpertReference, model: PreTrainedModel) -> Expert:
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"expert {reference.name!r} is a live model with adapters: pass a dict with path and adapter, or merge the "
            "adapter"
        )
    if is_code_of_a_folder(model) and reference.path is not None:
        with explained(reference.name):
            reference = replace(reference, code_hash=code_hash(local_folder(reference.source())))
    return Expert(reference, model, live=True)


def _load_shared(
    members: Sequence[tuple[int, ExpertReference]],
    pool: OffloadPool,
    default_dtype: torch.dtype | str | None,
    device: torch.device,
    verify: bool,
) -> Iterator[Expert]:
    """Experts on one base model, which is loaded once; each adapter is put into it."""
    base = members[0][1]
    by_tensors = False
    # Hashes of local files are compared before anything is loaded.
    for _, reference in members:
        if reference.hash is not None:
            source = reference.source()
            with explained(reference.name):
                by_tensors |= kind(reference.hash) == TENSORS
                if kind(reference.hash) == FILES and source.folder is not None:
                    check_sources(reference.name, reference.hash, source, reference.adapter_source())
    model = load_base(base, default_dtype=default_dtype, device=device)
    tensors = tensors_hash(model.state_dict()) if by_tensors else ""  # before adapters change the names
    switch = AdapterSwitch(model) if any(reference.adapter for _, reference in members) else None
    if base.offload:
        pool.add(model, device)
    for number, reference in members:
        source, adapter_source = reference.source(), reference.adapter_source()
        adapter = None
        if adapter_source is not None:
            adapter = f"expert_{number}"  # a name of torch's modules, which an expert's need not be
            load_adapter(model, reference.name, adapter, adapter_source)
        with explained(reference.name):
            if reference.hash is None:
                reference = replace(reference, hash=sources_hash(source, adapter_source) if verify else None)
            elif not check_sources(reference.name, reference.hash, source, adapter_source):
                check_hash(reference.name, reference.hash, tensors)
        yield Expert(reference, model, adapter=adapter, switch=switch, pool=pool if reference.offload else None)


def load_base(reference: ExpertReference, *, default_dtype: torch.dtype | str | None, device: torch.device) -> Any:
    """A reference's model without its adapter, on ``device`` (the CPU if it is offloaded).

    Its folder's code is run if the reference has a ``code_hash``, which :func:`~.remote_code.with_code` gave it.

    Raises:
        ImportError: a package that the reference needs is missing.
        OSError: no such repository or revision, nor a copy in the local cache (FileNotFoundError: a folder's weights).
        ValueError: a folder of pickles, weights that lack tensors, a model that transformers cannot load.
    """
    source = reference.source()
    dtype: Any = reference.dtype or default_dtype or "auto"
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    options: dict[str, Any] = {"dtype": dtype, "revision": source.revision, "subfolder": source.subfolder}
    options["trust_remote_code"] = reference.code_hash is not None  # never None, which asks in the terminal
    if source.gguf_file:
        require("gguf", reference.name, f"gguf_file={source.gguf_file!r}")
    if reference.attn_implementation:
        options["attn_implementation"] = reference.attn_implementation
    if reference.offload:
        require("accelerate", reference.name, "offload=True")
        device = torch.device("cpu")
    if reference.quantization_config or device.type != "cpu":
        # A quantizer without a device map chooses the GPU on its own; for the others it saves a copy on the CPU.
        require("accelerate", reference.name, f"device={str(device)!r} or a quantization")
        options["device_map"] = {"": device}
    with explained(reference.name, source):
        if source.folder is not None:
            weight_files(source.folder, source.gguf_file)
        if reference.code_hash is not None and source.folder is None:  # what is run is what was compared
            folder = fetched_folder(source, *COMPANIONS, *WEIGHT_PATTERNS, CODE_PATTERN)
            source = Source(str(folder), None, None, "", folder)
            options |= {"revision": None, "subfolder": ""}
        if source.gguf_file is None:  # a family that cannot be an expert is refused before its weights are read
            config = AutoConfig.from_pretrained(
                source.path,
                revision=source.revision,
                subfolder=source.subfolder,
                trust_remote_code=options["trust_remote_code"],
            )
            check_config(config, "it")
            if reference.code_hash is not None:
                options |= {"model_class": class_of_code(config, source.path), "config": config}
        if reference.quantization_config:
            quantizers: Any = importlib.import_module("transformers.quantizers")
            config = dict(reference.quantization_config)
            options["quantization_config"] = quantizers.AutoQuantizationConfig.from_dict(config)
        with whole_models():
            model, report = load_weights(source.path, source.gguf_file, **options)
        # Unread tensors of a whole model are left to transformers.
        check_complete({name: found for name, found in report.items() if name != "unexpected_keys"}, source.path)
    return model


_known_tensors: dict[tuple[str, str | None], str] = {}  # of files, and the dtype they were loaded in


def is_where_it_came_from(expert: Expert) -> bool:
    """True if the path of an expert's reference leads to the weights that it has in memory.

    For a live model its files are loaded once more, on the CPU, unless they were compared before.
    """
    if not expert.live:
        return not expert.touched
    reference = replace(expert.reference, hash=None, device="cpu", offload=False)
    try:
        reference = with_code(reference, trust_remote_code=expert.reference.code_hash is not None)
        key = (sources_hash(reference.source()), reference.dtype)
        if key not in _known_tensors:
            model = load_base(reference, default_dtype=None, device=torch.device("cpu"))
            _known_tensors[key] = tensors_hash(model.state_dict())
    except (ImportError, OSError, ValueError):  # gone, or not what it was: loading it later will say so too
        return False
    return _known_tensors[key] == expert.hash


@contextmanager
def whole_models() -> Iterator[None]:
    """Every process loads all of an expert, whatever is set up for the model that is trained.

    Otherwise transformers would leave the weights of all ranks but the first to FSDP's broadcast, or split them for
    DeepSpeed's ZeRO-3, and neither of them ever sees an expert.
    """
    deepspeed: Any = importlib.import_module("transformers.integrations.deepspeed")
    reference = deepspeed._hf_deepspeed_config_weak_ref
    setting = os.environ.pop(_FSDP_SETTING, None)
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference
        if setting is not None:
            os.environ[_FSDP_SETTING] = setting
