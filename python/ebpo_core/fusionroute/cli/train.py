"""``fusionroute train``: a router over frozen experts, first SFT, then mix training, from a YAML file and flags."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ebpo_core.checkpoint import resolve_resume
from ebpo_core.cli.quiet import hide_loading_bars
from ebpo_core.cli.report import ProgressCallback, main_console, train_shown, write_result
from ebpo_core.fusionroute.cli.arguments import TrainArguments, parse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset
    from rich.console import Console

CHECKPOINT = "fusionroute"  # the model type
SHOWN = {
    "loss": "loss",
    "routing/accuracy": "routing",
    "rewards/accuracies": "preferred",
    "rewards/margins": "margin",
}


class Run(NamedTuple):
    """A finished run: its directory, the steps done, metrics of the last evaluation (or empty), seconds of training."""

    directory: Path
    steps: int
    metrics: dict[str, float]
    train_seconds: float


def model_type(name: str, revision: str | None) -> str:
    """The type of the model called ``name``, "fusionroute" for a checkpoint, from its config alone."""
    from transformers import AutoConfig

    import ebpo_core.fusionroute  # noqa: F401 -- transformers learns our type
    from ebpo_core.models import resolve_model

    source, gguf_file = resolve_model(name)
    if gguf_file is not None:  # never a checkpoint of ours, and transformers would read the whole file
        return "GGUF"
    return str(AutoConfig.from_pretrained(source, revision=revision).model_type)


def check_experts(arguments: TrainArguments, name: str, kind: str) -> None:
    """See that a router comes with experts, and a checkpoint without any that were typed.

    Args:
        arguments: The options.
        name: The model's name as the user gave it.
        kind: Its :func:`model_type`.

    Raises:
        ValueError: The option, its value and what to give in its place.
    """
    if kind == CHECKPOINT:
        if arguments.experts_typed:
            raise ValueError(
                f"experts={arguments.experts!r}: {name!r} is a FusionRoute checkpoint and has its experts; "
                "leave them out, or say with expert_paths where they are now"
            )
    elif arguments.experts is None:
        raise ValueError(f"model_name_or_path={name!r}: a {kind} model has no experts; name them with experts")
    elif arguments.expert_paths is not None:
        raise ValueError("expert_paths and experts: give the first for a checkpoint, the second for a new router")


def check_trainable(name: str, revision: str | None) -> None:
    """Raise a ValueError for a checkpoint whose experts are compiled for its router as it is."""
    from ebpo_core.fusionroute.config import FusionRouteConfig

    where: dict[str, Any] = {"revision": revision}
    if FusionRouteConfig.from_pretrained(name, **where).compiled:
        raise ValueError(
            f"model_name_or_path={name!r} has experts that are compiled for its router as it is: train the checkpoint "
            "that it was compiled from, and compile again afterwards"
        )


def load_model(arguments: TrainArguments, config: Any, model_config: Any) -> tuple[Any, Any]:
    """The model to train and its tokenizer: a checkpoint, or a router with a fresh route head over ``experts``.

    The experts of a checkpoint stay on the disk where the expert cache is all that the stage needs of them. A file's
    ``experts`` are ignored for a checkpoint.

    Raises:
        ValueError: What :func:`check_experts` says, or an ``alpha`` that is no finite number.
    """
    from transformers import AutoTokenizer
    from trl import get_quantization_config  # type: ignore[attr-defined]

    from ebpo_core.fusionroute.decoding.routing import RoutingOptions
    from ebpo_core.fusionroute.experts.remote_code import check_code
    from ebpo_core.fusionroute.model import FusionRouteForCausalLM
    from ebpo_core.models import load_model as load_router

    name, dtype, revision = model_config.model_name_or_path, model_config.dtype, model_config.model_revision
    # Wrong settings are found out before anything is loaded.
    RoutingOptions().updated(alpha=arguments.alpha)
    kind = model_type(name, revision)
    check_experts(arguments, name, kind)
    options: dict[str, Any] = {"revision": revision}
    if model_config.attn_implementation:
        options["attn_implementation"] = model_config.attn_implementation
    quantization = get_quantization_config(model_config)
    if quantization is not None:
        options["quantization_config"] = quantization
    model: Any
    tokenizer: Any
    if kind == CHECKPOINT:
        check_trainable(name, revision)
        model = FusionRouteForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            load_experts=arguments.stage != "cdpo" and config.routing_loss == "normalized",
            expert_paths=arguments.moved_experts(),
            trust_remote_code=arguments.trust_remote_code,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    else:
        experts: Any = arguments.named_experts()
        check_code(experts, trust_remote_code=arguments.trust_remote_code)
        router, tokenizer = load_router(name, dtype=dtype, trust_remote_code=False, **options)
        substitutes: Any = arguments.named_substitutes()
        model = FusionRouteForCausalLM.from_experts(
            router,
            experts,
            tokenizer=tokenizer,
            substitutes=substitutes,
            renamed_ids=arguments.renamed_ids or (),
            dtype=dtype,
            trust_remote_code=arguments.trust_remote_code,
        )
    if arguments.alpha is not None:
        model.config.alpha = arguments.alpha
    return model, tokenizer


def build_trainer(arguments: TrainArguments, config: Any, model_config: Any, model: Any, tokenizer: Any) -> Any:
    """The trainer of the stage, over its data. Making it computes the expert cache, or what is missing of it."""
    from trl import get_peft_config  # type: ignore[attr-defined]

    from ebpo_core.data.rows import load_rows
    from ebpo_core.fusionroute.training import FusionRouteCDPOTrainer, FusionRouteSFTTrainer

    split, size = arguments.dataset_split, arguments.train_size

    def rows(argument: str) -> Dataset | None:
        name = getattr(arguments, argument)
        return None if name is None else load_rows(argument, name, split, None if argument.startswith("eval") else size)

    shared = {"model": model, "args": config, "processing_class": tokenizer}
    shared["peft_config"] = get_peft_config(model_config)
    if arguments.stage == "sft":
        return FusionRouteSFTTrainer(train_dataset=rows("data"), eval_dataset=rows("eval_data"), **shared)
    return FusionRouteCDPOTrainer(
        train_dataset=rows("preferences"),
        eval_dataset=rows("eval_preferences"),
        sft_dataset=rows("data"),
        eval_sft_dataset=rows("eval_data"),
        **shared,
    )


def run(arguments: TrainArguments, config: Any, model_config: Any, console: Console) -> Run:
    """Load, train, evaluate if there is something to evaluate on, and save model, tokenizer, log and result.

    Raises:
        FileNotFoundError, ValueError: A path or a setting that does not fit, with its name.
    """
    import torch
    from transformers import set_seed

    hide_loading_bars()
    if arguments.cpu_threads:
        torch.set_num_threads(arguments.cpu_threads)
    output = Path(config.output_dir)
    checkpoint = resolve_resume(config.resume_from_checkpoint, config.output_dir)
    # The trainer sets the seed too, but after a new route head has been drawn.
    set_seed(config.seed)
    model, tokenizer = load_model(arguments, config, model_config)
    trainer = build_trainer(arguments, config, model_config, model, tokenizer)
    progress = ProgressCallback(console, f"Training ({arguments.stage})", SHOWN)
    seconds = train_shown(trainer, progress, output, checkpoint)
    # Evaluate, merge an adapter into the router, and write; the first process writes the result.
    metrics = trainer.evaluate() if arguments.eval_data or arguments.eval_preferences else {}
    if model_config.use_peft:
        trainer.save_merged(config.output_dir)
    else:
        trainer.save_model(config.output_dir)
    steps = trainer.state.global_step
    if trainer.is_world_process_zero():
        result = {
            "stage": arguments.stage,
            "seed": config.seed,
            "steps": steps,
            "train_seconds": round(seconds, 3),
            "evaluation": metrics,
        }
        write_result(output, result)
    return Run(output, steps, metrics, seconds)


def main(argv: Sequence[str]) -> int:
    """Train as the YAML file and the flags say."""
    arguments, config, model_config = parse(argv)
    console = main_console()
    done = run(arguments, config, model_config, console)
    for name, value in done.metrics.items():
        if name.startswith("eval_loss") or "accurac" in name:
            console.print(f"{name} {value:.4f}", markup=False, highlight=False)
    console.print(f"Checkpoint, log and result: {done.directory}", markup=False, highlight=False, soft_wrap=True)
    return 0
