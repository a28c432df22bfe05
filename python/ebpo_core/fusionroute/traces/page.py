"""Responses as one self-contained HTML page, each token coloured by its expert, with details on hover and focus.

The page asks nothing of the network: style and script are inside, and its content security policy allows those two by
their hashes and nothing else. Texts of a model enter as escaped text; the script reads them and never writes HTML.
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
from collections.abc import Sequence
from pathlib import Path

from ebpo_core.files import write_text
from ebpo_core.fusionroute.traces.palette import color_of, letter_of
from ebpo_core.fusionroute.traces.show import expert_names, percent, token_text
from ebpo_core.fusionroute.traces.trace import RoutedToken, RoutingTrace

DEFAULT_TITLE = "FusionRoute: which expert wrote which token"

_DIRECTIONS = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_UNDECODED = ' data-t="id"'
_SHADES = (0.4, 0.55, 0.7, 0.85)
_FOLDER = Path(__file__).parent
_POLICY = "default-src 'none'; style-src {style}; script-src {script}; base-uri 'none'; form-action 'none'"
_ABOUT = (
    'Each token has the colour of the expert that the router selected for it, <span class="pale">paler</span> where '
    "the router gave that expert less weight. <u>Underlined</u> tokens were overruled: they are not the expert's own "
    "first choice. Hover or focus a token for details; select an expert to see its tokens alone."
)
_TIP = (
    '<div id="tip" role="tooltip" hidden><p><span data-part="letter"></span><b data-part="expert"></b></p>'
    '<code data-part="text"></code><dl><dt>weight</dt><dd data-part="weight"></dd>'
    '<dt>overruled</dt><dd data-part="overruled"></dd><dt>token id</dt><dd data-part="id"></dd>'
    '<dt>position</dt><dd data-part="place"></dd></dl></div>'
)


def render_page(traces: RoutingTrace | Sequence[RoutingTrace], *, title: str = DEFAULT_TITLE) -> str:
    """The page's HTML.

    The text content of each ``.response`` is the response, character by character, but for NUL, which HTML cannot hold
    and which shows as U+2400. A token that nobody decoded shows as ``<id>``. Marks for newlines and for tokens without
    text are drawn by the style sheet and are not copied with the text.

    Args:
        traces: One or several; an expert has the same colour in all of them.
        title: The page's title.

    Raises:
        ValueError: No trace.
    """
    several = [traces] if isinstance(traces, RoutingTrace) else list(traces)
    if not several:
        raise ValueError("traces=[]: expected at least one")
    names = expert_names(several)
    style = (_FOLDER / "page.css").read_text(encoding="utf-8") + _colors(several, names)
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    policy = _POLICY.format(style=_hash(style), script=_hash(script))
    sections = "\n".join(_section(trace, index, len(several), names) for index, trace in enumerate(several))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{_text(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f'<header><h1>{_text(title)}</h1><p class="about">{_ABOUT}</p></header>\n<main>\n{sections}\n</main>\n'
        "<noscript><footer>Details and spotlights need JavaScript.</footer></noscript>\n"
        f"{_TIP}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def write_page(
    path: str | os.PathLike[str], traces: RoutingTrace | Sequence[RoutingTrace], *, title: str = DEFAULT_TITLE
) -> Path:
    """Write :func:`render_page` to ``path``, whose folder is made if missing; returns the path."""
    target = Path(path)
    content = render_page(traces, title=title)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, content)
    return target


def _section(trace: RoutingTrace, index: int, total: int, names: Sequence[str]) -> str:
    places = [names.index(name) for name in trace.experts]
    heading = f"Response {index + 1} of {total}" if total > 1 else "Response"
    prompt = ""
    if trace.prompt:
        # Long prompts start folded: the response is what the page is for.
        opened = " open" if len(trace.prompt) <= 600 and trace.prompt.count("\n") < 12 else ""
        prompt = (
            f'<details class="prompt"{opened}><summary>Prompt</summary><div dir="auto">{_text(trace.prompt)}</div>'
            "</details>\n"
        )
    facts = f"{len(trace.tokens):,} tokens, {trace.switches:,} switches between experts, first token to last"
    return (
        f'<section class="trace" id="r{index}" aria-label="{heading}">\n'
        + (f"<h2>{heading}</h2>\n" if total > 1 else "")
        + f"{prompt}{_legend(trace, places)}\n"
        f'<div class="ribbon" role="img" aria-label="Expert of each token, {facts}"></div>\n'
        f'<p class="facts">{facts}</p>\n'
        f'<div class="response" role="group" dir="auto" aria-label="{heading}, token by token">'
        f"{_tokens(trace, places)}</div>\n"
        '<div class="options"><label><input type="checkbox"> letters at switches</label>'
        "<span><kbd>&larr;</kbd> <kbd>&rarr;</kbd> token, <kbd>&uarr;</kbd> <kbd>&darr;</kbd> switch</span></div>\n"
        "</section>"
    )


def _legend(trace: RoutingTrace, places: Sequence[int]) -> str:
    items = []
    for place, name, count, share in zip(
        places, trace.experts, trace.counts.values(), trace.shares.values(), strict=True
    ):
        items.append(
            f'<li><button type="button" aria-pressed="false" class="e{place}" data-e="{place}">'
            f'<span class="key">{letter_of(place)}</span><span class="name">{_text(name)}</span>'
            f'<span class="num">{percent(share)} &middot; {count:,} tokens</span></button></li>'
        )
    overruled = sum(token.overruled for token in trace.tokens)
    items.append(
        '<li><button type="button" aria-pressed="false" data-e="o"><span class="key o">ab</span>'
        f'<span class="name">overruled</span><span class="num">{percent(trace.overruled_share)} &middot; '
        f"{overruled:,} tokens</span></button></li>"
    )
    return f'<ul class="legend" aria-label="Experts">{"".join(items)}</ul>'


def _tokens(trace: RoutingTrace, places: Sequence[int]) -> str:
    pieces = []
    before = None
    for index, token in enumerate(trace.tokens):
        place = places[token.expert]
        classes = f"t e{place} w{_shade(token.weight)}"
        if token.overruled:
            classes += " o"
        if place != before:
            classes += " s"
        if token.text == "":
            classes += " z"
        elif not _DIRECTIONS.isdisjoint(token_text(token)):
            classes += " d"
        before = place
        pieces.append(
            f'<span class="{classes}" tabindex="{0 if index == 0 else -1}" data-e="{place}" '
            f'data-l="{letter_of(place)}" data-i="{token.id}" data-w="{token.weight:.6g}"'
            f"{_UNDECODED if token.text is None else ''}>{_token_html(token)}</span>"
        )
    return "".join(pieces)


def _token_html(token: RoutedToken) -> str:
    return _text(token_text(token)).replace("\n", '<i class="n" aria-hidden="true"></i>\n')


def _shade(weight: float) -> int:
    """One of five shades, from pale (0) to full (4)."""
    return sum(weight >= limit for limit in _SHADES)


def _colors(traces: Sequence[RoutingTrace], names: Sequence[str]) -> str:
    """The rules that depend on the data. They are in the style sheet since the policy refuses style attributes."""
    rules = [f".e{place}{{--c:{color_of(place)}}}" for place in range(len(names))]
    for index, trace in enumerate(traces):
        stops = []
        start = 0
        for end in range(1, len(trace.tokens) + 1):
            if end == len(trace.tokens) or trace.tokens[end].expert != trace.tokens[start].expert:
                color = color_of(names.index(trace.experts[trace.tokens[start].expert]))
                stops.append(f"{color} {100 * start / len(trace.tokens):.4g}% {100 * end / len(trace.tokens):.4g}%")
                start = end
        if stops:
            rules.append(f"#r{index} .ribbon{{background:linear-gradient(90deg,{','.join(stops)})}}")
    return "\n" + "\n".join(rules) + "\n"


def _hash(source: str) -> str:
    """A content security policy's source for exactly this text of a ``style`` or ``script`` element."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode('utf-8')).digest()).decode('ascii')}'"


def _text(text: str) -> str:
    """Text as HTML, safe between tags and in quoted attributes; a carriage return is not read as a newline."""
    return html.escape(text, quote=True).replace("\r", "&#13;").replace("\0", "\u2400")
