r"""Numerals in a formula's tokens, and the formula as LaTeX that Math-Verify's grammar reads without changing a value.

Numerals are exact: decimals become fractions, so that no library rounds them. Thousands' separators, repeating decimals
and ``1.5e3`` are read here. Where the grammar would add what stands side by side (``2(3)``, ``40 2``), the product is
written out, or the text refused.
"""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise

from ebpo_core.rewards.tex import COMMA, THIN, Tokens, group_end, words

_NUMERAL = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_PAIRS = {"(": ")", "[": "]", r"\{": r"\}", "{": "}", r"\langle": r"\rangle"}
_INDEFINITE = {r"\ldots", "_", "^", r"\pmod", r"\bmod", r"\mod", r"\pod", r"\pm", r"\mp"}
_SUBSCRIPTED = {r"\sum", r"\prod", r"\lim", r"\int", r"\log"}  # what stands below them is a formula
_OPERATORS = {r"\cdot", r"\times", r"\div", r"\rfloor", r"\rceil"}
_REPEATED = {r"\overline", r"\bar", r"\dot"}


class UnreadableError(ValueError):
    """A text that is no formula, or one that has several readings."""


def is_numeral(token: str) -> bool:
    return _NUMERAL.fullmatch(token) is not None


def joined(tokens: Tokens, bracket: str = "") -> Tokens:
    """Tokens with each numeral in one token such as ``1234.5``.

    A comma between digits is a thousands' separator where groups of three follow it without a space. Inside brackets,
    where ``(1,234)`` is a pair, that needs a sign that it is meant: a group that begins with 0, or other commas that
    are followed by a space.
    """
    spaced = any(token == "," and after.isspace() for token, after in pairwise(tokens))
    out: list[str] = []
    place = 0
    while place < len(tokens):
        token = tokens[place]
        if token in _PAIRS:
            end = _closing(tokens, place)
            out += (token, *joined(tokens[place + 1 : end], "" if token == "{" else token), *tokens[end : end + 1])
            place = end + 1
        elif token.isdigit() or (token == "." and place + 1 < len(tokens) and tokens[place + 1].isdigit()):
            numeral, place = _numeral(tokens, place, bracket, spaced)
            out += numeral
        else:
            out.append(token)
            place += 1
    return tuple(out)


def _closing(tokens: Tokens, start: int) -> int:
    """The place of the bracket that closes, or the end."""
    depth = 0
    for place in range(start, len(tokens)):
        depth += (tokens[place] in _PAIRS) - (tokens[place] in _PAIRS.values())
        if depth == 0:
            return place
    return len(tokens)


def _numeral(tokens: Tokens, place: int, bracket: str, spaced: bool) -> tuple[Tokens, int]:
    whole = ""
    if tokens[place].isdigit():
        whole, place = tokens[place], place + 1
        groups: list[str] = []
        loose = False
        end = place
        while end + 1 < len(tokens) and tokens[end] in (",", COMMA, THIN) and tokens[end + 1].isdigit():
            loose |= tokens[end] == ","
            groups.append(tokens[end + 1])
            end += 2
        meant = not bracket or not loose or spaced or any(group[0] == "0" for group in groups)
        if groups and meant and 0 < len(whole.lstrip("0")) <= 3 and all(len(group) == 3 for group in groups):
            whole, place = whole + "".join(groups), end
    if tokens[place : place + 1] == (".",) and place + 1 < len(tokens):
        after = tokens[place + 1]
        if after.isdigit():
            decimals, place = after, place + 2
            if tokens[place : place + 1] == (".",) and place + 1 < len(tokens) and tokens[place + 1].isdigit():
                raise UnreadableError(f"a numeral with two points after {whole}")
        elif after in _REPEATED and whole:
            decimals, place = "", place + 1
        elif after in ("/", " ", "}") and whole:
            return (whole,), place + 1  # 1./3
        else:
            return (whole,), place
        if tokens[place : place + 1] and tokens[place] in _REPEATED and tokens[place + 1 : place + 2] == ("{",):
            end = group_end(tokens, place + 1)
            repeated = "".join(tokens[place + 2 : end - 1])
            if repeated.isdigit():
                return _repeating(whole or "0", decimals, repeated), end
        numeral = f"{whole or '0'}.{decimals}" if decimals else whole
    else:
        numeral = whole
    exponent = tokens[place + 1 : place + 3]
    if tokens[place : place + 1] and tokens[place] in ("e", "E") and exponent:
        sign = exponent[0] if exponent[0] in ("+", "-") else ""
        power = exponent[-1] if sign and len(exponent) == 2 else exponent[0]
        if power.isdigit():
            raised = (sign, power) if sign == "-" else (power,)
            return (numeral, r"\times", "10", "^", "{", *raised, "}"), place + (3 if sign else 2)
    return (numeral,), place


def _repeating(whole: str, decimals: str, repeated: str) -> Tokens:
    shift, cycle = 10 ** len(decimals), 10 ** len(repeated) - 1
    value = Fraction(int(whole + decimals), shift) + Fraction(int(repeated), cycle * shift)
    return r"\frac", "{", str(value.numerator), "}", "{", str(value.denominator), "}"


