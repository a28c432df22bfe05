"""Keywords checked by name, so that none is accepted and ignored: of `forward`, of `generate`, of loading a router."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from transformers.utils.generic import TransformersKwargs

# Of `AutoModelForCausalLM.from_pretrained`, for a router that `from_experts` loads.
LOADING = (
    "attn_implementation",
    "cache_dir",
    "device_map",
    "force_download",
    "local_files_only",
    "quantization_config",
    "revision",
    "token",
)
_LOAD_IT = "load the router with it yourself, AutoModelForCausalLM.from_pretrained(...), and pass the model"
# Several texts in one row: the router would keep them apart, the experts would not.
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "is_causal")
_LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")


def unexpected(owner: str, name: str, known: Iterable[str]) -> TypeError:
    """The error for a keyword ``name`` that ``owner`` does not have."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(names)}"
    return TypeError(f"{owner} got an unexpected keyword argument {name!r}: {hint}")


def loading_arguments(options: dict[str, Any], stored: Iterable[str], loaded: bool) -> dict[str, Any]:
    """Take the arguments for loading the router out of ``options``, and see that what is left are ``stored`` ones.

    Args:
        options: keywords of ``from_experts``; changed.
        stored: the names that go into the config.
        loaded: True if the router is a model already, which nothing can load differently.

    Raises:
        TypeError: a name of neither kind, or a loading argument for a loaded model.
        ValueError: a device map of several devices.
    """
    loading = {name: options.pop(name) for name in LOADING if name in options}
    for name in options:
        if name not in stored:
            if name in ("load_in_4bit", "load_in_8bit") or name in _from_pretrained():
                raise TypeError(f"from_experts does not take {name!r} ({options[name]!r}): {_LOAD_IT}")
            known = [*stored, *LOADING, "tokenizer", "vocab_size", "dtype", "torch_dtype", "trust_remote_code"]
            raise unexpected("from_experts", name, known)
    loading = {name: value for name, value in loading.items() if value is not None}
    if loaded and loading:
        name, value = next(iter(loading.items()))
        raise TypeError(f"{name}={value!r}: the router is a loaded model; load it with {name}, or pass its path")
    if "device_map" in loading:
        loading["device_map"] = {"": _one_device(loading["device_map"])}
    return loading


@lru_cache
def _from_pretrained() -> frozenset[str]:
    """Further names of ``from_pretrained``: its parameters, and those that it documents as keywords."""
    from transformers import PreTrainedModel

    named = set(inspect.signature(PreTrainedModel.from_pretrained).parameters)
    return frozenset({*named, "subfolder", "max_memory", "offload_folder", "low_cpu_mem_usage", "gguf_file", "proxies"})


def _one_device(device_map: Any) -> torch.device:
    value = device_map
    if isinstance(device_map, Mapping) and len(set(device_map.values())) == 1:
        value = next(iter(device_map.values()))
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device_map={device_map!r}: a router is on one device; pass that, such as device_map='cuda:0'"
        ) from error


def check_forward(router: type[Any], given: Mapping[str, Any], own: Iterable[str], *, fused: bool) -> None:
    """See that the router's forward knows what is passed on to it, and that the experts need not know.

    Args:
        router: its class.
        given: what is left for it.
        own: the keywords of FusionRoute's forward, to be named in the error.
        fused: True if experts run too.

    Raises:
        TypeError: a name that neither knows.
        ValueError: packed texts, for a forward in which experts run; outputs that have no place in ours.
    """
    known = _forward_names(router)  # type: ignore[arg-type]
    for name, value in given.items():
        if name not in known:
            raise unexpected("forward", name, [*known, *own])
        if name == "output_router_logits" and value:
            raise ValueError(
                f"output_router_logits={value!r}: router_logits of the output are the router LM's own, not the weights "
                "of the experts in its layers; run model.router for those"
            )
        if fused and value is not None and name in _PACKING:
            raise ValueError(
                f"{name} with experts: rows that hold several texts are read by the router alone; pad them"
            )


def check_generation_config(config: Any, options: Iterable[str]) -> None:
    """See that a ``GenerationConfig``, which takes any name, holds none of ours: nothing would read it there.

    Args:
        config: given by the caller, or the model's; None where there is none.
        options: names of the routing's options.

    Raises:
        ValueError: with the name and its value.
    """
    for name in ("draft_tokens", "output_routing", *options):
        value = getattr(config, name, None)
        if value is not None:
            raise ValueError(f"generation_config has {name}={value!r}, which is not read there: pass it to generate")


def check_saving(given: Iterable[str], own: Iterable[str]) -> None:
    """See that transformers' ``save_pretrained`` knows what is passed on to it.

    Raises:
        TypeError: a name that it does not know.
    """
    from transformers import PreTrainedModel

    methods = (PreTrainedModel.save_pretrained, PreTrainedModel.push_to_hub)
    known = {name for method in methods for name in inspect.signature(method).parameters} - {"self", "kwargs"}
    known |= {"safe_serialization", "save_function", "use_auth_token"}  # of before, which loops of accelerate pass
    for name in given:
        if name not in known:
            raise unexpected("save_pretrained", name, [*known, *own])


@lru_cache
def _forward_names(router: type[Any]) -> frozenset[str]:
    """The keywords of a router's forward, and those that all of transformers' models pass on."""
    named = {
        name
        for name, parameter in inspect.signature(router.forward).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) and name != "self"
    }
    return frozenset({*named, *TransformersKwargs.__annotations__, *_LOSS, "return_dict", "inputs_embeds"})
