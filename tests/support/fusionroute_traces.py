"""Traces and tokenizers for the tests of what shows a routing trace: built here, no model, no hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from ebpo_core.fusionroute.traces.trace import RoutedToken, RoutingTrace

if TYPE_CHECKING:
    from collections.abc import Sequence

HOSTILE = (
    "</script><script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "<!-- <script>",
    "]]>",
    "&lt;b&gt;",
    "'\" onmouseover=alert(1) x='",
    "</style><style>*{display:none}</style>",
    "${7*7}{{7*7}}<%= 1 %>",
    "[bold red]markup[/bold red] [link=https://example.com]x[/link]",
    "\x1b[31mred\x1b]0;title\x07\x1b[2J\x9b31m\r\x08\x7f",
    "\u202eright to left\u202c\u2028line\u2029",
)


# What the page itself is made of; anything more was smuggled in by a text.
PAGE_ELEMENTS = {
    *("html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "p", "span", "u", "main", "section"),
    *("details", "summary", "div", "ul", "li", "button", "i", "label", "input", "kbd", "noscript", "footer"),
    *("b", "code", "dl", "dt", "dd", "script"),
}


def trace_of(pieces: Sequence[tuple[str | None, int, bool]], experts: Sequence[str] = ("math", "code")) -> RoutingTrace:
    """A trace of (text, expert, overruled) triples; ids count up and weights differ from token to token."""
    tokens = tuple(
        RoutedToken(
            id=100 + index, expert=expert, weight=round(1 / (1 + index % 7 / 4), 4), overruled=overruled, text=text
        )
        for index, (text, expert, overruled) in enumerate(pieces)
    )
    texts = [text for text, _, _ in pieces]
    return RoutingTrace(tuple(experts), tokens, text=None if None in texts else "".join(map(str, texts)))


def hostile() -> RoutingTrace:
    """Every text that a page takes is hostile here: tokens, prompt and names."""
    tokens = trace_of([(text, index % 2, index % 3 == 0) for index, text in enumerate(HOSTILE)]).tokens
    text = "".join(HOSTILE)
    return RoutingTrace((f"math{HOSTILE[0]}", f"{HOSTILE[1]}{HOSTILE[5]}"), tokens, text, text)


def example() -> RoutingTrace:
    """Seven tokens of three experts: four switches, two overruled, a newline, and a token without text."""
    pieces = [
        ("The", 2, False),
        (" sum", 0, False),
        (" is", 0, True),
        ("\n", 2, False),
        ("x = 1", 1, False),
        ("", 1, True),
        (" done.", 2, False),
    ]
    return trace_of(pieces, ("math", "code", "chat"))


@st.composite
def traces(draw: Any, texts: st.SearchStrategy[str] | None = None) -> RoutingTrace:
    """Any trace with texts: unusual characters, markup and control sequences among them."""
    names = draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5, unique=True))
    piece = texts if texts is not None else st.one_of(st.text(max_size=6), st.sampled_from(HOSTILE))
    index = st.integers(0, len(names) - 1)
    rows = draw(st.lists(st.tuples(st.integers(0, 10**6), index, st.floats(0, 1), st.booleans(), piece), max_size=12))
    tokens = tuple(RoutedToken(*row) for row in rows)
    prompt = draw(st.none() | st.text(max_size=12))
    return RoutingTrace(tuple(names), tokens, prompt, "".join(row[4] for row in rows))


SPECIAL = {"eos_token": "<eos>", "pad_token": "<pad>"}


def byte_tokenizer() -> Any:
    """Byte-level BPE without merges but "the" and one across characters: most tokens are single bytes."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    merges = [("t", "h"), ("th", "e")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def fallback_tokenizer() -> Any:
    """SentencePiece's way as Llama 2 and Gemma have it: spaces are U+2581, unknown characters are `<0xE4>` bytes."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import Metaspace
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefgh", "\u2581a", "\u2581b"]
    vocabulary = {word: index for index, word in enumerate(words)}
    model = BPE(vocabulary, [("\u2581", "a"), ("\u2581", "b")], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
