"""Answers that stand in no list: a number, words, or a formula, with its unit."""

from __future__ import annotations

import re
from fractions import Fraction

from ebpo_core.rewards import units
from ebpo_core.rewards.nodes import Node
from ebpo_core.rewards.numerals import UnreadableError, is_numeral, plain_number, written
from ebpo_core.rewards.tex import THIN, Tokens, strip, words

_CURRENCIES = {r"\$": "dollar", "£": "pound", "€": "euro", "¥": "yen", "₹": "rupee"}
_PERCENT = {r"\%", r"\text{percent}", r"\text{percentage}", r"\text{pct}", r"\text{per cent}"}
_DEGREE = ("^", "{", r"\circ", "}")
ANGLES = {rf"\{name}" for name in ["sin", "cos", "tan", "cot", "sec", "csc"]}
_OPERATORS = {"+", "-", "/", "^", "_", "=", "<", ">", r"\cdot", r"\times", r"\div", r"\pm", r"\mp", ":"}


def leaf(tokens: Tokens) -> Node:
    """A number, words, or a formula, with its unit."""
    tokens = strip(tokens)
    if not tokens:
        raise UnreadableError("nothing")
    if _all_words(tokens):
        letters = re.sub(r"[\W_]+", "", "".join(words(token) or token for token in tokens))
        return Node("words", letters if len(letters) == 1 else letters.casefold())
    base, unit, factor = _split_unit(tokens)
    texts = [place for place, token in enumerate(base) if words(token) is not None]
    if sum(len((words(base[place]) or "").split()) for place in texts) > 1 or (
        texts and any(is_numeral(token) for token in base[texts[0] :]) and base[texts[0] - 1 : texts[0]] != ("{",)
    ):
        raise UnreadableError("a sentence")
    text = written(base)
    number = plain_number(base)
    if number is not None:
        number *= factor
        text = _fraction_text(number)
    elif factor != 1:
        text = rf"({text}) \cdot {_fraction_text(factor)}"
    return Node("value", text, number, _significant(base), unit)


def _fraction_text(number: Fraction) -> str:
    if number.denominator == 1:
        return str(number.numerator)
    sign = "-" if number < 0 else ""
    return rf"{sign}\frac{{{abs(number.numerator)}}}{{{number.denominator}}}"


def _all_words(tokens: Tokens) -> bool:
    """True if a text is words: nothing but letters, and at least one whole word."""
    if any(words(token) is None and not (token.isspace() or token.isalpha() or token in ".'-!?\"") for token in tokens):
        return False
    found = [token for token in tokens if words(token) is not None]
    if not found:
        return False
    first = words(tokens[0])
    if first is None and len(found) == 1 and len(tokens) <= 3 and units.unit(words(found[0]) or "") is not None:
        return False  # such as x\text{ cm}
    return not any(character.isdigit() for token in found for character in token)


def _significant(tokens: Tokens) -> int:
    r"""The significant digits of a decimal, also before ``\times 10^{n}``; 0 for anything else."""
    tokens = tuple(token for token in tokens if token not in (" ", "+", "-", THIN))
    if not tokens or not is_numeral(tokens[0]) or "." not in tokens[0]:
        return 0
    scaled = len(tokens) >= 4 and tokens[1] in (r"\times", r"\cdot") and tokens[2:4] == ("10", "^")
    if len(tokens) > 1 and not scaled:
        return 0
    return len(tokens[0].replace(".", "").lstrip("0"))


