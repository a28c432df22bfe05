"""Model and data as the trainers take them: the adapter, what is checked beforehand, the experts, rows with columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ebpo_core.fusionroute.experts.experts import Experts
from ebpo_core.fusionroute.experts.references import ExpertReference
from ebpo_core.fusionroute.model import FusionRouteForCausalLM

from .adapters import check_adapters, is_quantized, keep_quantised_weights, with_adapter
from .batches import MixDataset
from .config import FusionRouteArguments
from .data import tokenize_pairs, tokenize_samples
from .expert_cache import ExpertSource, expert_columns
from .lengths import check_lengths, report_cuts
from .sequences import PreferencePairs, TokenSequences


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


def prepared_model(
    model: Any, args: FusionRouteArguments, peft_config: Any, *, samples: bool, trains_head: bool
) -> Any:
    """``model`` with its new adapter, if there is to be one, after checking that it can be trained as ``args`` say.

    Args:
        model: a FusionRoute model, or a PEFT model on one.
        args: the trainer's.
        peft_config: of a new adapter on the router, or None; ``route_head`` stays trainable, as a module to save.
        samples: True if there are SFT samples, whose routing loss may need the experts.
        trains_head: True if ``route_head`` is to be trained; else it is frozen here.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: another model, one that has an adapter already, or a ``peft_config`` that is none.
        ValueError: several GPUs or a ZeRO stage in which the experts do not survive, experts that are not loaded, a
            frozen route head, or an adapter that a FusionRoute model cannot be trained with.
    """
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
    router_config = fusion_model(model).router.config
    if getattr(router_config, "output_router_logits", False):
        raise ValueError(
            "the router's config has output_router_logits=True, which asks for the load-balancing loss of a mixture of "
            "experts, and no FusionRoute trainer adds that loss: set model.router.config.output_router_logits = False "
            "to train without it"
        )
    if samples and args.routing_loss == "normalized" and not len(fusion_model(model).experts):
        raise ValueError(
            'routing_loss="normalized" needs the full distributions of the experts, and none is loaded: load the model '
            'with its experts, or use routing_loss="softmax", which needs the expert cache alone'
        )
    check_adapters(model)
    if peft_config is not None:
        model = with_adapter(model, peft_config)
    elif is_quantized(model) and not hasattr(model, "peft_config"):
        raise ValueError(
            "the router's weights are quantised, and such weights do not train: pass peft_config (use_peft on the "
            "command line), or load the router without quantisation"
        )
    keep_quantised_weights(model)
    head = [value for name, value in model.named_parameters() if "route_head." in name]
    if not trains_head:
        for value in head:
            value.requires_grad_(False)
    elif args.routing_loss_weight and not any(value.requires_grad for value in head):
        raise ValueError(
            "route_head is frozen and routing_loss_weight is not 0: set requires_grad, or modules_to_save="
            '["route_head"] in the PEFT config (peft_config does so by itself)'
        )
    return model


def prepared_data(
    fusion: FusionRouteForCausalLM,
    args: FusionRouteArguments,
    tokenizer: Any,
    name: str | None,
    *,
    samples: Any = None,
    pairs: Any = None,
) -> MixDataset | None:
    """Rows as a data set with the experts' columns, which are computed where they are missing; None without rows.

    Args:
        fusion: the model whose experts are asked.
        args: the trainer's.
        tokenizer: of rows that are not tokenized.
        name: of the data, "train" or "eval"; the columns are kept in folders ``sft-<name>`` and ``pairs-<name>``. None
            names them by their content.
        samples: rows of SFT data, see :func:`~.data.tokenize_samples`.
        pairs: rows of preference data, see :func:`~.data.tokenize_pairs`.

    Raises:
        TypeError: rows that cannot be counted.
        ValueError: rows that cannot be trained on, or columns of something else.
    """
    for rows in (samples, pairs):
        if rows is not None and not hasattr(rows, "__len__"):
            raise TypeError(
                f"the data is a {type(rows).__name__}, which has no length: give a list or a map-style Dataset; "
                "streams cannot be used, since the experts' log-probabilities are computed before training"
            )
    options: dict[str, Any] = {"max_length": args.max_length, "chat_template_kwargs": args.chat_template_kwargs}
    parts: dict[str, Any] = {}
    if samples is not None:
        parts["samples"] = tokenize_samples(samples, tokenizer, train_on=args.train_on, **options)
        label = name or content_name(parts["samples"])
        parts["sample_experts"] = _columns(fusion, args, tokenizer, f"sft-{label}", parts["samples"])
    if pairs is not None:
        parts["pairs"] = tokenized_pairs(pairs, args, tokenizer)
        label = name or content_name(parts["pairs"].sequences)
        parts["pair_experts"] = _columns(fusion, args, tokenizer, f"pairs-{label}", parts["pairs"].sequences)
    return MixDataset(**parts) if parts else None


def tokenized_pairs(rows: Any, args: FusionRouteArguments, tokenizer: Any) -> PreferencePairs:
    """Preference rows as the trainer's arguments say, see :func:`~.data.tokenize_pairs`."""
    return tokenize_pairs(
        rows,
        tokenizer,
        max_length=args.max_length,
        chat_template_kwargs=args.chat_template_kwargs,  # type: ignore[arg-type]
    )


