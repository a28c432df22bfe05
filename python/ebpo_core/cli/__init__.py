"""The ``ebpo`` command: ``train``, ``curriculum``, ``eval``, ``demo``, ``prior show``, ``signal`` and ``plot``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpo_core.cli.dispatch import Command, Program

if TYPE_CHECKING:
    from collections.abc import Sequence

_TRAINING = ("torch", "transformers", "trl", "datasets", "rich", "yaml")

COMMANDS = {
    "train": Command(
        "train a policy with EBPO, or with TRL's unmodified GRPO, from YAML or flags",
        "ebpo_core.cli.train",
        _TRAINING,
    ),
    "curriculum": Command(
        "pass rates of a base model, topics, and a data set in the order of a curriculum",
        "ebpo_core.cli.curriculum",
        ("rich", "scipy"),
    ),
    "eval": Command(
        "avg@k, pass@k and maj@k by sampling, from transformers or an OpenAI-compatible server",
        "ebpo_core.cli.evaluate",
        ("rich",),
    ),
    "demo": Command(
        "watch a small transformer learn arithmetic, on a CPU, in minutes",
        "ebpo_core.cli.demo",
        (*_TRAINING, "matplotlib", "tensorboard"),
    ),
    "prior": Command("show the running prior that a checkpoint holds", "ebpo_core.cli.prior"),
    "signal": Command("does this run have a signal? from the rewards it has written so far", "ebpo_core.cli.signal"),
    "plot": Command(
        "draw reward, entropy, shrinkage and saturated share of finished or running runs",
        "ebpo_core.cli.plot",
        ("matplotlib",),
    ),
}

PROGRAM = Program(
    name="ebpo",
    about="Empirical-Bayes policy optimization (arXiv 2602.05165) for language models.",
    extra="train",
    commands=COMMANDS,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``ebpo`` with ``argv``, by default this process's arguments; see :meth:`~.dispatch.Program.run`."""
    return PROGRAM.run(argv)
