"""A sub-model's own quantisation, with the names of its layers as they are inside the composite.

A quantised checkpoint says by name which layers stay as they are (``ignore``, ``modules_to_not_convert``). vLLM
compares these with its modules' names, which for a sub-model begin with ``expert_0.``: left alone, the layers to skip
would be quantised, silently and wrongly.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.model_loader.utils import get_model_architecture
from vllm.model_executor.models.utils import WeightsMapper

_ROOTS = ("model.", "transformer.", "gpt_neox.", "backbone.", "language_model.", "lm_head", "embed_out", "output.")
"""Beginnings of layers' names. A part of a name ("mlp.gate"), which some methods look for anywhere, stays as it is."""
_PATTERN = "re:"


def own_quantisation(vllm_config: VllmConfig, model_config: Any, name: str) -> Any:
    """The quantisation that a sub-model's config asks for; if none, the engine's (``--quantization``, or None).

    Args:
        vllm_config: of the engine.
        model_config: of the sub-model.
        name: such as ``expert_0``.
    """
    model_config._verify_quantization()
    own = VllmConfig.get_quantization_config(model_config, vllm_config.load_config)
    if own is None:
        return vllm_config.quant_config
    model_class, _ = get_model_architecture(model_config)
    mapper = getattr(model_class, "hf_to_vllm_mapper", None)
    if mapper is not None:  # vLLM does this, too, but to names that begin with the prefix by then
        own.apply_vllm_mapper(mapper.get_rename_mapper())
    own.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={root: f"{name}.{root}" for root in _ROOTS}))
    if isinstance(getattr(own, "ignore", None), list):
        own.ignore = [_anywhere(entry, name) for entry in own.ignore]
    if isinstance(getattr(own, "target_scheme_map", None), dict):
        own.target_scheme_map = {_anywhere(entry, name): scheme for entry, scheme in own.target_scheme_map.items()}
    return own


def _anywhere(entry: Any, name: str) -> Any:
    """A pattern of compressed-tensors, which must match from the start of a name, also behind the prefix."""
    if not isinstance(entry, str) or not entry.startswith(_PATTERN):
        return entry
    return f"{_PATTERN}(?:{name}[.])?(?:{entry.removeprefix(_PATTERN).removeprefix('^')})"
