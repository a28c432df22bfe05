r"""Answers read without a symbolic library: a number with its unit, or a text in normal form.

What counts as the same answer here, and what does not:

- Numbers are compared exactly: ``1,234`` = ``1234``, ``0.50`` = ``1/2`` = ``\frac12``, but ``0.333`` is not ``1/3``.
- A unit (``\text{ cm}``, ``\$``, a degree sign, ``_{2}`` for a base, some plain words) may be left out or added, since
  the question states it; where both answers have one it has to be the same. Nothing is converted.
- ``42\%`` is 0.42, hence not 42. Only a reference that itself is a percentage may be answered without its sign.
- Words that change the value (million, dozen, or, more, ...) are no units.
- An equation between numbers, such as ``6 \cdot 7 = 42`` or ``84/2 = 42``, must hold as far as its sides are plain
  numbers.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_DOLLAR = re.compile(r"(?<!\\)\$")
_COMMANDS = r"\\(?:text|mbox|mathrm|mathbf|mathit|textbf|textit|textrm|textnormal|boldsymbol)"
_WRAPPED = re.compile(_COMMANDS + r"\s*\{([^{}]*)\}")
# A doubled backslash is a matrix's new row; what follows it is no command.
_THIN_SPACE = re.compile(r"(\\\\)|\\[,!;:]|\{,\}")
_WIDE_SPACE = re.compile(r"(\\\\)|\\ |~")
_SIZES = re.compile(r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![a-zA-Z])\s*")
_FRACTION = re.compile(r"\\[dtc]?frac(?![a-zA-Z])\s*")
_TOKEN = re.compile(r"\s*(\\[a-zA-Z]+|[^\s\\{}])")
_OPENING = re.compile(r"\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)

_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_SIGNED = rf"[-+]?\s*(?:{_NUMBER})"
_PLAIN = re.compile(rf"({_SIGNED})(?:\s*/\s*({_SIGNED}))?")
_FRAC = re.compile(rf"([-+]?)\s*\\frac\{{\s*({_SIGNED})\s*\}}\{{\s*({_SIGNED})\s*\}}")

_CURRENCY = re.compile(r"([-+]?)\s*\\?([$£€])\s*(?=[-+.0-9\\])")
_PERCENT = re.compile(r"\s*(?:\\?%|\\text\{\s*(?:%|percent)\s*\}|\s+percent)$", re.IGNORECASE)
_DEGREE = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|°)$")
_BASE = re.compile(r"(-?[0-9A-F]*[0-9][0-9A-F]*)\s*_\s*\{?([0-9]{1,2})\}?")
_UNIT = re.compile(_COMMANDS + r"\s*\{([^{}]*)\}\s*(?:\^\s*\{?([0-9])\}?)?$")
_WORD = re.compile(r"(?<=[0-9}])\s+([a-z]{2,})(?:\s*\^\s*\{?([0-9])\}?)?$")

_PLAIN_UNITS = re.compile(
    "(?:cm|mm|km|kg|mph|inch|inches|feet|foot|people|(?:yard|mile|meter|metre|liter|litre|gram|dollar|cent|degree|second|"
    "minute|hour|day|week|month|year|unit|point|student|way)s?)"
)
_VALUE_WORDS = re.compile(
    r"\b(?:hundred|thousand|million|billion|trillion|dozen|half|and|or|more|less|than|to|mod|modulo|over|plus|minus|times|"
    r"if|when|for|where|with|at|least|most|about|between|not|no)\b"
)
# A run of four letters without a backslash is a word, not a product of variables.
_WORDS = re.compile(r"(?=.*[^\W\d_]{4})[^\W\d_](?:[^\W\d_]|[ '.,-])*")
_SYNONYMS = {"dollar": "$", "metre": "meter", "litre": "liter", "feet": "foot", "inche": "inch"}


class Answer(NamedTuple):
    """An answer as read.

    ``expression`` is its text in normal form without the unit, ``unit`` is "" where it has none, and ``value`` is None
    where it is not a plain number. ``words`` marks a text such as "Monday" or "no solution", ``contradiction`` marks an
    equation between different numbers.
    """

    expression: str
    unit: str = ""
    value: Fraction | None = None
    words: bool = False
    contradiction: bool = False


@lru_cache(maxsize=4096)
def read_answer(text: str) -> Answer:
    """Read an answer of bounded length (see ``limits``). Never raises on text."""
    text = normal_form(text)
    expression, unit = _split_unit(text)
    words = _WORDS.fullmatch(expression) is not None
    sides = [_number(side) for side in expression.split("=")]
    plain = [side for side in sides if side is not None]
    contradiction = len(set(plain)) > 1
    value = plain[0] if len(plain) == len(sides) and not contradiction else None
    return Answer(expression, unit, value, words, contradiction)


def same(reference: Answer, answer: Answer) -> bool | None:
    """Whether two answers are the same; None where numbers and texts cannot tell. The reference comes first."""
    if answer.contradiction:
        return False
    if answer.unit == "%" and reference.unit != "%":
        # A percentage is a value, so there is nothing here for a symbolic comparison to find.
        if reference.unit or reference.value is None or answer.value is None:
            return False
        return reference.value == answer.value / 100
    if reference.unit != answer.unit and reference.unit and answer.unit:
        return False
    if reference.value is not None and answer.value is not None:
        return reference.value == answer.value
    if reference.words or answer.words:
        # To a symbolic library a word is the product of its letters, and so are its anagrams.
        return _letters(reference.expression).lower() == _letters(answer.expression).lower()
    return True if _letters(reference.expression) == _letters(answer.expression) else None


def normal_form(text: str) -> str:
    r"""LaTeX in normal form.

    That is without math delimiters, commands for size and space, a full stop at the end and ``\text{}`` around
    everything, with braces around a fraction's parts and ``-`` for the minus sign.
    """
    text = text.replace("\N{MINUS SIGN}", "-").replace("\N{NO-BREAK SPACE}", " ")
    text = _THIN_SPACE.sub(lambda match: match[1] or ("," if match[0] == "{,}" else ""), text)
    text = _WIDE_SPACE.sub(lambda match: match[1] or " ", text)
    text = _braced_fractions(_SIZES.sub("", text))
    while True:
        text = text.strip()
        before = text
        if text.endswith(".") and text[:-1].strip():
            text = text[:-1]
        for opening, closing in _WRAPPERS:
            inner = text[len(opening) : len(text) - len(closing)]
            if text.startswith(opening) and text.endswith(closing) and inner and not _DOLLAR.search(inner):
                text = inner
                break
        wrapped = _WRAPPED.fullmatch(text)
        if wrapped is not None:
            text = wrapped[1]
        if text == before:
            return text


def _split_unit(text: str) -> tuple[str, str]:
    """The text without its unit, and the unit in normal form, "" for none."""
    for pattern, unit in ((_PERCENT, "%"), (_DEGREE, "degree")):
        match = pattern.search(text)
        if match is not None and match.start():
            return text[: match.start()].strip(), unit
    match = _CURRENCY.match(text)
    if match is not None:
        return (match[1] + text[match.end() :]).strip(), match[2]
    match = _BASE.fullmatch(text)
    if match is not None:
        return match[1], f"base {match[2]}"
    match = _UNIT.search(text)
    if match is not None and match.start():
        words = re.findall(r"[a-z]+", match[1].lower())
        before = text[: match.start()].strip()
        # After an operator or a comma the words are an operand or a member of a list, not a unit.
        if words and not _VALUE_WORDS.search(match[1].lower()) and before[-1:] not in "+-*/=,;<>&^_":
            return before, _unit(words, match[2])
    match = _WORD.search(text)
    if match is not None and _PLAIN_UNITS.fullmatch(match[1]):
        return text[: match.start()].strip(), _unit([match[1]], match[2])
    return text, ""


def _unit(words: list[str], power: str | None) -> str:
    singular = [word[:-1] if word.endswith("s") and len(word) > 2 else word for word in words]
    return " ".join(_SYNONYMS.get(word, word) for word in singular) + (f"^{power}" if power else "")


def _number(text: str) -> Fraction | None:
    text = text.strip()
    match = _PLAIN.fullmatch(text)
    if match is not None:
        numerator, denominator, sign = match[1], match[2] or "1", 1
    else:
        match = _FRAC.fullmatch(text)
        if match is None:
            return None
        numerator, denominator, sign = match[2], match[3], -1 if match[1] == "-" else 1
    below = _decimal(denominator)
    return sign * _decimal(numerator) / below if below else None


def _decimal(text: str) -> Fraction:
    """A matched numeral; Fraction's own reading of text would take exponents, whose powers need not fit into memory."""
    text = text.replace(",", "").replace(" ", "")
    whole, _, decimals = text.lstrip("+-").partition(".")
    value = Fraction(int((whole + decimals) or "0"), 10 ** len(decimals))
    return -value if text.startswith("-") else value


