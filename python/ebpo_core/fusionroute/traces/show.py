"""A response in the terminal, its tokens coloured by the expert that was selected for them.

Where colours are not wanted or not there (``NO_COLOR``, a dumb terminal, a pipe, a file), letters mark the experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from ebpo_core.fusionroute.traces.palette import color_of, letter_of, visible
from ebpo_core.fusionroute.traces.trace import RoutedToken, RoutingTrace

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def print_traces(
    traces: RoutingTrace | Sequence[RoutingTrace],
    console: Console | None = None,
    *,
    color: bool | None = None,
    prompt: bool = True,
) -> None:
    """Print responses, each followed by its legend: tokens, share and overruled tokens of every expert.

    Args:
        traces: One or several; an expert has the same colour in all of them.
        console: Where to; standard output by default.
        color: Colours (True) or letters (False); None lets the console decide.
        prompt: Whether to print the prompts that the traces hold.
    """
    rich_console, _ = _rich()
    console = rich_console(highlight=False) if console is None else console
    several = [traces] if isinstance(traces, RoutingTrace) else list(traces)
    names = expert_names(several)
    if color is None:
        color = has_color(console)
    # A terminal gets lines broken at words; anything else gets the text as it is.
    as_is = not console.is_terminal
    for index, trace in enumerate(several):
        if index:
            console.print()
        for text in _parts(trace, index, len(several), names, color, prompt, console.encoding):
            console.print(text, soft_wrap=as_is)


def has_color(console: Console) -> bool:
    """True if colours are there and wanted: not with ``NO_COLOR``, on a dumb terminal, or without a terminal."""
    return console.color_system is not None and not console.no_color


def expert_names(traces: Sequence[RoutingTrace]) -> list[str]:
    """The names of all experts of all traces in order of appearance: an expert's place here decides its colour."""
    return list(dict.fromkeys(name for trace in traces for name in trace.experts))


def render_prompt(prompt: str, *, color: bool = True, encoding: str = "utf-8") -> list[Text]:
    """The prompt's heading, and its text with an empty line behind it."""
    _, text_type = _rich()
    heading = text_type("Prompt", style="bold" if color else "")
    return [heading, text_type(visible(prompt, encoding) + "\n", style="dim" if color else "")]


def render_response(
    trace: RoutingTrace, *, color: bool = True, names: Sequence[str] | None = None, encoding: str = "utf-8"
) -> Text:
    """The response alone as a rich ``Text``.

    With colours a token has its expert's background and is underlined where the router overruled the expert. Without,
    ``[A]`` stands wherever another expert takes over and ``{...}`` is around overruled tokens. A token that nobody
    decoded shows as ``<id>``; control characters show escaped, and nothing in a text is read as markup.

    Args:
        trace: The response.
        color: Colours or letters.
        names: All experts in the order that decides colours and letters; by default the trace's own.
        encoding: What the output can hold; other characters show escaped.
    """
    _, text_type = _rich()
    places = _places(trace, trace.experts if names is None else names)
    shown = text_type()
    for expert, run in groupby(trace.tokens, key=lambda token: token.expert):
        if not color:
            shown.append(f"[{letter_of(places[expert])}]")
        # Neighbours of one look are joined first: a combining character may be a token of its own.
        for overruled, tokens in groupby(run, key=lambda token: token.overruled):
            text = visible("".join(map(token_text, tokens)), encoding)
            if color:
                style = f"black on {color_of(places[expert])}" + (" underline" if overruled else "")
                shown.append(text, style=style)
            else:
                shown.append(f"{{{text}}}" if overruled and text else text)
    return shown


def render_legend(
    trace: RoutingTrace, *, color: bool = True, names: Sequence[str] | None = None, encoding: str = "utf-8"
) -> Text:
    """A line per expert (tokens, share, how many of its tokens were overruled) and one for the whole response."""
    _, text_type = _rich()
    names = trace.experts if names is None else names
    places = _places(trace, names)
    labels = [visible(name, encoding).replace("\n", "\\n").replace("\t", "\\t") for name in trace.experts]
    width = max(map(len, labels))
    legend = text_type()
    for index, (label, count, share) in enumerate(
        zip(labels, trace.counts.values(), trace.shares.values(), strict=True)
    ):
        letter = letter_of(places[index])
        if color:
            legend.append(f" {letter} ", style=f"black on {color_of(places[index])}")
        else:
            legend.append(f"[{letter}]")
        overruled = sum(token.overruled for token in trace.tokens if token.expert == index)
        legend.append(f" {label:<{width}}  {count:>6,} tokens  {percent(share):>6}  {overruled:>5,} overruled\n")
    mark = "underlined" if color else "in {braces}"
    legend.append(
        f"{len(trace.tokens):,} tokens, {trace.switches:,} switches, "
        f"{percent(trace.overruled_share)} overruled ({mark}): not the expert's own first choice"
    )
    return legend


def token_text(token: RoutedToken) -> str:
    """The token's text; its id in angle brackets where nobody decoded it."""
    return f"<{token.id}>" if token.text is None else token.text


def percent(share: float) -> str:
    """A share as "12.3%"; a dash for NaN, the share of nothing."""
    return "-" if math.isnan(share) else f"{100 * share:.1f}%"


def _parts(
    trace: RoutingTrace, index: int, total: int, names: list[str], color: bool, prompt: bool, encoding: str
) -> list[Text]:
    _, text_type = _rich()
    parts = []
    if total > 1:
        parts.append(text_type(f"Response {index + 1} of {total}", style="bold" if color else ""))
    if prompt and trace.prompt:
        parts += render_prompt(trace.prompt, color=color, encoding=encoding)
    parts.append(render_response(trace, color=color, names=names, encoding=encoding))
    parts.append(text_type())
    parts.append(render_legend(trace, color=color, names=names, encoding=encoding))
    return parts


def _places(trace: RoutingTrace, names: Sequence[str]) -> list[int]:
    """The places of the trace's experts in ``names``."""
    order = {name: place for place, name in enumerate(names)}
    missing = [name for name in trace.experts if name not in order]
    if missing:
        raise ValueError(f"names={list(names)!r}: {missing!r} of the trace's experts are missing")
    return [order[name] for name in trace.experts]


def _rich() -> tuple[type[Console], type[Text]]:
    try:
        from rich.console import Console
        from rich.text import Text
    except ModuleNotFoundError as error:
        message = 'showing a trace in the terminal needs rich: pip install "ebpo-core[fusionroute]"'
        raise ModuleNotFoundError(message, name=error.name) from error
    return Console, Text