def content_name(sequences: TokenSequences) -> str:
    """A name for data that has none, the same for equal data."""
    return f"rows-{sequences.fingerprint[:12]}"


def _columns(
    fusion: FusionRouteForCausalLM, args: FusionRouteArguments, tokenizer: Any, name: str, sequences: TokenSequences
) -> Dataset:
    """The expert cache ``name`` of a run."""
    report_cuts(name, sequences, args.max_length)
    if not len(sequences):
        raise ValueError(
            f"{name}: the data has no row to train on ({sequences.dropped} were dropped): give rows, or a larger "
            f"max_length than {args.max_length}"
        )
    check_lengths(name, sequences, fusion)
    root = Path(args.expert_cache_dir or Path(str(args.output_dir)) / "expert_cache")
    device = args.device  # sets up the process group
    fusion.experts.to(device)
    return expert_columns(
        root / name,
        sequences,
        expert_sources(fusion, device),
        vocab_size=int(fusion.config.vocab_size or 0),
        tokenizer=tokenizer,
        on_change=args.on_change,
        batch_tokens=args.expert_cache_batch_tokens,
        progress=not args.disable_tqdm,
    )


def expert_sources(model: FusionRouteForCausalLM, device: torch.device) -> list[ExpertSource]:
    """The experts of a model for :func:`~.expert_cache.expert_columns`: loaded ones, else loaded when needed.

    Raises:
        ValueError: an expert that is not loaded and has no hash in the model's config.
    """
    if len(model.experts):
        return [
            ExpertSource(expert.name, _identity(expert.reference, expert.hash), lambda expert=expert: expert)  # type: ignore[misc]
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

        def load(reference: ExpertReference = reference) -> Any:
            trust = model.trust_remote_code
            return Experts.load([reference], default_dtype=model.dtype, device=device, trust_remote_code=trust)[0]

        sources.append(ExpertSource(reference.name, _identity(reference, reference.hash), load))
    return sources


def _identity(reference: ExpertReference, weights: str) -> str:
    """Everything that decides an expert's outputs: its weights, and how they are loaded."""
    quantization = json.dumps(reference.quantization_config, sort_keys=True)
    substitutes = f" substitutes={json.dumps(reference.substitutes, sort_keys=True)}" if reference.substitutes else ""
    code = f" code={reference.code_hash}" if reference.code_hash else ""
    return f"{weights} dtype={reference.dtype} quantization={quantization}{substitutes}{code}"
