"""One vLLM model per sub-model, each under a configuration of its own: sizes, attention windows, quantisation."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.config.utils import replace
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.transformers_utils.config import get_config

from ebpo_core.fusionroute.experts.loading import explained
from ebpo_core.fusionroute.experts.references import ExpertReference


def expert_config(expert: ExpertReference, *, trust_remote_code: bool = False) -> Any:
    """The config of an expert that :func:`~.startup.resolved` has put into a local folder, as vLLM reads configs."""
    with explained(expert.name):
        return get_config(str(expert.path), trust_remote_code=trust_remote_code)


def build(vllm_config: VllmConfig, hf_config: Any, folder: str, name: str, prefix: str) -> nn.Module:
    """The model of ``hf_config`` without weights, as module ``name`` of the composite at ``prefix``.

    Args:
        vllm_config: of the engine.
        hf_config: of the sub-model.
        folder: where its files are; quantisation methods read settings from there.
        name: such as ``expert_0``: vLLM takes the one number in a layer's name for the layer's index, so the expert's
            must not stand alone between dots.
        prefix: of the composite, usually empty.
    """
    config = _own_config(vllm_config, hf_config, folder)
    with set_model_tag(name):  # sub-models must not share what was compiled
        model: nn.Module = initialize_model(vllm_config=config, prefix=f"{prefix}.{name}" if prefix else name)
    return model


def _own_config(vllm_config: VllmConfig, hf_config: Any, folder: str) -> VllmConfig:
    """The engine's configuration with everything that depends on the model replaced by the sub-model's own.

    ``VllmConfig.with_hf_config`` leaves the text config, the sliding window and the quantisation as they are: right for
    the language part of one checkpoint, wrong for another model. The compilation config stays shared on purpose: in it
    attention layers register themselves for the engine's key/value cache.
    """
    hf_config = copy.deepcopy(hf_config)
    if not hf_config.architectures:
        hf_config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[hf_config.model_type]]
    model_config: Any = copy.copy(vllm_config.model_config)
    model_config.hf_config = hf_config
    model_config.hf_text_config = text = hf_config.get_text_config()
    model_config.model, model_config.revision = folder, None
    model_config.quantization = None
    model_config.is_submodel_config = True
    model_config.model_arch_config = model_config.get_model_arch_config()
    model_config._verify_quantization()
    model_config.maybe_untie_word_embeddings()
    own = VllmConfig.get_quantization_config(model_config, vllm_config.load_config)

    cache_config = copy.copy(vllm_config.cache_config)
    kinds = getattr(text, "layer_types", None)
    # As vLLM decides for the model of an engine: where layers differ, each says for itself whether it slides.
    slides = kinds is None or all(one == "sliding_attention" for one in kinds)
    cache_config.sliding_window = model_config.get_sliding_window() if slides else None
    return replace(
        vllm_config,
        model_config=model_config,
        cache_config=cache_config,
        quant_config=vllm_config.quant_config if own is None else own,  # `--quantization` is for the unquantised ones
    )
