"""The HTML page as a parser reads it: every text stays text, and the policy allows nothing but the page's own parts."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("transformers")

from fusionroute_traces import PAGE_ELEMENTS, example, hostile, traces
from hypothesis import given

from ebpo_core.fusionroute.traces.page import render_page, write_page
from ebpo_core.fusionroute.traces.trace import RoutingTrace


class Reader(HTMLParser):
    """Counts elements, collects attributes, and reads the text in each ``.response``."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.responses: list[str] = []
        self.depth = 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        if dict(attrs).get("class") == "response":
            self.depth = 1
            self.responses.append("")
        elif self.depth and tag not in ("input", "meta"):
            self.depth += 1

    def handle_endtag(self, tag: str) -> None:
        self.depth -= self.depth > 0

    def handle_data(self, data: str) -> None:
        if self.depth:
            self.responses[-1] += data


@given(trace=traces())
def test_any_text_stays_text(trace: RoutingTrace) -> None:
    reader = Reader(render_page(trace, title=trace.text or ""))
    assert set(reader.elements) <= PAGE_ELEMENTS
    assert reader.elements["script"] == reader.elements["style"] == 1
    assert not [name for name in reader.attributes if name.startswith("on") or name in ("style", "src", "href")]
    assert reader.responses == [(trace.text or "").replace("\0", "\u2400")]


def test_the_policy_allows_the_page_s_own_style_and_script_and_nothing_else() -> None:
    page = render_page([example(), hostile()])
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    directives = dict(part.strip().split(" ", 1) for part in policy.group(1).split(";"))
    assert directives.pop("style-src").startswith("'sha256-")
    assert directives.pop("script-src").startswith("'sha256-")
    assert set(directives) == {"default-src", "base-uri", "form-action"}
    assert set(directives.values()) == {"'none'"}
    assert page.index("Content-Security-Policy") < page.index("<title>"), "it guards what comes after it"


def test_pages_need_a_trace_and_make_their_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        render_page([])
    path = write_page(tmp_path / "a" / "page.html", example(), title="Mine & yours")
    assert path.read_text(encoding="utf-8") == render_page([example()], title="Mine & yours")
    assert "<title>Mine &amp; yours</title>" in path.read_text(encoding="utf-8")
