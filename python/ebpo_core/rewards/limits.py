"""Limits by which answers are refused unread: those too long, too deep or too large to be worth a worker's time.

The limits are far above what answers of competition problems need (the longest of MATH-500 has 159 characters;
exponents such as 2024 are common). They only save time: an answer that passes them and is still slow meets the worker's
hard limit.
"""

from __future__ import annotations

import math
import re

MAX_LENGTH = 512
MAX_DEPTH = 20
MAX_EXPONENT = 1_000_000

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_POWER = r"(?:\^|\*\*)[\s{(\[]*"
_EXPONENT = re.compile(_POWER + r"-?([0-9]{7,})|[0-9][eE][-+]?[0-9]{4,}")
_TOWER = re.compile(_POWER + r"([0-9]+)[\s})\]]*" + _POWER + r"([0-9]+)")


def refusal(text: str) -> str | None:
    """Why ``text`` is refused as an answer, or None where it is not. Linear in ``MAX_LENGTH``; never raises."""
    if len(text) > MAX_LENGTH:
        return f"longer than {MAX_LENGTH} characters"
    if any(not character.isprintable() and character not in " \t\r\n" for character in text):
        return "control characters or surrogates"
    if "__" in text:
        return "a double underscore, which no formula has"
    if not _balanced(text):
        return "braces that do not match"
    if _depth(text) > MAX_DEPTH:
        return f"brackets nested deeper than {MAX_DEPTH}"
    if _EXPONENT.search(text) or any(_large(*match.groups()) for match in _TOWER.finditer(text)):
        return f"an exponent above {MAX_EXPONENT}"
    return None


def _balanced(text: str) -> bool:
    depth = 0
    for match in _BRACE.finditer(text):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth < 0:
            return False
    return depth == 0


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "})]":
            depth = max(0, depth - 1)
    return deepest


def _large(base: str, exponent: str) -> bool:
    """True if base ** exponent exceeds the limit, by logarithms: the power itself may not fit into memory."""
    return int(base) > 1 and int(exponent) * math.log10(int(base)) > math.log10(MAX_EXPONENT)