def _letters(expression: str) -> str:
    """The text to compare letter by letter, without white space and without the brackets of a choice such as (A)."""
    text = "".join(_WRAPPED.sub(lambda match: match[1], expression).split())
    return text[1:-1] if re.fullmatch(r"\([A-Z]\)", text) else text


def _braced_fractions(text: str) -> str:
    r"""``\frac12`` as ``\frac{1}{2}``, ``\dfrac\pi{2}`` as ``\frac{\pi}{2}``: without a brace TeX takes one token."""
    parts: list[str] = []
    position = 0
    while (match := _FRACTION.search(text, position)) is not None:
        parts.append(text[position : match.start()] + "\\frac")
        position = match.end()
        for _ in range(2):
            argument, position = _argument(text, position)
            parts.append("{" + _braced_fractions(argument) + "}" if argument else "")
    return "".join(parts) + text[position:]


def _argument(text: str, start: int) -> tuple[str, int]:
    """The argument of a TeX command at ``start``, without braces, and where it ends; "" where there is none."""
    token = _TOKEN.match(text, start)
    if token is not None:
        return token[1], token.end()
    opening = _OPENING.match(text, start)
    depth = 0
    for match in _BRACE.finditer(text, start) if opening is not None else ():
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return text[opening.end() : match.start()] if opening else "", match.end()
    return "", start
