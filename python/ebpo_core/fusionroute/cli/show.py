"""``fusionroute show``: a routing trace in the terminal, and as a self-contained HTML page.

The trace is read from files, or a server is asked and the trace is that of its answer. Of a checkpoint's folder it says
what is in it.
"""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from ebpo_core.fusionroute.cli.ask import add_flags, ask, check
from ebpo_core.fusionroute.cli.describe import description
from ebpo_core.fusionroute.traces.page import DEFAULT_TITLE, write_page
from ebpo_core.fusionroute.traces.show import has_color, print_traces
from ebpo_core.fusionroute.traces.trace import dump, load

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

COLORS = {"auto": None, "always": True, "never": False}


def main(argv: Sequence[str]) -> int:
    """Parse ``TRACE... | --url URL [--html FILE]``, print, and write the page."""
    parser = argparse.ArgumentParser(prog="fusionroute show", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "traces",
        nargs="*",
        metavar="TRACE",
        help="JSON or JSON Lines, e.g. from generate --routing; or folders of checkpoints, to be described",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page to this file")
    parser.add_argument(
        "--open", choices=["yes", "no"], default="no", help="open the page in the browser (default: no)"
    )
    parser.add_argument("--title", default=DEFAULT_TITLE, help="title of the page")
    parser.add_argument(
        "--color",
        choices=list(COLORS),
        default="auto",
        help="letters mark experts where there are no colours",
    )
    parser.add_argument("--no-prompt", action="store_true", help="print the responses only")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the paths of what was written")
    add_flags(parser)
    arguments = parser.parse_args(argv)
    check(parser, arguments)
    folders = [path for path in map(Path, arguments.traces) if path.is_dir()]
    if folders:
        if len(folders) != len(arguments.traces) or arguments.html is not None:
            parser.error("folders of checkpoints are described alone: leave traces and --html out")
        print(*map(description, folders), sep="\n\n")
        return 0
    if arguments.open == "yes" and arguments.html is None:
        raise ValueError("open='yes': there is no page to open; write one with --html FILE")
    target, color = console(arguments.color), COLORS[arguments.color]
    live = arguments.url is not None and not arguments.quiet and (has_color(target) if color is None else color)
    if arguments.url is not None:
        traces = [ask(arguments, target if live else None)]
    else:
        traces = [trace for path in arguments.traces for trace in load(path)]
    if not arguments.quiet and not live:
        print_traces(traces, target, color=color, prompt=not arguments.no_prompt)
    written = []
    if arguments.routing is not None:
        written.append(dump(arguments.routing, traces))
    if arguments.html is not None:
        written.append(page := write_page(arguments.html, traces, title=arguments.title))
    if written:
        print(*([] if arguments.quiet else [""]), *written, sep="\n")
    if arguments.open == "yes":
        webbrowser.open(page.resolve().as_uri())
    return 0


def console(color: str) -> Console:
    """Standard output as a console; with ``color="always"`` it has colours even where it is no terminal."""
    from rich.console import Console

    if color == "always":
        return Console(highlight=False, color_system="truecolor", force_terminal=True, no_color=False)
    return Console(highlight=False)
