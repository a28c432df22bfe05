"""The ``fusionroute`` command, whose sub-commands are :data:`COMMANDS`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpo_core.cli.dispatch import Command, Program

if TYPE_CHECKING:
    from collections.abc import Sequence

_TRAINING = ("torch", "transformers", "trl", "datasets", "rich", "yaml")

COMMANDS = {
    "train": Command(
        "train a router over frozen experts (SFT, then mix training with CDPO), from YAML or flags",
        "ebpo_core.fusionroute.cli.train",
        _TRAINING,
    ),
    "generate": Command(
        "load a checkpoint and answer a prompt, with the routing of every token if asked",
        "ebpo_core.fusionroute.cli.generate",
        ("torch", "transformers", "rich"),
    ),
    "show": Command(
        "show a routing trace in the terminal and as an HTML page", "ebpo_core.fusionroute.cli.show", ("rich",)
    ),
    "eval": Command(
        "evaluate a checkpoint on held-out rows, or on tasks of the lm-evaluation-harness",
        "ebpo_core.fusionroute.cli.evaluate",
        ("torch", "transformers", "rich"),
    ),
    "demo": Command(
        "three experts and a router from scratch, on a CPU, in minutes", "ebpo_core.fusionroute.demo", _TRAINING
    ),
    "convert": Command(
        "write a checkpoint whose experts are plain folders, as vLLM needs it",
        "ebpo_core.fusionroute.cli.convert",
        ("torch", "transformers"),
    ),
    "compile": Command(
        "distil the experts into adapters of the router: two forwards a token for any number of experts",
        "ebpo_core.fusionroute.cli.compile",
        ("torch", "transformers", "peft", "rich"),
    ),
    "merge": Command(
        "merge fine-tuned models of one base by their weights (task arithmetic, DARE, TIES), a baseline",
        "ebpo_core.fusionroute.cli.merge",
        ("torch", "transformers"),
    ),
}

PROGRAM = Program(
    name="fusionroute",
    about="A router LM picks one frozen expert LM at each token (FusionRoute, arXiv 2601.05106).",
    extra="fusionroute",
    commands=COMMANDS,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fusionroute`` with ``argv``, by default this process's arguments; see :meth:`Program.run`."""
    return PROGRAM.run(argv)