def plain_number(tokens: Tokens) -> Fraction | None:
    r"""The value of an integer, a decimal, a fraction of two (``a/b``, ``\frac{a}{b}``), or a mixed number."""
    tokens = tuple(token for token in tokens if token not in (" ", THIN))
    sign = 1
    while tokens and tokens[0] in ("+", "-"):
        sign = -sign if tokens[0] == "-" else sign
        tokens = tokens[1:]
    if not tokens:
        return None
    if is_numeral(tokens[0]):
        if len(tokens) == 1:
            return sign * Fraction(tokens[0])
        if tokens[1] == "/" and len(tokens) == 3 and is_numeral(tokens[2]):
            return _ratio(sign * Fraction(tokens[0]), Fraction(tokens[2]))
        part = plain_number(tokens[1:]) if mixed(tokens[0], tokens[1:]) else None
        return None if part is None else sign * (Fraction(tokens[0]) + part)
    if tokens[0] == r"\frac" and tokens[1:2] == ("{",):
        middle = group_end(tokens, 1)
        if tokens[middle : middle + 1] == ("{",) and group_end(tokens, middle) == len(tokens):
            above, below = plain_number(tokens[2 : middle - 1]), plain_number(tokens[middle + 1 : -1])
            return None if above is None or below is None else _ratio(sign * above, below)
    return None


def _ratio(above: Fraction, below: Fraction) -> Fraction | None:
    return above / below if below else None


def mixed(numeral: str, following: Tokens) -> bool:
    r"""True if a numeral before ``\frac{a}{b}`` makes a mixed number: all three integers, and a below b."""
    if following[:1] != (r"\frac",) or not numeral.isdigit() or len(following) < 7:
        return False
    _, _, above, close, opening, below, end = following[:7]
    return (
        (close, opening, end) == ("}", "{", "}") and above.isdigit() and below.isdigit() and 0 < int(above) < int(below)
    )


def written(tokens: Tokens) -> str:
    """A formula in LaTeX for Math-Verify.

    Raises:
        UnreadableError: Two numbers side by side, a digit with a subscript, or ellipses.
    """
    out: list[str] = []
    before = ""  # what stands before: "number", "fraction", "group", or ""
    place = 0
    tokens = tuple(token for token in tokens if token not in (" ", THIN))
    while place < len(tokens):
        token, start, kind = tokens[place], place, ""
        place += 1
        if is_numeral(token):
            kind = "number"
            if tokens[place : place + 1] == ("_",):
                raise UnreadableError("a number with a subscript")
            if before == "number" and tokens[place : place + 1] != ("^",):
                raise UnreadableError("two numbers side by side")
            following = "".join(tokens[place : place + 1])
            factor = following.lstrip("\\")[:1].isalpha() and following not in _OPERATORS
            if tokens[start - 1 : start] == ("/",) and factor:
                raise UnreadableError("a slash before a product without a sign, such as 1/2x")
            text = _exact(token)
        elif token in (r"\frac", r"\binom") and tokens[place : place + 1] == ("{",):
            kind = "fraction"
            middle = group_end(tokens, place)
            if tokens[middle : middle + 1] != ("{",):
                raise UnreadableError(f"{token} with one argument")
            place = group_end(tokens, middle)
            parts = (tokens[start + 2 : middle - 1], tokens[middle + 1 : place - 1])
            text = token + "".join("{" + written(part) + "}" for part in parts)
        elif token in ("(", "{"):
            kind = "group"
            place = _closing(tokens, start) + 1
            text = token + written(tokens[start + 1 : place - 1]) + _PAIRS[token]
        elif token in ("^", "_") and tokens[place : place + 1] == ("{",):
            place = group_end(tokens, place)
            inner = tokens[start + 2 : place - 1]
            power = start > 0 and tokens[start - 1] not in "fgh" and tokens[start - 1].isalpha()
            if token == "^" and power and tokens[place : place + 1] == ("(",):
                kind, before = "group", ""  # c^2(x+1) is a product, to the library a call of c
            if inner == (r"\prime",):
                if start and is_numeral(tokens[start - 1]):
                    raise UnreadableError("a prime after a number")
                text = "_{prime}"
            elif inner == (r"\circ",):
                text = r"^\circ "
            elif token == "^" and inner in (("T",), (r"\top",)) and not _ends_matrix(tokens[:start]):
                text = r"^{\text{T}}"  # to the library the transpose, which of a letter is the letter
            elif token == "_" and start and tokens[start - 1] in _SUBSCRIPTED:
                text = "_{" + written(inner) + "}"
            elif token == "_":
                text = "_{" + re.sub(r"\\text|[^A-Za-z0-9+-]", "", "".join(inner)) + "}"
            else:
                text = "^{" + written(inner) + "}"
        elif token in _INDEFINITE or (token == "!" and tokens[place : place + 1] == ("!",)):
            raise UnreadableError(f"{token} that stands for nothing definite")
        elif token == "'":
            if start and is_numeral(tokens[start - 1]):
                raise UnreadableError("a prime after a number")
            while tokens[place : place + 1] == ("'",):
                place += 1
            text = "_{" + "prime" * (place - start) + "}"
        elif token in ("I", "E", r"\gamma"):
            text = (
                r"\text{" + token.removeprefix("\\") + "}"
            )  # to the library the imaginary unit, no letter, a function
        elif words(token) is not None:
            if not (words(token) or "").isascii():
                raise UnreadableError("words of another alphabet in a formula")
            text = r"\text{" + re.sub(r"[^A-Za-z0-9]+", "", words(token) or "") + "}"
        elif re.fullmatch(r"\\[a-zA-Z]+", token):
            text = token + (" " if tokens[place : place + 1] and tokens[place][0].isalnum() else "")
        else:
            text = token
        if kind and before and not (before == "number" and mixed(tokens[start - 1], tokens[start:])):
            out.append(r" \cdot ")
        out.append(text)
        before = kind
    return "".join(out)


def _ends_matrix(tokens: Tokens) -> bool:
    return bool(tokens) and tokens[-1].startswith(r"\end")


def _exact(numeral: str) -> str:
    whole, point, decimals = numeral.partition(".")
    if not point:
        return str(int(whole))
    return rf"\frac{{{int(whole + decimals)}}}{{{10 ** len(decimals)}}}"
