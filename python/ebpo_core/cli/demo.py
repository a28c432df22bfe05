"""``ebpo demo``: a one-million-parameter transformer learns mini-countdown with EBPO, on a CPU, in minutes.

Supervised warm-up, pass@1 per topic and level, about 150 steps of TRL training with EBPO advantages, pass@1 again,
sampled completions, logs (JSON Lines and TensorBoard) and a picture. Every number it prints was computed in that run.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ebpo_core.evaluation.pass_at_1 import Sample

DEFAULT_DIRECTORY = "runs/demo"

# The same settings as recipes/countdown.yaml, which is not part of an installed package; a test compares the two.
# Sampling is at temperature 1 without truncation, so that the log-probabilities trained on are those sampled from.
SETTINGS: dict[str, Any] = {
    "model_name_or_path": "tiny:countdown",
    "task": "countdown",
    "method": "ebpo",
    "train_size": 6000,
    "eval_prompts": 600,
    "eval_completions": 4,
    "warm_up_steps": 120,
    "cpu_threads": 2,
    "output_dir": DEFAULT_DIRECTORY,
    "max_steps": 150,
    "per_device_train_batch_size": 512,
    "num_generations": 2,
    "max_completion_length": 8,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "beta": 0.0,
    "loss_type": "dapo",
    "learning_rate": 3.0e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    "adam_beta2": 0.95,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 0,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_steps": 50,
    "save_total_limit": 1,
    "report_to": "tensorboard",
}


def pick_samples(samples: list[Sample], prompts: int, completions_per_prompt: int) -> list[Sample]:
    """The first completion of each of the first ``prompts`` prompts: fixed places, so that none is chosen by hand."""
    return samples[: prompts * completions_per_prompt : completions_per_prompt]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ebpo demo",
        description=__doc__,
        epilog="Any option of `ebpo train` may follow, e.g. --seed 1 --max_steps 300 --method grpo.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--compare", choices=["grpo"], help="train EBPO and GRPO from one warm-up, paired by seed")
    parser.add_argument("--seeds", type=int, default=8, help="with --compare: seeds 0..N-1 (default: %(default)s)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the demo, or with ``--compare`` the comparison of EBPO and GRPO.

    Raises:
        ValueError: An option that does not fit, with its name and value.
    """
    # Everything is local; a library that asked the hub about a local directory would only make the start slower.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    own, flags = _parser().parse_known_args(argv)
    if own.seeds < 1:
        raise ValueError(f"seeds={own.seeds}: expected at least 1")

    from rich.console import Console

    from ebpo_core.cli.arguments import parse

    started, cpu_started = time.perf_counter(), time.process_time()
    console = Console()
    console.print("Loading PyTorch and TRL ...", highlight=False)
    arguments, config, model_config = parse(flags, SETTINGS, prog="ebpo demo")
    if own.compare:
        from ebpo_core.cli.compare import compare

        compare(flags, SETTINGS, own.seeds, console)
        return 0

    from ebpo_core.cli.plot import LOG_NAME, plot_runs, read_log
    from ebpo_core.cli.report import print_pass_at_1, print_samples
    from ebpo_core.cli.train import run

    # Train, then draw the run's own log.
    done = run(arguments, config, model_config, console)
    title = f"Mini-countdown, {arguments.method}, G = {config.num_generations}, seed {config.seed}"
    picture = plot_runs({arguments.method: read_log(done.directory)}, done.directory / "demo.png", title=title)
    # Completions and pass@1, where there are held-out prompts.
    if done.before is not None and done.after is not None:
        shown = pick_samples(done.after.samples, 6, arguments.eval_completions)
        print_samples(console, shown, "Completions after training, the first of each of the first prompts")
        print_pass_at_1(
            console,
            {"before": done.before, "after": done.after},
            f"pass@1 at temperature {config.temperature:g}: {arguments.eval_prompts} held-out prompts, "
            f"{arguments.eval_completions} completions each",
        )
        gain = 100 * (done.after.pass_at_1 - done.before.pass_at_1)
        console.print(
            f"pass@1 went from {done.before.pass_at_1:.3f} after the warm-up to {done.after.pass_at_1:.3f} after "
            f"{config.max_steps} steps of {arguments.method.upper()} ({gain:+.1f} points).",
            highlight=False,
            soft_wrap=True,
        )
    # Time, and where everything is.
    console.print(
        f"{time.perf_counter() - started:.0f} s in all ({time.process_time() - cpu_started:.0f} CPU seconds), "
        f"{done.train_seconds:.0f} s of them training.",
        highlight=False,
        soft_wrap=True,
    )
    for label, place in (
        ("Picture", picture),
        ("Log", done.directory / LOG_NAME),
        ("TensorBoard", f"tensorboard --logdir {done.directory}"),
        ("Prior", f"ebpo prior show {done.directory}" if arguments.method == "ebpo" else "none: plain GRPO"),
    ):
        console.print(f"{label + ':':<13}{place}", markup=False, highlight=False, soft_wrap=True)
    return 0
