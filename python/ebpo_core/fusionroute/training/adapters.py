"""PEFT adapters of the router: made with the defaults of its family, checked, merged into its weights."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import copy
import re
import warnings
from typing import TYPE_CHECKING, Any

import torch

from ebpo_core.fusionroute.experts.adapters import untie

if TYPE_CHECKING:
    from ebpo_core.fusionroute.model import FusionRouteForCausalLM

_HEAD = "route_head"


def with_adapter(model: FusionRouteForCausalLM, peft_config: Any) -> Any:
    """``model`` with a new adapter on its router; ``route_head`` is trained whole, as a module to save.

    Args:
        model: without an adapter.
        peft_config: not changed. Without ``target_modules`` it gets PEFT's defaults for the router's family.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: the model has an adapter, or ``peft_config`` is none of PEFT's.
        ValueError: what :func:`check_adapters` refuses, or no ``target_modules`` and a family without defaults.
    """
    try:
        from peft import PeftConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise ImportError('peft_config needs PEFT: pip install "ebpo-core[fusionroute]"') from error
    if hasattr(model, "peft_config"):
        raise TypeError("peft_config is given and the model has an adapter already: leave one of them out")
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config is a {type(peft_config).__name__}: pass a config of PEFT, such as LoraConfig")
    config: Any = copy.deepcopy(peft_config)
    _check(config)
    config.modules_to_save = sorted({*(getattr(config, "modules_to_save", None) or []), _HEAD})
    if hasattr(config, "target_modules"):
        _choose_targets(config, model)
    with warnings.catch_warnings():
        # Of trouble when the adapter is merged, which `merged` sees to; and of tied tokens, which PEFT overlooks.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        if getattr(config, "trainable_token_indices", None):
            warnings.filterwarnings("ignore", message="You have requested `ensure_weight_tying`, but no tied modules")
        return get_peft_model(model, config)


def check_adapters(model: Any) -> None:
    """Refuse a PEFT model, made elsewhere, whose adapters cannot be trained here or merged afterwards.

    Raises:
        ValueError: prompt learning, repeated layers, or another task than causal language modelling.
    """
    adapters = getattr(model, "peft_config", None)
    for config in adapters.values() if isinstance(adapters, dict) else ():
        _check(config)


def _check(config: Any) -> None:
    name = type(config).__name__
    if config.is_prompt_learning or str(config.peft_type).endswith("ADAPTION_PROMPT"):
        raise ValueError(
            f"peft_config is a {name}: prompts are embeddings of the router alone, which the experts cannot read, and "
            "they do not merge into its weights; pass a LoraConfig, or another adapter of weights"
        )
    if getattr(config, "layer_replication", None):
        raise ValueError(
            f"layer_replication={config.layer_replication}: repeated layers share weights and cannot be merged into "
            "the router; leave it out"
        )
    task = getattr(config.task_type, "value", config.task_type)
    if task not in (None, "CAUSAL_LM"):
        raise ValueError(f"task_type={task!r}: a router is a causal language model; pass task_type='CAUSAL_LM'")


def _choose_targets(config: Any, model: FusionRouteForCausalLM) -> None:
    """Fill in ``target_modules`` where they are left to PEFT, which knows the router's family and not ours."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if config.target_modules is None and not getattr(config, "target_parameters", None):
        family = model.router.config.get_text_config().model_type
        known = getattr(PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type], "target_module_mapping", {})  # IA3 has none
        targets = known.get(model.router.config.model_type) or known.get(family)
        if targets is None:
            raise ValueError(
                f"target_modules is None and {type(config).__name__} has no defaults for a router of type {family!r}: "
                "pass target_modules, such as 'all-linear' (lora_target_modules on the command line)"
            )
        config.target_modules = targets if isinstance(targets, str) else set(targets)
    elif isinstance(config.target_modules, str) and re.fullmatch(r"\w+", config.target_modules):
        # TRL makes a string of a list of one. As a pattern it would have to match whole paths, which begin with router.
        config.target_modules = {config.target_modules}
    # Patterns such as "all-linear" would also match the route head, which is trained whole.
    excluded = getattr(config, "exclude_modules", None)
    if isinstance(excluded, str):
        config.exclude_modules = rf"(?:{excluded})|(?:.*\.)?{_HEAD}"
    elif hasattr(config, "exclude_modules"):
        config.exclude_modules = {*(excluded or ()), _HEAD}


def is_quantized(model: Any) -> bool:
    """True if the router's weights are quantised, in whichever way they were loaded."""
    fusion = model.get_base_model() if hasattr(model, "get_base_model") else model
    return any(getattr(part, "hf_quantizer", None) is not None for part in (fusion, fusion.router))


def keep_quantised_weights(model: Any) -> None:
    """Keep bitsandbytes from rewriting a router's 4-bit weights in its first evaluation on a CPU.

    It packs them for one of the CPU's instructions there, with scales rounded to bfloat16, and fails for layers
    narrower than a block: training would go on with other weights than it began with.
    """
    fusion = model.get_base_model() if hasattr(model, "get_base_model") else model
    for module in fusion.router.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def merged(model: Any) -> FusionRouteForCausalLM:
    """A copy of a PEFT model on a FusionRoute model with its active adapters merged into the router.

    Tied embeddings are untied where an adapter changes the head or the embeddings, and stay so unless both come out
    equal: merged into one shared matrix, a change of one would also change the other. Quantised weights are dequantised
    first, since rounding the sum to their few values anew would lose most of what was learnt.
    """
    model = _dequantised(model) if is_quantized(model) else copy.deepcopy(model)
    fusion: Any = model.get_base_model()
    was_tied = fusion.config.tie_word_embeddings
    untied = untie(fusion.router)
    if untied:
        fusion.config.tie_word_embeddings = False
    fusion = model.merge_and_unload()
    if was_tied and untied:
        embeddings, head = fusion.get_input_embeddings(), fusion.get_output_embeddings()
        if torch.equal(embeddings.weight, head.weight):
            head.weight = embeddings.weight
            fusion.config.tie_word_embeddings = True
    result: FusionRouteForCausalLM = fusion
    return result


def _dequantised(model: Any) -> Any:
    """A copy of a PEFT model whose router has plain weights, of the values that the quantised ones stand for."""
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    active = model.active_adapters
    states = {name: get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False) for name in active}
    fusion = copy.deepcopy(model).unload()
    owner = fusion if getattr(fusion, "hf_quantizer", None) is not None else fusion.router
    owner.dequantize(dtype=fusion.router.dtype)
    for part in (fusion, fusion.router):
        part.hf_quantizer = None
        vars(part.config).pop("quantization_config", None)
    plain: Any = None
    for name in active:
        config = copy.deepcopy(model.peft_config[name])
        if plain is None:
            plain = PeftModel(fusion, config, adapter_name=name)
        else:
            plain.add_adapter(name, config)
        set_peft_model_state_dict(plain, states[name], adapter_name=name)
    plain.base_model.set_adapter(active)
    return plain.eval()
