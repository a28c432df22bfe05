"""The HTML page in a real headless browser: what is seen, what the keyboard reaches, and what stays inert."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import headless
import pytest

pytest.importorskip("rich")
pytest.importorskip("transformers")

from fusionroute_traces import HOSTILE, PAGE_ELEMENTS, example, hostile, trace_of, traces
from hypothesis import given

from ebpo_core.fusionroute.traces.page import write_page
from ebpo_core.fusionroute.traces.trace import RoutedToken, RoutingTrace

FAILURES = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Page.javascriptDialogOpening")


def test_a_missing_browser_skips_or_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(headless, "_PLACES", ())
    monkeypatch.delenv(headless.REQUIRE, raising=False)
    with pytest.raises(pytest.skip.Exception):
        headless.require_browser()
    monkeypatch.setenv(headless.REQUIRE, "1")
    with pytest.raises(pytest.fail.Exception, match="apt install chromium"):
        headless.require_browser()


@pytest.fixture(scope="module")
def new_tab() -> Iterator[Callable[[], headless.Page]]:
    with headless.browser(headless.require_browser()) as new:
        yield new


@pytest.fixture
def shown(new_tab: Callable[[], headless.Page], tmp_path: Path) -> Iterator[Callable[..., headless.Page]]:
    """Shows traces in a tab of their own; afterwards nothing may have been fetched, logged, thrown or asked."""
    tabs = []

    def show(*several: RoutingTrace, **options: Any) -> headless.Page:
        tab = new_tab()
        tab.call("Emulation.setDeviceMetricsOverride", width=1000, height=800, deviceScaleFactor=1, mobile=False)
        path = write_page(tmp_path / f"page{len(tabs)}.html", several, **options)
        tabs.append((tab, path))
        tab.open(path)
        return tab

    yield show
    for tab, path in tabs:
        tab.evaluate("new Promise((done) => setTimeout(done, 50))")
        assert [tab.named(event) for event in FAILURES] == [[], [], [], []]
        assert [event["request"]["url"] for event in tab.named("Network.requestWillBeSent")] == [path.as_uri()]


def tip(tab: headless.Page) -> dict[str, str] | None:
    """The details on show, by their names; None while there are none."""
    content: dict[str, str] | None = tab.evaluate(
        "(() => { const tip = document.getElementById('tip');"
        " if (getComputedStyle(tip).display === 'none') return null;"
        " const parts = [...tip.querySelectorAll('[data-part]')];"
        " return Object.fromEntries(parts.map((part) => [part.dataset.part, part.textContent])) })()"
    )
    return content


def center(tab: headless.Page, selector: str) -> tuple[float, float]:
    x, y = tab.evaluate(
        f"(() => {{ const box = document.querySelector({selector!r}).getBoundingClientRect();"
        " return [box.x + box.width / 2, box.y + box.height / 2] })()"
    )
    return x, y


def test_tokens_have_their_texts_colours_and_marks(shown: Callable[..., headless.Page]) -> None:
    trace = example()
    tab = shown(trace)
    tokens = tab.evaluate(
        "[...document.querySelectorAll('.response .t')].map((t) => [t.textContent, Number(t.dataset.e),"
        " Number(t.dataset.i), getComputedStyle(t).textDecorationLine === 'underline',"
        " getComputedStyle(t).backgroundColor])"
    )
    assert [token[:4] for token in tokens] == [[t.text, t.expert, t.id, t.overruled] for t in trace.tokens]
    assert tab.evaluate("document.querySelector('.response').textContent") == trace.text
    colors: dict[tuple[int, int], str] = {}
    for token, (*_, color) in zip(trace.tokens, tokens, strict=True):
        shade = sum(token.weight >= limit for limit in (0.4, 0.55, 0.7, 0.85))
        assert colors.setdefault((token.expert, shade), color) == color
    assert len(set(colors.values())) == len(colors) == 6, "another expert or clearly another weight, another colour"


def test_newlines_and_spaces_are_seen_and_kept(shown: Callable[..., headless.Page]) -> None:
    trace = trace_of([("  a\n\n", 0, False), ("\tb  c", 1, False), ("", 1, False), ("\n", 0, False)])
    tab = shown(trace)
    assert tab.evaluate("getComputedStyle(document.querySelector('.response')).whiteSpaceCollapse") == "preserve"
    marks = tab.evaluate(
        "[...document.querySelectorAll('.response .n, .response .z')]"
        ".map((m) => getComputedStyle(m, '::before').content)"
    )
    assert marks == ['"↵"', '"↵"', '"·"', '"↵"']
    selected = tab.evaluate(
        "(() => { getSelection().selectAllChildren(document.querySelector('.response'));"
        " return getSelection().toString() })()"
    )
    assert selected.replace("\u00a0", " ").rstrip("\n") == (trace.text or "").rstrip("\n"), "what a reader copies"


def test_the_legend_has_shares_and_counts_and_spotlights(shown: Callable[..., headless.Page]) -> None:
    tab = shown(example())
    assert tab.evaluate("[...document.querySelectorAll('.legend button')].map((b) => b.textContent)") == [
        "Amath28.6% · 2 tokens",
        "Bcode28.6% · 2 tokens",
        "Cchat42.9% · 3 tokens",
        "aboverruled28.6% · 2 tokens",
    ]
    assert "7 tokens, 4 switches" in tab.evaluate("document.querySelector('.facts').textContent")
    lit = (
        "[...document.querySelectorAll('.t')].map((t, n) => t.classList.contains('dim') ? -1 : n).filter((n) => n >= 0)"
    )
    expected = {'[data-e="1"]': [4, 5], '[data-e="o"]': [2, 5], '[data-e="0"]': [1, 2]}
    for selector, tokens in expected.items():
        tab.pointer(*center(tab, f".legend {selector}"), click=True)
        assert tab.evaluate(lit) == tokens
        pressed = tab.evaluate("[...document.querySelectorAll('[aria-pressed=true]')].map((b) => b.dataset.e)")
        assert [f'[data-e="{value}"]' for value in pressed] == [selector]
    tab.pointer(*center(tab, '.legend [data-e="0"]'), click=True)
    assert tab.evaluate(lit) == list(range(7))


def test_hovering_a_token_shows_its_details(shown: Callable[..., headless.Page]) -> None:
    trace = example()
    tab = shown(trace)
    assert tip(tab) is None
    tab.pointer(*center(tab, ".t:nth-of-type(3)"))
    assert tip(tab) == {
        "letter": "A",
        "expert": "math",
        "text": '" is"',
        "weight": f"{100 * trace.tokens[2].weight:.1f}%",
        "overruled": "yes, not the expert's first choice",
        "id": "102",
        "place": "3 of 7",
    }
    tab.pointer(*center(tab, ".t:nth-of-type(7)"))
    content = tip(tab)
    assert content is not None
    assert (content["letter"], content["text"], content["overruled"]) == ("C", '" done."', "no")
    inside = tab.evaluate(
        "(() => { const b = document.getElementById('tip').getBoundingClientRect();"
        " return b.left >= 0 && b.top >= 0 && b.right <= innerWidth && b.bottom <= innerHeight })()"
    )
    assert inside is True
    tab.pointer(2, 2)
    assert tip(tab) is None


def test_the_keyboard_reaches_everything(shown: Callable[..., headless.Page]) -> None:
    tab = shown(RoutingTrace(example().experts, example().tokens, "A prompt", example().text), example())
    focus = (
        "(() => { const a = document.activeElement; return [a.tagName, a.dataset.e ?? null, a.dataset.i ?? null] })()"
    )
    seen = []
    for _ in range(14):
        tab.key("Tab")
        seen.append(tab.evaluate(focus))
    legend = [["BUTTON", expert, None] for expert in ("0", "1", "2", "o")]
    first = ["SPAN", "2", "100"]
    box = ["INPUT", None, None]
    assert seen[:7] == [["SUMMARY", None, None], *legend, first, box]
    assert seen[7:13] == [*legend, first, box], "one stop per response, however many tokens it has"
    tab.evaluate("document.querySelector('.t').focus()")
    content = tip(tab)
    assert content is not None
    assert content["place"] == "1 of 7"
    for key, place in [
        ("ArrowRight", "2 of 7"),
        ("ArrowRight", "3 of 7"),
        ("ArrowLeft", "2 of 7"),
        ("ArrowDown", "4 of 7"),
        ("ArrowDown", "5 of 7"),
        ("ArrowUp", "4 of 7"),
        ("End", "7 of 7"),
        ("ArrowRight", "7 of 7"),
        ("ArrowDown", "7 of 7"),
        ("Home", "1 of 7"),
        ("ArrowUp", "1 of 7"),
    ]:
        tab.key(key)
        content = tip(tab)
        assert content is not None
        assert (key, content["place"]) == (key, place)
        assert tab.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    tab.key("Escape")
    assert tip(tab) is None
    assert tab.evaluate("document.querySelectorAll('[aria-describedby]').length") == 1
    assert tab.evaluate("document.querySelectorAll('.response [tabindex=\"0\"]').length") == 2


def test_focus_scrolls_a_long_response_and_its_details_along(shown: Callable[..., headless.Page]) -> None:
    tab = shown(trace_of([(f"line {n}\n", n % 2, False) for n in range(200)]))
    tab.evaluate("document.querySelector('.t').focus()")
    tab.key("ArrowDown")
    tab.evaluate("new Promise((done) => setTimeout(done, 200))")
    assert tab.evaluate("scrollY") == 0, "the next switch is on the screen, and the key does nothing else"
    tab.key("End")
    tab.wait(lambda: tab.evaluate("scrollY") > 1000)
    tab.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    content = tip(tab)
    assert content is not None
    assert content["text"] == '"line 199\\n"'
    apart = tab.evaluate(
        "(() => { const t = document.activeElement.getBoundingClientRect();"
        " const b = document.getElementById('tip').getBoundingClientRect();"
        " return b.bottom < t.top ? t.top - b.bottom : b.top - t.bottom })()"
    )
    assert 0 <= apart < 40


def test_hostile_texts_are_inert(shown: Callable[..., headless.Page]) -> None:
    trace = hostile()
    tab = shown(trace, title=HOSTILE[0])
    assert tab.evaluate("document.querySelector('.response').textContent") == trace.text
    assert tab.evaluate("document.querySelector('.prompt div').textContent") == trace.prompt
    assert tab.evaluate("document.title") == HOSTILE[0]
    assert tab.evaluate("[...document.querySelectorAll('.legend .name')].map((n) => n.textContent)") == [
        *trace.experts,
        "overruled",
    ]
    names = tab.evaluate("[...document.querySelectorAll('*')].map((e) => e.localName)")
    assert set(names) <= PAGE_ELEMENTS
    assert names.count("script") == names.count("style") == 1
    attributes = tab.evaluate("[...new Set([...document.querySelectorAll('*')].flatMap((e) => e.getAttributeNames()))]")
    assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "href")]
    parts = tab.evaluate("document.querySelectorAll('#tip *').length")
    for index, token in enumerate(trace.tokens):
        tab.evaluate(f"document.querySelectorAll('.t')[{index}].focus()")
        content = tip(tab)
        assert content is not None
        assert content["expert"] == trace.experts[token.expert]
        assert tab.evaluate("document.querySelectorAll('#tip *').length") == parts
    tab.evaluate("document.querySelectorAll('.t')[9].focus()")
    content = tip(tab)
    assert content is not None
    assert content["text"].startswith(r'"\u{1b}[31mred\u{1b}]0;title\u{7}')


def test_a_token_that_turns_the_direction_of_text_does_not_turn_its_neighbours(
    shown: Callable[..., headless.Page],
) -> None:
    tab = shown(trace_of([("one ", 0, False), ("\u202etwo", 1, False), (" three", 0, False), (" four", 1, False)]))
    lefts = tab.evaluate("[...document.querySelectorAll('.t')].map((t) => t.getBoundingClientRect().left)")
    assert lefts == sorted(lefts)


def test_the_policy_holds(new_tab: Callable[[], headless.Page], tmp_path: Path) -> None:
    """Even a text that did become an element could run, load and send nothing."""
    tab = new_tab()
    tab.open(write_page(tmp_path / "page.html", example()))
    blocked = tab.evaluate(
        "new Promise((done) => { const seen = [];"
        " document.addEventListener('securitypolicyviolation', (event) => { seen.push(event.effectiveDirective) });"
        " const add = (name, key, value) => {"
        " const e = document.createElement(name); e[key] = value; document.body.append(e) };"
        " add('script', 'textContent', 'window.ran = true'); add('style', 'textContent', 'body{display:none}');"
        " add('img', 'src', 'http://127.0.0.1:9/x');"
        " fetch('http://127.0.0.1:9/y').catch(() => {});"
        " setTimeout(() => done([seen.sort(), window.ran ?? false, getComputedStyle(document.body).display]), 200) })"
    )
    assert blocked == [["connect-src", "img-src", "script-src-elem", "style-src-elem"], False, "block"]
    assert len(tab.named("Network.requestWillBeSent")) - len(tab.named("Network.loadingFailed")) == 1


def test_tokens_without_text_show_their_ids(shown: Callable[..., headless.Page]) -> None:
    tab = shown(RoutingTrace(("a",), (RoutedToken(7, 0, 0.5, False), RoutedToken(8, 0, 0.5, False))))
    assert tab.evaluate("document.querySelector('.response').textContent") == "<7><8>"
    tab.evaluate("document.querySelector('.t').focus()")
    content = tip(tab)
    assert content is not None
    assert (content["text"], content["id"]) == ("(not decoded)", "7")


def test_an_empty_response_has_a_page(shown: Callable[..., headless.Page]) -> None:
    tab = shown(RoutingTrace(("a", "b")), example())
    assert (
        tab.evaluate("document.querySelector('.legend').textContent")
        == "Aa- · 0 tokensBb- · 0 tokensaboverruled- · 0 tokens"
    )


def test_an_expert_keeps_its_colour_from_response_to_response(shown: Callable[..., headless.Page]) -> None:
    tab = shown(trace_of([("x", 1, False)], ("a", "b")), trace_of([("y", 0, False), ("z", 1, False)], ("b", "c")))
    colors = tab.evaluate("[...document.querySelectorAll('.t')].map((t) => getComputedStyle(t).backgroundColor)")
    assert tab.evaluate("[...document.querySelectorAll('h2')].map((h) => h.textContent)") == [
        "Response 1 of 2",
        "Response 2 of 2",
    ]
    keys = tab.evaluate("[...document.querySelectorAll('.legend')].map((l) => l.textContent.slice(0, 2))")
    assert keys == ["Aa", "Bb"]
    assert colors[0] == colors[1] != colors[2]


def test_letters_mark_the_switches_when_asked_for(shown: Callable[..., headless.Page]) -> None:
    tab = shown(example())
    letters = "[...document.querySelectorAll('.t')].map((t) => getComputedStyle(t, '::before').content)"
    assert "C" not in "".join(tab.evaluate(letters))
    tab.pointer(*center(tab, ".options input"), click=True)
    assert tab.evaluate(letters) == ['"C"', '"A"', "none", '"C"', '"B"', '"·"', '"C"']
    assert tab.evaluate("document.querySelector('.response').textContent") == example().text


def luminance(color: str) -> float:
    """Relative luminance (WCAG 2) of ``rgb(r, g, b)`` or ``color(srgb r g b)``."""
    numbers = [float(number) for number in re.findall(r"[\d.]+(?:e-?\d+)?", color.removeprefix("color(srgb"))[:3]]
    channels = numbers if "srgb" in color else [number / 255 for number in numbers]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_are_legible_in_light_and_dark(scheme: str, shown: Callable[..., headless.Page]) -> None:
    """A contrast of at least 4.5 (WCAG AA) for every expert at every shade, and for the page's own texts."""
    experts = tuple(f"expert {index}" for index in range(14))
    tokens = tuple(
        RoutedToken(1, expert, weight, False, "x") for expert in range(14) for weight in (0.3, 0.45, 0.6, 0.75, 0.9)
    )
    tab = shown(RoutingTrace(experts, tokens, "prompt"))
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    paper = luminance(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (paper > 0.5) is (scheme == "light")
    pairs = tab.evaluate(
        "(() => { const ground = (e) => { for (; e; e = e.parentElement) {"
        " const c = getComputedStyle(e).backgroundColor; if (c !== 'rgba(0, 0, 0, 0)') return c } };"
        " const texts = '.t, .key:not(.o), .num, .name, .facts, .about, .prompt div, .options, h1';"
        " return [...document.querySelectorAll(texts)]"
        ".map((e) => [e.className + ' ' + e.textContent, getComputedStyle(e).color, ground(e)]) })()"
    )
    assert len(pairs) > 100
    for name, ink, ground in pairs:
        dark, light = sorted((luminance(ink), luminance(ground)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ink, ground)


@given(trace=traces())
def _browser_shows(trace: RoutingTrace, collected: list[RoutingTrace]) -> None:
    collected.append(trace)


def test_any_texts_are_shown_as_they_are(shown: Callable[..., headless.Page]) -> None:
    """A hundred generated traces in one page: each response's text content is the response."""
    collected: list[RoutingTrace] = []
    _browser_shows(collected=collected)
    tab = shown(*collected)
    contents = tab.evaluate("[...document.querySelectorAll('.response')].map((r) => r.textContent)")
    assert contents == [(trace.text or "").replace("\0", "\u2400") for trace in collected]
