"""One vLLM model per sub-model, each under a configuration of its own: sizes, attention windows, quantisation."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.config.utils import replace
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.transformers_utils.config import get_config

from ebpo_core.fusionroute.experts.errors import explained
from ebpo_core.fusionroute.experts.references import ExpertReference

from .quantisation import own_quantisation


def expert_config(expert: ExpertReference, *, trust_remote_code: bool = False) -> Any:
    """The config of an expert that :func:`~.startup.resolved` has put into a local folder, as vLLM reads configs."""
    with explained(expert.name):
        return get_config(str(expert.path), trust_remote_code=trust_remote_code)


def view(model_config: Any, hf_config: Any, folder: str) -> Any:
    """The engine's model config as it would be for a sub-model alone: its own text config, sizes, folder.

    Args:
        model_config: of the engine.
        hf_config: of the sub-model.
        folder: where its files are; quantisation methods read settings from there.
    """
    hf_config = copy.deepcopy(hf_config)
    if not hf_config.architectures:
        hf_config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[hf_config.model_type]]
    own = copy.copy(model_config)
    own.hf_config, own.hf_text_config = hf_config, hf_config.get_text_config()
    own.model, own.revision, own.quantization = folder, None, None
    own.is_submodel_config = True
    own.model_arch_config = own.get_model_arch_config()
    return own


def build(
    vllm_config: VllmConfig, hf_config: Any, folder: str, name: str, prefix: str, *, sizes: Sequence[int] = ()
) -> nn.Module:
    """The model of ``hf_config`` without weights, as module ``name`` of the composite at ``prefix``.

    The engine's configuration is taken over with everything that depends on the model replaced by the sub-model's own.
    ``VllmConfig.with_hf_config`` leaves the text config, the sliding window and the quantisation as they are: right for
    the language part of one checkpoint, wrong for another model. The compilation config stays shared on purpose: in it
    attention layers register themselves for the engine's key/value cache.

    Args:
        vllm_config: of the engine.
        hf_config, folder: as in :func:`view`.
        name: such as ``expert_0``: vLLM takes the one number in a layer's name for the layer's index, so the expert's
            must not stand alone between dots.
        prefix: of the composite, usually empty.
        sizes: that compiled code of it will contain and its configuration does not.
    """
    full_name = f"{prefix}.{name}" if prefix else name
    model_config = view(vllm_config.model_config, hf_config, folder)
    model_config.maybe_untie_word_embeddings()
    cache_config = copy.copy(vllm_config.cache_config)
    kinds = getattr(model_config.hf_text_config, "layer_types", None)
    # As vLLM decides for the model of an engine: where layers differ, each says for itself whether it slides.
    slides = kinds is None or all(one == "sliding_attention" for one in kinds)
    cache_config.sliding_window = model_config.get_sliding_window() if slides else None
    quantisation = own_quantisation(vllm_config, model_config, full_name)
    # vLLM finds compiled code again by a hash of the configuration. Neither the module's name, which the code may
    # contain, nor a quantisation that the engine brings would have a part in it, nor other sizes than its own.
    method = None if quantisation is None else quantisation.get_name()
    model_config.hf_config.compiled_as = [full_name, method, *sizes]
    own = replace(vllm_config, model_config=model_config, cache_config=cache_config, quant_config=quantisation)
    # The tag names a folder of compiled code within one that vLLM may have chosen by another sub-model's hash.
    with set_model_tag(f"{name}-{own.compute_hash()}"):
        model: nn.Module = initialize_model(vllm_config=own, prefix=full_name)
    return model
