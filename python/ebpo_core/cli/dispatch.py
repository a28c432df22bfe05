"""A console script with commands: help, dispatch, one-line errors and the extra of a missing module.

Nothing of a command is imported until it runs, so that ``--help`` answers at once and works with NumPy alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ebpo_core.cli.quiet import quiet_imports

# Distributions that are not named as the module they install.
_DISTRIBUTIONS = {"yaml": "pyyaml"}


class Command(NamedTuple):
    """A command: its line in the help, the module whose ``main(argv)`` runs it, and the modules it cannot do without.

    ``needs`` are looked for before anything is imported: importing torch only to say that another module is missing
    takes seconds.
    """

    summary: str
    module: str
    needs: tuple[str, ...] = ()


class Program(NamedTuple):
    """A console script: its name, the line about it in the help, the extra that installs it, and its commands."""

    name: str
    about: str
    extra: str
    commands: Mapping[str, Command]

    @property
    def usage(self) -> str:
        return f"usage: {self.name} [--version] [--help] <command> [options]"

    @property
    def help(self) -> str:
        lines = [self.usage, "", self.about, "", "commands:"]
        lines += [f"  {name:<12}{command.summary}" for name, command in self.commands.items()]
        lines += ["", f"`{self.name} <command> --help` lists a command's options."]
        lines += ["EBPO_TRACEBACK=1 in the environment shows where an error arose."]
        return "\n".join(lines)

    def run(self, argv: Sequence[str] | None = None) -> int:
        """Run one command and return its exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

        Args:
            argv: The arguments; by default those of this process.
        """
        arguments = list(sys.argv[1:] if argv is None else argv)
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(self.help)
            return 0 if arguments else 2
        if arguments[0] in ("-V", "--version"):
            from ebpo_core import __version__

            print(f"ebpo-core {__version__}")
            return 0
        name, *rest = arguments
        if name not in self.commands:
            choices = ", ".join(self.commands)
            print(f"{self.usage}\n{self.name}: no command {name!r}; choose one of {choices}", file=sys.stderr)
            return 2
        try:
            return _execute(self.commands[name], rest)
        except KeyboardInterrupt:
            print(f"{self.name} {name}: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # The reader of our output has left (`| head`). Python would complain again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (ImportError, ValueError, TypeError, OSError, FloatingPointError) as error:
            # Wrong input is worth one line. A module of our own that is missing is our mistake.
            if os.environ.get("EBPO_TRACEBACK") or (isinstance(error, ModuleNotFoundError) and _is_ours(error)):
                raise
            print(f"{self.name} {name}: {_one_line(error, self.extra)}", file=sys.stderr)
            return 1


def _execute(command: Command, argv: Sequence[str]) -> int:
    # Read by OpenMP when torch is loaded: on a CPU that other programs use too, threads that spin while they wait for
    # each other made a step of the demo five times slower than threads that sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for module in command.needs:
        if not _installed(module):
            raise ModuleNotFoundError(name=module)
    quiet_imports()
    with warnings.catch_warnings():
        # TRL 1.16 sets names that transformers 5 renamed, on every start; nobody here can act on it.
        warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|trl)")
        return int(importlib.import_module(command.module).main(argv))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _is_ours(error: ModuleNotFoundError) -> bool:
    return (error.name or "").partition(".")[0] == "ebpo_core"


def _one_line(error: Exception, extra: str) -> str:
    """The error's message in one line; of a missing module, what to install, unless the message says so itself."""
    message = " ".join(str(error).split())
    if not isinstance(error, ModuleNotFoundError) or "pip install" in message:
        return message
    module = (error.name or "").partition(".")[0]
    extras = extras_of(module)
    if not extras:
        return f"the module {module!r} is not installed, and no extra of ebpo-core brings it; install it yourself"
    # What this program needs anyway, and where that does not bring the module, the extra that does.
    wanted = [extra] if extra in extras else [extra, extras[0]]
    return f'the module {module!r} is not installed; pip install "ebpo-core[{",".join(wanted)}]" (Python 3.11 or newer)'


def extras_of(module: str) -> list[str]:
    """Extras of the installed distribution that bring ``module``, those for users alone, from its metadata."""
    from importlib.metadata import requires

    wanted = _DISTRIBUTIONS.get(module, module).replace("_", "-").lower()
    extras = []
    for requirement in requires("ebpo-core") or []:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if name and extra and name.group().replace("_", "-").lower() == wanted and extra.group(1) != "dev":
            extras.append(extra.group(1))
    return extras
