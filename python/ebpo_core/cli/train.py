"""``ebpo train``: a TRL run of EBPO, or of unmodified GRPO, from a YAML file and flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ebpo_core.checkpoint import read_prior, resolve_resume
from ebpo_core.cli.arguments import TrainArguments, parse
from ebpo_core.cli.quiet import hide_loading_bars
from ebpo_core.cli.report import ProgressCallback, main_console, print_pass_at_1, train_shown, write_result
from ebpo_core.evaluation import Evaluation, evaluate
from ebpo_core.models import load_model
from ebpo_core.progress import bar
from ebpo_core.tasks.loading import Task, load_task

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from transformers import PreTrainedModel

TINY_MODEL = "tiny:countdown"
SHOWN = {"reward": "reward", "entropy": "entropy", "ebpo/shrinkage": "S"}


class Run(NamedTuple):
    """A finished run: its directory, pass@1 before and after (None where nothing was held out), seconds of training."""

    directory: Path
    before: Evaluation | None
    after: Evaluation | None
    train_seconds: float


def prepare_tiny_model(directory: Path, arguments: TrainArguments, console: Console) -> Path:
    """Make a tiny Llama and warm it up in ``directory``, which is returned; with the same settings only once."""
    from ebpo_core.tasks.tiny_model import save_tiny_model
    from ebpo_core.tasks.warmup import warm_up

    settings = {name: value for name, value in vars(arguments).items() if name.startswith(("warm_up_", "tiny_"))}
    marker = directory / "warm_up.json"
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == settings:
        console.print(f"Warm-up: found in {directory}", markup=False, highlight=False, soft_wrap=True)
        return directory
    marker.unlink(missing_ok=True)
    save_tiny_model(
        directory,
        hidden_size=arguments.tiny_hidden_size,
        layers=arguments.tiny_layers,
        seed=arguments.warm_up_seed,
    )
    model, tokenizer = load_model(str(directory))
    with bar(console, "Supervised warm-up", arguments.warm_up_steps) as shown:
        warm_up(
            model,
            tokenizer,
            steps=arguments.warm_up_steps,
            batch_size=arguments.warm_up_batch_size,
            learning_rate=arguments.warm_up_learning_rate,
            seed=arguments.warm_up_seed,
            on_step=lambda step, loss: shown.update(step, f"loss {loss:.3f}"),
        )
    model.save_pretrained(directory)
    marker.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return directory


def build_trainer(
    arguments: TrainArguments, config: Any, model_config: Any, model: Any, tokenizer: Any, task: Task
) -> Any:
    """The trainer of a run: EBPOTrainer, or TRL's own GRPOTrainer for method grpo, over the same data and reward."""
    from trl import GRPOTrainer, get_peft_config  # type: ignore[attr-defined]

    from ebpo_core.trainer import EBPOTrainer

    trainer_type: Any = GRPOTrainer if arguments.method == "grpo" else EBPOTrainer
    return trainer_type(
        model=model,
        reward_funcs=task.reward,
        args=config,
        train_dataset=task.train,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
    )


def run(arguments: TrainArguments, config: Any, model_config: Any, console: Console) -> Run:
    """Prepare task and model, measure, train, measure again, and save model, prior, log and result.

    Raises:
        FileNotFoundError, ValueError: A path or a setting that does not fit, with its name.
    """
    import torch

    hide_loading_bars()
    if arguments.cpu_threads:
        torch.set_num_threads(arguments.cpu_threads)
    output = Path(config.output_dir)
    # Paths that do not exist are found out before anything is loaded.
    checkpoint = resolve_resume(config.resume_from_checkpoint, config.output_dir)
    if arguments.prior is not None:
        read_prior(arguments.prior)
        config.ebpo_prior = arguments.prior
    # Task and model; the model of the demo is made here.
    task = load_task(
        arguments.task,
        train_size=arguments.train_size,
        test_size=arguments.eval_prompts,
        seed=config.seed,
        test_seed=arguments.eval_seed,
        topics=arguments.topics,
        levels=arguments.levels,
        reward=arguments.reward,
        config=arguments.dataset_config,
        split=arguments.dataset_split,
    )
    name = model_config.model_name_or_path
    if name == TINY_MODEL:
        with config.main_process_first(desc="warm-up"):
            name = str(prepare_tiny_model(output / "warm-up", arguments, console))
    options = {"attn_implementation": model_config.attn_implementation} if model_config.attn_implementation else {}
    model, tokenizer = load_model(
        name,
        dtype=model_config.dtype,
        revision=model_config.model_revision,
        trust_remote_code=config.trust_remote_code,
        **options,
    )
    device = config.device

    def measure(policy: PreTrainedModel, title: str) -> Evaluation | None:
        if task.test is None:
            return None
        with bar(console, title, arguments.eval_prompts * arguments.eval_completions) as shown:
            return evaluate(
                policy.to(device),
                tokenizer,
                task.test,
                task.reward,
                max_new_tokens=config.max_completion_length,
                completions_per_prompt=arguments.eval_completions,
                batch_size=arguments.eval_completions_batch,
                temperature=config.temperature,
                seed=arguments.eval_seed,
                on_batch=lambda done, _: shown.update(done),
            )

    # Measure, train, measure again, always with the same prompts and seeds.
    before = measure(model, "pass@1 before")
    trainer = build_trainer(arguments, config, model_config, model, tokenizer, task)
    progress = ProgressCallback(console, f"Training ({arguments.method})", SHOWN)
    seconds = train_shown(trainer, progress, output, checkpoint)
    after = measure(trainer.accelerator.unwrap_model(trainer.model), "pass@1 after")
    # The model is gathered from all processes; the first one writes the rest.
    trainer.save_model(config.output_dir)
    if trainer.is_world_process_zero():
        if arguments.method == "ebpo":
            trainer.save_prior(output)
        result = {
            "method": arguments.method,
            "task": arguments.task,
            "seed": config.seed,
            "steps": trainer.state.global_step,
            "train_seconds": round(seconds, 3),
            "before": _as_json(before),
            "after": _as_json(after),
        }
        write_result(output, result)
    return Run(output, before, after, seconds)


def _as_json(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    return {
        "pass_at_1": evaluation.pass_at_1,
        "standard_error": evaluation.standard_error,
        "completions": evaluation.completions,
        "clusters": {"/".join(cluster): share for cluster, share in evaluation.clusters.items()},
    }


def main(argv: Sequence[str]) -> int:
    """Train as the YAML file and the flags say."""
    arguments, config, model_config = parse(argv)
    console = main_console()
    done = run(arguments, config, model_config, console)
    if done.before is not None and done.after is not None:
        print_pass_at_1(console, {"before": done.before, "after": done.after}, "pass@1 on held-out prompts")
    console.print(f"Model, log and result: {done.directory}", markup=False, highlight=False, soft_wrap=True)
    return 0
