"""What comes before a trainer: the model it is given, its adapter, the experts, their cache, the rows of data."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ebpo_core.fusionroute.experts.expert import Expert
from ebpo_core.fusionroute.experts.experts import Experts
from ebpo_core.fusionroute.experts.references import ExpertReference
from ebpo_core.fusionroute.model import FusionRouteForCausalLM

from .annotation import ExpertSource
from .batches import MixDataset
from .config import FusionRouteArguments
from .data import tokenize_samples
from .expert_cache import ExpertCache
from .sequences import TokenSequences

logger = logging.getLogger(__name__)


def fusion_model(model: Any) -> FusionRouteForCausalLM:
    """The FusionRoute model itself, or the one that a PEFT model is made of.

    Raises:
        TypeError: another model.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, FusionRouteForCausalLM):
        raise TypeError(
            f"model is a {type(model).__name__}: pass a FusionRouteForCausalLM (from_experts, or from_pretrained of a "
            "FusionRoute checkpoint), or a PEFT model on one"
        )
    return inner


def with_adapter(model: Any, peft_config: Any) -> Any:
    """``model`` with a new adapter on its router; ``route_head`` stays trainable, as a module to save.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: the model has an adapter already.
    """
    if peft_config is None:
        return model
    try:
        from peft import get_peft_model
    except ModuleNotFoundError as error:
        raise ImportError('peft_config needs PEFT: pip install "ebpo-core[fusionroute]"') from error
    if hasattr(model, "peft_config"):
        raise TypeError("peft_config is given and the model has an adapter already: leave one of them out")
    config = copy.deepcopy(peft_config)
    config.modules_to_save = sorted({*(config.modules_to_save or []), "route_head"})
    return get_peft_model(model, config)


def expert_sources(model: FusionRouteForCausalLM, device: torch.device) -> list[ExpertSource]:
    """The experts of a model for :meth:`~.expert_cache.ExpertCache.build`: loaded ones, else loaded when needed."""
    if len(model.experts):
        return [
            ExpertSource(expert.name, _identity(expert.reference, expert.hash), partial(_itself, expert))
            for expert in model.experts
        ]
    sources = []
    for values in model.config.experts or []:
        reference = ExpertReference.from_dict(values)
        if reference.hash is None:
            raise ValueError(
                f"expert {reference.name!r} has no hash in the model's config, so it cannot be told whether an expert "
                "cache is its own: load the model with its experts"
            )
        load = partial(_load, reference, model.dtype, device)
        sources.append(ExpertSource(reference.name, _identity(reference, reference.hash), load))
    return sources


def _itself(expert: Expert) -> Expert:
    return expert


def _load(reference: ExpertReference, dtype: torch.dtype, device: torch.device) -> Expert:
    return Experts.load([reference], default_dtype=dtype, device=device)[0]


def _identity(reference: ExpertReference, weights: str) -> str:
    """What decides an expert's outputs: its weights, and how they are loaded."""
    quantization = json.dumps(reference.quantization_config, sort_keys=True)
    return f"{weights} dtype={reference.dtype} quantization={quantization}"


def expert_cache(
    model: FusionRouteForCausalLM, args: FusionRouteArguments, name: str, sequences: TokenSequences, tokenizer: Any
) -> ExpertCache:
    """The expert cache ``name`` of a run, made if it is missing.

    Raises:
        ValueError: no sequences.
    """
    if sequences.truncated or sequences.dropped:
        logger.warning(
            "%s: %d sequences were cut to max_length=%s, %d rows had nothing to learn left and were dropped",
            name,
            sequences.truncated,
            args.max_length,
            sequences.dropped,
        )
    if not len(sequences):
        raise ValueError(f"{name}: no row to train on is left of the data ({sequences.dropped} were dropped)")
    root = Path(args.expert_cache_dir or Path(str(args.output_dir)) / "expert_cache")
    device = args.device  # sets up the process group
    model.experts.to(device)
    return ExpertCache.build(
        root / name,
        sequences,
        expert_sources(model, device),
        vocab_size=int(model.config.vocab_size or 0),
        tokenizer=tokenizer,
        on_change=args.on_change,
        batch_tokens=args.expert_cache_batch_tokens,
        progress=not args.disable_tqdm,
    )


def check_strategy(args: FusionRouteArguments) -> None:
    """Raise where Trainer would run the model in a way that the experts or the references do not survive."""
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process: start one process per GPU (torchrun or accelerate launch), or show it "
            "one with CUDA_VISIBLE_DEVICES"
        )
    if is_deepspeed_zero3_enabled():  # type: ignore[no-untyped-call]
        raise ValueError(
            "DeepSpeed ZeRO-3 splits every model that is loaded, the frozen experts too, and puts only the trained one "
            "together again: use ZeRO-2 or FSDP2"
        )


def check_head(model: Any, args: FusionRouteArguments) -> None:
    """Raise if ``route_head`` is frozen and should be trained."""
    head = [value for name, value in model.named_parameters() if "route_head." in name]
    if args.routing_loss_weight and not any(value.requires_grad for value in head):
        raise ValueError(
            "route_head is frozen and routing_loss_weight is not 0: set requires_grad, or modules_to_save="
            '["route_head"] in the PEFT config (peft_config does so by itself)'
        )


def check_experts(fusion: FusionRouteForCausalLM, args: FusionRouteArguments) -> None:
    """Raise unless the routing loss has the experts that it needs."""
    if args.routing_loss == "normalized" and not len(fusion.experts):
        raise ValueError(
            'routing_loss="normalized" needs the full distributions of the experts, and none is loaded: load the model '
            'with its experts, or use routing_loss="softmax", which needs the expert cache alone'
        )


def sft_samples(rows: Any, tokenizer: Any, args: FusionRouteArguments) -> TokenSequences:
    """Rows of SFT data as labelled sequences, by the trainer's arguments."""
    options: Any = args.chat_template_kwargs
    return tokenize_samples(
        sized(rows), tokenizer, max_length=args.max_length, train_on=args.train_on, chat_template_kwargs=options
    )


def sized(rows: Any) -> Any:
    """``rows``, if they can be counted; the expert cache needs the whole data at hand."""
    if not hasattr(rows, "__len__"):
        raise TypeError(
            f"the data is a {type(rows).__name__}, which has no length: give a list or a map-style Dataset; streams "
            "cannot be used, since the experts' log-probabilities are computed before training"
        )
    return rows


def evaluation(rows: Any, name: str, prepare: Any) -> MixDataset | dict[str, MixDataset] | None:
    """Evaluation data as Trainer takes it: None, one data set, or a dict of several, each with a cache of its own."""
    if isinstance(rows, Mapping):
        return {key: prepare(part, f"{name}-{key}") for key, part in rows.items()}
    return None if rows is None else prepare(rows, name)
