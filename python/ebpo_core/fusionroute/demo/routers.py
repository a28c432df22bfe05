"""The demo's routers, trained with FusionRoute's own trainers, and the fine-tuned model without experts beside them.

The fine-tuned model goes through the same trainers, data, order and steps with everything of the experts turned off:
the routing loss has weight 0, and with ``alpha=0`` the bias of CDPO is 0, which makes it DPO. What is used of it
afterwards is the router alone, an ordinary language model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, TrainerCallback, set_seed

from ebpo_core.fusionroute.model import FusionRouteForCausalLM
from ebpo_core.fusionroute.training import (
    FusionRouteCDPOConfig,
    FusionRouteCDPOTrainer,
    FusionRouteSFTConfig,
    FusionRouteSFTTrainer,
)
from ebpo_core.progress import Bar, bar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rich.console import Console

    from .experts import Course

_KEPT = ("loss", "routing/accuracy", "routing/informative", "cdpo/bias", "cdpo/accuracy")
_SHOWN = {"loss": "loss", "routing/accuracy": "routing", "cdpo/accuracy": "preferred"}


class _Progress(TrainerCallback):
    """A bar with the trainer's numbers beside it; ``history`` keeps them."""

    def __init__(self, bar: Bar, routes: bool) -> None:
        self.bar, self.note = bar, ""
        self.shown = {key: label for key, label in _SHOWN.items() if routes or key != "routing/accuracy"}
        self.history: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:  # noqa: ARG002
        values = {name: value for name, value in (logs or {}).items() if name in _KEPT}
        if "loss" not in values:  # the summary at the end
            return
        self.history.append({"step": state.global_step, **values})
        self.note = "  ".join(f"{label} {values[key]:.3f}" for key, label in self.shown.items() if key in values)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.bar.update(state.global_step, self.note)


def new_router(
    base: Path, experts: Mapping[str, Path], *, seed: int, with_experts: bool = True
) -> FusionRouteForCausalLM:
    """A router that starts as the base model, with a fresh route head drawn from ``seed``.

    Args:
        base: folder of the base model and its tokenizer.
        experts: folder of each expert.
        seed: of the route head.
        with_experts: False gives the experts' logits the weight 0, for the fine-tuned model without experts.
    """
    set_seed(seed)
    alpha = 1.0 if with_experts else 0.0
    model: FusionRouteForCausalLM = FusionRouteForCausalLM.from_experts(base, dict(experts), alpha=alpha)
    return model


def train_sft(
    model: FusionRouteForCausalLM,
    tokenizer: Any,
    rows: Sequence[Mapping[str, str]],
    course: Course,
    folder: Path,
    *,
    seed: int,
    console: Console,
    name: str,
) -> list[dict[str, float]]:
    """The SFT phase over ``rows``, one epoch, in place; returns what was logged.

    Args:
        model: see :func:`new_router`; of one with ``alpha=0`` the language model alone is trained.
        tokenizer: the base's.
        rows: ``course.steps * course.batch_size`` of them.
        course: steps, sequences a step, learning rate.
        folder: for the expert cache. Models that are trained on the same rows with the same experts may share it.
        seed: of the order of the rows.
        console, name: where the progress is shown, and as what.
    """
    args = FusionRouteSFTConfig(**_arguments(model, course, folder, seed))
    trainer = FusionRouteSFTTrainer(model, args, list(rows), processing_class=tokenizer)
    return _train(trainer, course.steps, console, name)


def train_mix(
    model: FusionRouteForCausalLM,
    tokenizer: Any,
    rows: Sequence[Mapping[str, str]],
    pairs: Sequence[Mapping[str, str]],
    course: Course,
    folder: Path,
    *,
    seed: int,
    console: Console,
    name: str,
) -> list[dict[str, float]]:
    """Mix training (Algorithm 1) over SFT rows and preference pairs, shuffled together, one epoch, in place.

    Arguments and result as of :func:`train_sft`; rows and pairs are ``course.steps * course.batch_size`` together.
    """
    args = FusionRouteCDPOConfig(**_arguments(model, course, folder, seed))
    trainer = FusionRouteCDPOTrainer(model, args, list(pairs), sft_dataset=list(rows), processing_class=tokenizer)
    return _train(trainer, course.steps, console, name)


def _arguments(model: FusionRouteForCausalLM, course: Course, folder: Path, seed: int) -> dict[str, Any]:
    return {
        "routing_loss_weight": 1 / 3 if model.config.alpha else 0.0,
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "per_device_train_batch_size": course.batch_size,
        "learning_rate": course.learning_rate,
        "warmup_steps": course.steps // 10,
        "adam_beta2": 0.98,
        # Needs the expert cache alone: no expert runs while the router trains, which halves the time here.
        "routing_loss": "softmax",
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": max(1, course.steps // 20),
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "seed": seed,
    }


def _train(trainer: Any, steps: int, console: Console, name: str) -> list[dict[str, float]]:
    trainer.remove_callback(PrinterCallback)
    with bar(console, name, steps) as shown:
        progress = _Progress(shown, routes=bool(trainer.fusion.config.alpha))
        trainer.add_callback(progress)
        trainer.train()
    trainer.model.eval()
    return progress.history