def _split_unit(tokens: Tokens) -> tuple[Tokens, str, Fraction]:
    """The text that has the unit, the unit in its one spelling, and a factor (of a percent sign, of "million")."""
    one = Fraction(1)
    if tokens[-1] in _PERCENT and len(tokens) > 1:
        return strip(tokens[:-1]), "%", Fraction(1, 100)
    if r"\pmod" in tokens[1:]:
        place = tokens.index(r"\pmod")
        return strip(tokens[:place]), "mod " + "".join(tokens[place + 1 :]).strip("{} "), one
    sign = tokens[:1] if tokens[0] in ("+", "-") else ()
    rest = strip(tokens[len(sign) :])
    if len(rest) > 1 and rest[0] in _CURRENCIES:
        base, unit, factor = _split_unit((*sign, *strip(rest[1:])))
        return base, unit or _CURRENCIES[rest[0]], factor
    if len(tokens) > 1 and tokens[-1] in _CURRENCIES:
        return strip(tokens[:-1]), _CURRENCIES[tokens[-1]], one
    if _has_degree(tokens) and not set(tokens) & ANGLES:
        return strip(_without_degrees(tokens)), "degree", one
    if len(tokens) >= 4 and tokens[-4:-3] != ("}",) and tokens[-1] == "}" and "_" in tokens:
        place = len(tokens) - 1 - tokens[::-1].index("_")
        below = "".join(tokens[place + 2 : -1])
        digits = "".join(tokens[:place])
        if re.fullmatch(r"-?[0-9A-Z]*[0-9][0-9A-Z]*", digits) and re.fullmatch(r"\d\d?|\\text\{\w+\}", below):
            return _numeral_in_base(digits), f"base {below}", one
    elif len(tokens) == 3 and is_numeral(tokens[0]) and tokens[1] == "_":
        return tokens[:1], f"base {tokens[2]}", one
    return _split_words(tokens)


def _numeral_in_base(digits: str) -> Tokens:
    return (digits,) if digits.isdigit() else (r"\text{" + digits + "}",)


def _has_degree(tokens: Tokens) -> bool:
    return any(tokens[place : place + 4] == _DEGREE for place in range(1, len(tokens)))


def _without_degrees(tokens: Tokens) -> Tokens:
    out: list[str] = []
    place = 0
    while place < len(tokens):
        if tokens[place : place + 4] == _DEGREE:
            place += 4
        else:
            out.append(tokens[place])
            place += 1
    return tuple(out)


def _split_words(tokens: Tokens) -> tuple[Tokens, str, Fraction]:
    """The words at the end, if they are a unit or a multiplier."""
    start = len(tokens)
    while start and _may_be_unit(tokens[start - 1], tokens[: start - 1]):
        start -= 1
    depth = [tokens[:place].count("{") - tokens[:place].count("}") for place in range(len(tokens))]
    while start < len(tokens) and (depth[start] or not (words(tokens[start]) is not None or tokens[start].isalpha())):
        start += 1
    if start < len(tokens) and not (start and _stands_apart(tokens, start, strip(tokens[:start]))):
        # Bare letters that are no unit are variables; the unit is the text after them.
        texts = (place for place in range(start, len(tokens)) if words(tokens[place]) is not None and not depth[place])
        start = next(texts, len(tokens))
    if 0 < start < len(tokens):
        base, ending = strip(tokens[:start]), tokens[start:]
        text = "".join(f" {words(token)} " if words(token) is not None else token for token in ending).strip()
        operand = not base or base[-1] in _OPERATORS
        if not operand:
            first, _, others = text.partition(" ")
            times = units.multiplier(first)
            if times is not None and plain_number(base) is not None:
                unit = units.unit(others) if others.strip() else ""
                if unit is not None:
                    return base, unit, Fraction(times)
            unit = units.unit(text)
            if unit is not None:
                return base, unit, Fraction(1)
    return tokens, "", Fraction(1)


def _may_be_unit(token: str, before: Tokens) -> bool:
    if token.isdigit():
        return before[-1:] in (("^",), ("{",))
    return (
        words(token) is not None
        or token in (" ", THIN, "/", "^", "{", "}", r"\cdot", "-", ".")
        or (len(token) == 1 and token.isascii() and token.isalpha())
    )


def _stands_apart(tokens: Tokens, start: int, base: Tokens) -> bool:
    """True if letters from ``start`` on are a unit by how they are written: as text, or bare after a number.

    A single bare letter needs a space before it: ``5 m`` is a length, ``5m`` a product.
    """
    if words(tokens[start]) is not None:
        return True
    run = start
    while run < len(tokens) and len(tokens[run]) == 1 and tokens[run].isalpha():
        run += 1
    letters = "".join(tokens[start:run])
    spaced = start > 0 and tokens[start - 1] in (" ", THIN)
    plain = plain_number(base) is not None or base[-1:] == (r"\pi",)
    return plain and units.is_measure(letters) and (spaced or len(letters) > 1)
