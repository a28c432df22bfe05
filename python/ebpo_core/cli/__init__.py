"""The ``ebpo`` command: ``train``, ``curriculum``, ``eval``, ``demo``, ``prior show``, ``signal`` and ``plot``.

Nothing heavy is imported until a command runs, so ``ebpo --help`` answers at once and works with NumPy alone; a command
whose extra is missing says what to install.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "train": "train a policy with EBPO, or with TRL's unmodified GRPO, from YAML or flags",
    "curriculum": "pass rates of a base model, topics, and a data set in the order of a curriculum",
    "eval": "avg@k, pass@k and maj@k by sampling, from transformers or an OpenAI-compatible server",
    "demo": "watch a small transformer learn arithmetic, on a CPU, in minutes",
    "prior": "show the running prior that a checkpoint holds",
    "signal": "does this run have a signal? from the rewards it has written so far",
    "plot": "draw reward, entropy, shrinkage and saturated share of finished or running runs",
}

# Looked for before anything is imported, for importing torch only to say that another module is missing takes seconds.
NEEDED = {
    "train": ("torch", "transformers", "trl", "datasets", "rich", "yaml"),
    "curriculum": ("rich",),
    "eval": ("rich",),
    "demo": ("torch", "transformers", "trl", "datasets", "rich", "yaml", "matplotlib", "tensorboard"),
    "prior": (),
    "signal": (),
    "plot": ("matplotlib",),
}

# A command's module, where that is not its name: `eval` is a function of Python's.
MODULES = {"eval": "evaluate"}

USAGE = "usage: ebpo [--version] [--help] <command> [options]"


def _help() -> str:
    lines = [USAGE, "", "Empirical-Bayes policy optimization (arXiv 2602.05165) for language models.", "", "commands:"]
    lines += [f"  {name:<12}{summary}" for name, summary in COMMANDS.items()]
    lines += ["", "`ebpo <command> --help` lists a command's options."]
    return "\n".join(lines)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from ebpo_core import __version__

        print(f"ebpo-core {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"{USAGE}\nebpo: no command {command!r}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    # Read by OpenMP when torch is loaded: on a CPU that other programs use too, threads that spin while they wait for
    # each other made a step of the demo five times slower than threads that sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        for module in NEEDED[command]:
            if not _installed(module):
                raise ModuleNotFoundError(name=module)
        with warnings.catch_warnings():
            # TRL 1.16 sets names that transformers 5 renamed, on every start; nobody here can act on it.
            warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|trl)")
            return int(importlib.import_module(f"ebpo_core.cli.{MODULES.get(command, command)}").main(rest))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "ebpo_core":
            raise
        print(
            f"ebpo {command}: the module {missing!r} is not installed; "
            'pip install "ebpo-core[train]" (Python 3.11 or newer)',
            file=sys.stderr,
        )
        return 1
    except (ValueError, TypeError, FileNotFoundError, ConnectionError) as error:
        # Wrong input is worth one line; EBPO_TRACEBACK=1 shows where it was noticed.
        if os.environ.get("EBPO_TRACEBACK"):
            raise
        print(f"ebpo {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"ebpo {command}: interrupted", file=sys.stderr)
        return 130
