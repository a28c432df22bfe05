"""A trace in the terminal: colours, letters without colours, and texts that try to steer the terminal."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("transformers")

from fusionroute_traces import HOSTILE, example, trace_of, traces
from hypothesis import given
from hypothesis import strategies as st
from rich.color import ColorType
from rich.console import Console

from ebpo_core.fusionroute.traces.palette import color_of, letter_of, visible
from ebpo_core.fusionroute.traces.show import has_color, print_traces, render_legend, render_response
from ebpo_core.fusionroute.traces.trace import RoutedToken, RoutingTrace

SGR = re.compile(r"\x1b\[[0-9;]*m")


def console(width: int = 80, **environment: str) -> Console:
    """A console on a terminal of this environment that writes into a string."""
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, _environ={"TERM": "xterm-256color", **environment}
    )


def written(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def steering(text: str) -> list[str]:
    """Characters that a terminal or a bidirectional layout would obey."""
    return [
        character
        for character in text
        if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") and character not in "\n\t\u200c\u200d"
    ]


def test_each_token_has_the_background_of_its_expert_and_overruled_ones_are_underlined() -> None:
    trace = example()
    text = render_response(trace)
    assert text.plain == trace.text
    position = 0
    for token in trace.tokens:
        for offset in range(position, position + len(token.text or "")):
            style = text.get_style_at_offset(console(), offset)
            assert style.bgcolor is not None
            assert style.bgcolor.type is ColorType.TRUECOLOR
            assert style.bgcolor.name == color_of(token.expert)
            assert bool(style.underline) == token.overruled
        position += len(token.text or "")


def test_letters_stand_where_another_expert_takes_over() -> None:
    assert render_response(example(), color=False).plain == "[C]The[A] sum{ is}[C]\n[B]x = 1[C] done."


def test_an_overruled_token_without_text_leaves_no_empty_braces() -> None:
    assert render_response(trace_of([("a", 0, False), ("", 0, True)]), color=False).plain == "[A]a"


def test_tokens_that_nobody_decoded_show_their_ids() -> None:
    trace = RoutingTrace(("a",), (RoutedToken(7, 0, 1.0, False), RoutedToken(8, 0, 1.0, True)))
    assert render_response(trace).plain == "<7><8>"
    assert render_response(trace, color=False).plain == "[A]<7>{<8>}"


def test_the_legend_has_the_trace_s_numbers() -> None:
    lines = render_legend(example()).plain.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["A", "math", "2", "tokens", "28.6%", "1", "overruled"],
        ["B", "code", "2", "tokens", "28.6%", "1", "overruled"],
        ["C", "chat", "3", "tokens", "42.9%", "0", "overruled"],
    ]
    assert lines[3].startswith("7 tokens, 4 switches, 28.6% overruled (underlined)")
    assert render_legend(example(), color=False).plain.startswith("[A] math")


def test_an_empty_response_has_a_legend_without_shares() -> None:
    lines = render_legend(RoutingTrace(("a",))).plain.splitlines()
    assert lines[0].split() == ["A", "a", "0", "tokens", "-", "0", "overruled"]


def test_an_expert_keeps_its_colour_and_letter_from_trace_to_trace() -> None:
    first, second = trace_of([("x", 0, False)], ("a", "b")), trace_of([("y", 0, False)], ("b", "c"))
    target = console()
    print_traces([first, second], target, color=False)
    assert "[A]x" in written(target)
    assert "[B]y" in written(target)
    assert "[C] c" in written(target)
    with pytest.raises(ValueError, match=r"names=\['a'\]: \['b'\]"):
        render_response(first, names=["a"])


# ---------------------------------------------------------------------------------------------------------- terminals


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"TERM": "xterm-16color"}, True)],
)
def test_colours_only_where_they_are_wanted_and_there(environment: dict[str, str], expected: bool) -> None:
    target = console(**environment)
    assert has_color(target) is expected
    print_traces(example(), target)
    assert bool(SGR.search(written(target))) is expected
    assert ("[C]The[A] sum{ is}" in written(target)) is not expected


def test_no_colours_in_a_pipe(tmp_path: Path) -> None:
    code = (
        "from ebpo_core.fusionroute.traces.show import print_traces\n"
        "from ebpo_core.fusionroute.traces.trace import RoutedToken, RoutingTrace\n"
        "print_traces(RoutingTrace(('a',), (RoutedToken(1, 0, 1.0, False, 'caf\\u00e9 ' * 40),)))"
    )
    # Not at the root of the repository, whose folder `kernels` would hide Hugging Face's package of that name.
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True, env={"PYTHONIOENCODING": "ascii"}
    )
    lines = done.stdout.decode("ascii").splitlines()
    assert lines[0] == "[A]" + r"caf\xe9 " * 40, "not broken into lines, and written out where the encoding lacks it"


def test_prompts_are_printed_unless_told_otherwise() -> None:
    trace = RoutingTrace(("a",), (), "What?\x1b[2J", "")
    for prompt in (True, False):
        target = console()
        print_traces(trace, target, prompt=prompt)
        assert ("What?\\x1b[2J" in written(target)) is prompt


# ---------------------------------------------------------------------------------------------------------- hostile


def test_hostile_texts_are_shown_and_not_obeyed() -> None:
    trace = trace_of([(text, index % 2, index % 3 == 0) for index, text in enumerate(HOSTILE)])
    for color in (True, False):
        target = console(width=2000)
        print_traces(trace, target, color=color)
        output = written(target)
        assert not steering(SGR.sub("", output))
        assert "[bold red]markup[/bold red] [link=https://example.com]x[/link]" in SGR.sub("", output)
        assert r"\x1b[31mred\x1b]0;title\x07\x1b[2J\x9b31m\x0d\x08\x7f" in SGR.sub("", output)
        assert r"\u202eright to left\u202c\u2028line\u2029" in SGR.sub("", output)
        assert "\x1b[31m" not in output.replace(r"\x1b[31m", "")


@given(trace=traces(), color=st.booleans(), width=st.integers(20, 120))
def test_no_text_and_no_name_steers_the_terminal(trace: RoutingTrace, color: bool, width: int) -> None:
    target = console(width=width)
    print_traces(trace, target, color=color)
    assert not steering(SGR.sub("", written(target)))
    assert color or "\x1b" not in written(target)


@given(trace=traces())
def test_the_response_is_the_text_with_its_controls_written_out(trace: RoutingTrace) -> None:
    assert render_response(trace).plain == visible(trace.text or "")


@given(text=st.text())
def test_visible_keeps_everything_else(text: str) -> None:
    shown = visible(text)
    assert not steering(shown)
    if not steering(text):
        assert shown == text
    assert visible(text, "ascii").isascii()


def test_joined_emoji_stay_whole() -> None:
    assert visible("👩‍👩‍👧 ✔️") == "👩‍👩‍👧 ✔️"


def test_letters_and_colours_are_distinct_however_many_experts() -> None:
    assert [letter_of(index) for index in (0, 25, 26, 27, 701, 702)] == ["A", "Z", "AA", "AB", "ZZ", "AAA"]
    assert len({color_of(index) for index in range(40)}) == 40
    assert all(re.fullmatch("#[0-9a-f]{6}", color_of(index)) for index in range(40))
