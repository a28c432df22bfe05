"""The signs of an expert in pictures: a colour, a letter, and model text made safe to look at."""

from __future__ import annotations

import colorsys
import math
import unicodedata

# Paul Tol's "light" scheme: distinct for colour-blind eyes and light enough for black text.
_COLORS = ("#77aadd", "#ee8866", "#bbcc33", "#ffaabb", "#44bb99", "#eedd88", "#99ddff", "#aaaa00", "#bb99dd")
_GOLDEN = (math.sqrt(5) - 1) / 2

# Joiners hold emoji and Indic words together and move nothing, unlike the other invisible format characters.
_HARMLESS = {"\n", "\t", "\u200c", "\u200d"}
_CATEGORIES = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def color_of(index: int) -> str:
    """The colour of expert ``index`` as ``#rrggbb``: always the same one, under black text."""
    if index < len(_COLORS):
        return _COLORS[index]
    red, green, blue = colorsys.hls_to_rgb((index * _GOLDEN) % 1.0, 0.72, 0.55)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def letter_of(index: int) -> str:
    """The letter of expert ``index``: A to Z, then AA, AB, and so on."""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("A") + rest) + letters
    return letters


def visible(text: str, encoding: str = "utf-8") -> str:
    """``text`` with what could steer a terminal or reorder a line written out, as ``\\x1b`` or ``\\u202e``.

    Those are control characters but newline and tab, format characters (direction marks, zero-width ones) but joiners,
    and Unicode's line separators. What ``encoding`` cannot hold is written out too.
    """
    shown = "".join(
        character
        if character in _HARMLESS or unicodedata.category(character) not in _CATEGORIES
        else _escape(character)
        for character in text
    )
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
