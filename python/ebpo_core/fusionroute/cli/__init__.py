"""The ``fusionroute`` command: ``train``, ``generate``, ``show``, ``eval``, ``demo`` and ``convert``.

A command's own modules are imported when it runs; a command whose extra is missing says what to install.
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
    "train": "train a router over frozen experts (SFT, then mix training with CDPO), from YAML or flags",
    "generate": "load a checkpoint and answer a prompt, with the routing of every token if asked",
    "show": "show a routing trace in the terminal and as an HTML page",
    "eval": "evaluate a checkpoint on tasks of the lm-evaluation-harness",
    "demo": "three experts and a router from scratch, on a CPU, in minutes",
    "convert": "write a checkpoint whose experts are plain folders, as vLLM needs it",
}

# `eval` and `train` would be confusing module names beside Python's eval and the package `training`.
MODULES = {name: f"ebpo_core.fusionroute.cli.{name}" for name in COMMANDS} | {
    "eval": "ebpo_core.fusionroute.cli.evaluate"
}

# Looked for before anything is imported, for loading a model only to say that a module is missing takes minutes.
NEEDED = {
    "train": ("trl", "datasets", "rich", "yaml"),
    "generate": ("rich",),
    "show": ("rich",),
    "eval": ("lm_eval", "rich"),
    "demo": ("trl", "datasets", "rich", "yaml"),
    "convert": ("torch", "transformers"),
}

USAGE = "usage: fusionroute [--version] [--help] <command> [options]"


def _help() -> str:
    lines = [USAGE, "", "A router LM picks one frozen expert LM at each token (FusionRoute, arXiv 2601.05106).", ""]
    lines += ["commands:", *(f"  {name:<10}{summary}" for name, summary in COMMANDS.items())]
    lines += ["", "`fusionroute <command> --help` lists a command's options."]
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
        print(f"{USAGE}\nfusionroute: no command {command!r}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        for module in NEEDED[command]:
            if not _installed(module):
                raise ModuleNotFoundError(name=module)
        with warnings.catch_warnings():
            # TRL 1.16 sets names that transformers 5 renamed, on every start; nobody here can act on it.
            warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|trl)")
            return int(importlib.import_module(MODULES[command]).main(rest))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "ebpo_core":
            raise
        extras = "fusionroute,eval" if command == "eval" else "fusionroute"
        print(
            f"fusionroute {command}: the module {missing!r} is not installed; "
            f'pip install "ebpo-core[{extras}]" (Python 3.11 or newer)',
            file=sys.stderr,
        )
        return 1
    except BrokenPipeError:
        # The reader of our output has left (`| head`). Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ImportError, ValueError, TypeError, OSError) as error:
        # Wrong input is worth one line; EBPO_TRACEBACK=1 shows where it was noticed.
        if os.environ.get("EBPO_TRACEBACK"):
            raise
        print(f"fusionroute {command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"fusionroute {command}: interrupted", file=sys.stderr)
        return 130
