"""``fusionroute show``: a routing trace in the terminal, and as a self-contained HTML page."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from ebpo_core.traces.page import DEFAULT_TITLE, write_page
from ebpo_core.traces.show import print_traces
from ebpo_core.traces.trace import load

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

COLORS = {"auto": None, "always": True, "never": False}


def main(argv: Sequence[str]) -> int:
    """Parse ``TRACE... [--html FILE]``, print, and write the page."""
    parser = argparse.ArgumentParser(prog="fusionroute show", description=__doc__, allow_abbrev=False)
    parser.add_argument("traces", nargs="+", metavar="TRACE", help="JSON or JSON Lines, e.g. of generate --routing")
    parser.add_argument("--html", type=Path, help="write the page to this file")
    parser.add_argument(
        "--open", choices=["yes", "no"], default="no", help="open the page in the browser (default: no)"
    )
    parser.add_argument("--title", default=DEFAULT_TITLE, help="of the page")
    parser.add_argument("--color", choices=list(COLORS), default="auto", help="letters mark experts without colours")
    parser.add_argument("--no-prompt", action="store_true", help="print the responses only")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the page's path")
    arguments = parser.parse_args(argv)
    if arguments.open == "yes" and arguments.html is None:
        raise ValueError("open='yes': which page? Name its file with --html")
    traces = [trace for path in arguments.traces for trace in load(path)]
    if not arguments.quiet:
        print_traces(traces, console(arguments.color), color=COLORS[arguments.color], prompt=not arguments.no_prompt)
    if arguments.html is not None:
        page = write_page(arguments.html, traces, title=arguments.title)
        print(f"{'' if arguments.quiet else chr(10)}{page}")
        if arguments.open == "yes":
            webbrowser.open(page.resolve().as_uri())
    return 0


def console(color: str) -> Console:
    """Standard output; with colours though it is no terminal where ``color`` is "always"."""
    from rich.console import Console

    if color == "always":
        return Console(highlight=False, color_system="truecolor", force_terminal=True, no_color=False)
    return Console(highlight=False)
