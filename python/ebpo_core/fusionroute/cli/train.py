"""``fusionroute train``: a router over frozen experts, first SFT, then mix training, from a YAML file and flags."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from ebpo_core.cli.report import ProgressCallback, train_shown
from ebpo_core.cli.train import RESULT_NAME, resolve_resume
from ebpo_core.fusionroute.cli.arguments import TrainArguments, parse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset

_NOTED = {
    "loss": "loss",
    "routing/accuracy": "routing",
    "rewards/accuracies": "preferred",
    "rewards/margins": "margin",
}


class Run(NamedTuple):
    """What a run left: its directory, the steps done, the last evaluation's metrics (empty without evaluation)."""

    directory: Path
    steps: int
    metrics: dict[str, float]
    train_seconds: float


class _Progress(ProgressCallback):
    """The bar of ``ebpo train`` with this trainer's numbers beside it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:  # noqa: ARG002
        values = {label: (logs or {}).get(key) for key, label in _NOTED.items()}
        note = "  ".join(f"{label} {value:.3f}" for label, value in values.items() if isinstance(value, (int, float)))
        self.note = note or self.note
        if self.bar is not None:
            self.bar.update(state.global_step, self.note)


def load_model(arguments: TrainArguments, config: Any, model_config: Any) -> tuple[Any, Any]:
    """The model to train and its tokenizer: a checkpoint, or a router with a fresh route head over ``experts``.

    The experts of a checkpoint stay on the disk where the expert cache is all that the stage needs of them.
    """
    from transformers import AutoConfig, AutoTokenizer

    from ebpo_core.fusionroute.model import FusionRouteForCausalLM
    from ebpo_core.models import load_model as load_router

    name, dtype = model_config.model_name_or_path, model_config.dtype
    options: dict[str, Any] = {"revision": model_config.model_revision}
    if model_config.attn_implementation:
        options["attn_implementation"] = model_config.attn_implementation
    experts = arguments.named_experts()
    model: Any
    tokenizer: Any
    if experts is None:
        kind = AutoConfig.from_pretrained(name, revision=model_config.model_revision).model_type
        if kind != "fusionroute":
            raise ValueError(f"model_name_or_path={name!r}: a {kind} model has no experts; name them with experts")
        model = FusionRouteForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            load_experts=arguments.stage != "cdpo" and config.routing_loss == "normalized",
            expert_paths=arguments.moved_experts(),
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(name, revision=model_config.model_revision)
    else:
        if arguments.expert_paths is not None:
            raise ValueError("expert_paths and experts: give the first for a checkpoint, the second for a new router")
        router, tokenizer = load_router(name, dtype=dtype, **options)
        if router.config.model_type == "fusionroute":
            raise ValueError(f"experts: {name!r} is a FusionRoute checkpoint, which has its own; leave them out")
        model = FusionRouteForCausalLM.from_experts(router, experts, tokenizer=tokenizer, dtype=dtype)
    if arguments.alpha is not None:
        model.config.alpha = arguments.alpha
        model.config.options()  # raises for a value that does not fit
    return model, tokenizer


def build_trainer(arguments: TrainArguments, config: Any, model_config: Any, model: Any, tokenizer: Any) -> Any:
    """The stage's trainer over its data. Making it computes the expert cache, or what is missing of it."""
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
    """Load, train, evaluate if there is something to evaluate on, and save model, tokenizer, log and result."""
    import torch
    from transformers import set_seed
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if arguments.cpu_threads:
        torch.set_num_threads(arguments.cpu_threads)
    output = Path(config.output_dir)
    checkpoint = resolve_resume(config.resume_from_checkpoint, config.output_dir)
    set_seed(config.seed)  # the trainer does so too, but after a new route head has been drawn
    model, tokenizer = load_model(arguments, config, model_config)
    trainer = build_trainer(arguments, config, model_config, model, tokenizer)
    seconds = train_shown(trainer, _Progress(console, f"Training ({arguments.stage})"), output, checkpoint)
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
        (output / RESULT_NAME).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return Run(output, steps, metrics, seconds)


def main(argv: Sequence[str]) -> int:
    """Train as the YAML file and the flags say."""
    arguments, config, model_config = parse(argv)
    # Of several processes the first one talks; the variable is what torchrun and accelerate set.
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    done = run(arguments, config, model_config, console)
    for name, value in done.metrics.items():
        if name.startswith("eval_loss") or "accurac" in name:
            console.print(f"{name} {value:.4f}", markup=False, highlight=False)
    console.print(f"Checkpoint, log and result: {done.directory}", markup=False, highlight=False, soft_wrap=True)
    return 0
