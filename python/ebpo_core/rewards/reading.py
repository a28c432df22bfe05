r"""The one reading that references and answers go through: which numbers, words, lists, intervals and relations a text
states, and with which unit.

Only plain numbers and words are decided by what is read here. Formulas stay LaTeX, for Math-Verify to compare.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from ebpo_core.rewards import units
from ebpo_core.rewards.numerals import UnreadableError, is_numeral, joined, plain_number, written
from ebpo_core.rewards.tex import THIN, Tokens, bracketed, group_end, latex, split, strip, tidy, words

RELATIONS = frozenset(("=", "<", ">", r"\leq", r"\geq", r"\neq", r"\approx", r"\equiv"))
_SETS = {r"\cup", r"\cap", r"\setminus", r"\mathbb", r"\emptyset"}
_CURRENCIES = {r"\$": "dollar", "£": "pound", "€": "euro", "¥": "yen", "₹": "rupee"}
_CONNECTIVES = {"and": "and", "or": "or", r"\land": "and", r"\lor": "or"}
_PERCENT = {r"\%", r"\text{percent}", r"\text{percentage}", r"\text{pct}", r"\text{per cent}"}
_DEGREE = ("^", "{", r"\circ", "}")
_ANGLES = {rf"\{name}" for name in ["sin", "cos", "tan", "cot", "sec", "csc"]}
_OPERATORS = {"+", "-", "/", "^", "_", "=", "<", ">", r"\cdot", r"\times", r"\div", r"\pm", r"\mp", ":"}
_SHORT_WORDS = {"and", "or", "yes", "no", "odd", "pct"}
_MAX_MEMBERS = 64
# What a final answer is wrapped in: "The final answer is 42. I hope it is correct."
_BEFORE = re.compile(
    r"^\s*(?:the\s+)?(?:final\s+)?answer\s*(?:is)?\s*:?(?=[\s$\\])(?!\s*(?:\$|\\\()\s*\n)\s*", re.IGNORECASE
)
_AFTER = re.compile(r"\.?\s*I hope it is correct\.?\s*$", re.IGNORECASE)
_PHRASE = re.compile(r"^\s*(?:the|so|thus|hence|it)\b[^0-9=<>]{0,80}?\bis\s+(?=[$(\[0-9.+-]|\\[^t])", re.IGNORECASE)
_CLAUSE = re.compile(r"(?<=[$\]),} ])\s*(?:\\text\{\s*)?,?\s*\bwhere\b.*", re.DOTALL)
_SPACED = re.compile(r"[-+]?[1-9][0-9]{0,2}(?: [0-9]{3})+")


class Node(NamedTuple):
    """What a text states.

    Attributes:
        kind: "value" (a formula), "words", "list", "set", "tuple", "sets" (unions and the like), "relation", "ratio".
        text: LaTeX for Math-Verify; for "words" their letters.
        number: The value of a plain number.
        digits: Significant digits of a decimal; 0 for what is exact.
        unit: "" for none.
        name: What stands before the equals sign of ``x=5``, "" for nothing.
        members: Of a list, set, tuple or ratio; the sides of a relation. Of a value: what else it is said to equal.
        marks: Brackets of a tuple, signs of a relation, the word that joins a list.
    """

    kind: str
    text: str
    number: Fraction | None = None
    digits: int = 0
    unit: str = ""
    name: str = ""
    members: tuple[Node, ...] = ()
    marks: tuple[str, ...] = ()


@lru_cache(maxsize=4096)
def read(text: str, *, lists: bool = False) -> Node:
    """The node of an answer of bounded length (see ``limits``).

    ``lists`` reads ``2,100`` as the list of 2 and 100: the second reading of an answer where the reference is a list.

    Raises:
        UnreadableError: The text has no reading, or several.
    """
    try:
        text = _AFTER.sub("", _PHRASE.sub("", _BEFORE.sub("", text, count=1), count=1)).strip()
        text = _CLAUSE.sub("", text)  # "f(x) = ax + b, where a > 0"
        tokens = tidy(text.replace(" ", "") if _SPACED.fullmatch(text) else text)
        if lists:
            tokens = tuple(part for token in tokens for part in ((",", " ") if token == "," else (token,)))
        return _node(_worded(joined(_relational(tokens))))
    except (RecursionError, IndexError, ValueError) as error:
        raise error if isinstance(error, UnreadableError) else UnreadableError(str(error)) from error


def _relational(tokens: Tokens) -> Tokens:
    """``<=``, ``>=`` and ``!=`` as one token."""
    out: list[str] = []
    for token in tokens:
        if token == "=" and out and out[-1] in ("<", ">", "!"):
            out[-1] = {"<": r"\leq", ">": r"\geq", "!": r"\neq"}[out[-1]]
        else:
            out.append(token)
    return tuple(out)


def _worded(tokens: Tokens) -> Tokens:
    """Runs of letters that are words, not products of variables, as ``\\text{...}``; "and" and "or" among them."""
    out: list[str] = []
    place = 0
    while place < len(tokens):
        end = place
        while end < len(tokens) and len(tokens[end]) == 1 and tokens[end].isalpha() and tokens[end] not in "πθ":
            end += 1
        run = "".join(tokens[place:end])
        after_script = bool(out) and out[-1] in ("^", "_")
        foreign = not run.isascii()
        if run and not after_script and (run.lower() in _SHORT_WORDS or len(run) >= 4 or (foreign and len(run) >= 1)):
            out.append(r"\text{" + run + "}")
        elif run:
            out += tokens[place:end]
        else:
            out.append(tokens[place])
            end = place + 1
        place = end
    return tuple(out)


def _node(tokens: Tokens) -> Node:
    tokens = strip(tokens)
    while tokens and tokens[-1] in (".", ",", ";", " "):
        tokens = tokens[:-1]
    if not tokens:
        raise UnreadableError("nothing")
    brackets = bracketed(tokens)
    if brackets is not None and brackets[0] == "{":
        return _node(brackets[1])
    for separators in ({";"}, {","} | set(_CONNECTIVES) | {rf"\text{{{word}}}" for word in _CONNECTIVES}):
        parts, found = split(tokens, separators)
        if found:
            return _list(parts, found)
    if brackets is not None:
        inside = _in_brackets(*brackets)
        if inside is not None:
            return inside
    parts, found = split(tokens, {r"\in"})
    if found and len(parts) == 2 and _is_name(parts[0]):
        return _node(parts[1])._replace(name=latex(parts[0]))
    parts, found = split(tokens, RELATIONS)
    if found:
        return _relation(parts, found)
    if any(token in _SETS for token in tokens):
        return Node("sets", written(tokens))
    parts, found = split(tokens, {":"})
    if found and all(parts):
        return Node("ratio", latex(tokens), members=tuple(_value(part) for part in parts), unit=_noon(parts))
    signed = _both_signs(tokens)
    if signed:
        return Node("list", latex(tokens), members=tuple(_value(part) for part in signed), marks=(",",))
    return _value(tokens)


def _noon(parts: list[Tokens]) -> str:
    """The unit of a clock time's last part ("pm")."""
    return _value(parts[-1]).unit


def _list(parts: list[Tokens], found: list[str]) -> Node:
    parts = [part for part in parts if part]
    if len(parts) > _MAX_MEMBERS:
        raise UnreadableError(f"more than {_MAX_MEMBERS} members")
    if len(parts) == 1:
        return _node(parts[0])
    joints = [_CONNECTIVES.get(words(token) or token, token) for token in found]
    mark = "or" if "or" in joints else "and" if "and" in joints else joints[0]
    members: list[Node] = []
    for part in parts:
        signed = _both_signs(part) if not set(part) & RELATIONS else []
        node = _node(part)
        members += node.members if signed else (node,)
    if all(member.kind == "words" for member in members) and mark == ",":
        return Node("words", " ".join(member.text for member in members))
    if members[-1].unit and not any(member.unit for member in members[:-1]):
        # The unit after the last member is everybody's: "3, 4 and 5 cm".
        members = [member._replace(unit=members[-1].unit) if member.kind == "value" else member for member in members]
    return Node("list", "", members=tuple(members), marks=(mark,))


def _in_brackets(opening: str, inner: Tokens, closing: str) -> Node | None:
    """A set, a tuple or an interval; the inside of ``(x)``; None where brackets are part of a formula."""
    if opening == r"\{" and closing == r"\}":
        for bar in ("|", r"\mid", ":"):
            parts, found = split(inner, {bar})
            if len(found) == 1:
                return _node(parts[1])
        if not inner:
            return Node("sets", r"\emptyset")
        node = _node(inner)
        return node._replace(kind="set") if node.kind == "list" else Node("set", "", members=(node,))
    parts, found = split(inner, {",", ";"})
    if not found:
        return _node(inner) if inner and (opening, closing) in (("(", ")"), ("[", "]")) else None
    if len(parts) > _MAX_MEMBERS or not all(parts):
        raise UnreadableError("a bracket with a missing member, or with too many")
    marks = ("(", ")") if opening == r"\langle" else (opening, closing)
    choices = [_both_signs(part) or [part] for part in parts]
    if math.prod(map(len, choices)) == 1:
        return Node("tuple", "", members=tuple(_node(part) for part in parts), marks=marks)
    every = tuple(Node("tuple", "", members=tuple(map(_node, chosen)), marks=marks) for chosen in product(*choices))
    return Node("list", "", members=every[:_MAX_MEMBERS], marks=(",",))


def _both_signs(tokens: Tokens) -> list[Tokens]:
    r"""``1\pm\sqrt{2}`` with either sign; nothing where there is no such sign, or more than one."""
    if tokens.count(r"\pm") != 1:
        return []
    other = {r"\pm": "-", r"\mp": "+"}
    upper = tuple({r"\pm": "+", r"\mp": "-"}.get(token, token) for token in tokens)
    return [upper, tuple(other.get(token, token) for token in tokens)]


def _relation(parts: list[Tokens], found: list[str]) -> Node:
    if not all(parts):
        raise UnreadableError("a relation without one of its sides")
    if r"\approx" in found:
        # What is approximated is the answer; of a name it is its approximation.
        if len(found) > 1:
            place = found.index(r"\approx")
            return _relation(parts[: place + 1], found[:place]) if place else _node(parts[0])
        return _node(parts[1])._replace(name=latex(parts[0])) if _is_name(parts[0]) else _node(parts[0])
    if set(found) in ({"="}, {r"\equiv"}) and _is_name(parts[0]):
        value = _node(parts[-1])
        names = _names(parts[0])
        if value.kind == "ratio" and ":" not in names and not names.isalpha():
            raise UnreadableError("an equation of ratios")
        return value._replace(name=names, members=value.members or tuple(map(_node, parts[1:-1])))
    sides = tuple(_node(part) for part in parts)
    return Node("relation", latex_of(parts, found), members=sides, marks=tuple(found))


def latex_of(parts: list[Tokens], found: list[str]) -> str:
    """A relation in LaTeX for Math-Verify."""
    out = written(parts[0])
    for sign, part in zip(found, parts[1:], strict=True):
        out += f" {sign} {written(part)}"
    return out


def _names(tokens: Tokens) -> str:
    return "".join(latex(tokens).split())


def _is_name(tokens: Tokens) -> bool:
    r"""Whether what stands before "=" names what follows: ``x``, ``f(x)``, ``AB``, ``(p,q)``, ``A:B``, ``|AB|``."""
    place = 0
    lower = 0
    tokens = strip(tokens)
    while place < len(tokens):
        token = tokens[place]
        if token == "_" and tokens[place + 1 : place + 2] == ("{",):
            place = group_end(tokens, place + 1)
            continue
        if token == "^":
            end = group_end(tokens, place + 1) if tokens[place + 1 : place + 2] == ("{",) else place
            if "".join(tokens[place + 2 : end - 1]) not in ("-1", r"\prime", r"\circ", "*", r"\cdot"):
                return False
            place = end
            continue
        if token == "(" and place:
            place = next((end + 1 for end in range(place, len(tokens)) if tokens[end] == ")"), len(tokens))
            lower = 0
            continue
        if is_numeral(token) or token in ("+", "-", r"\cdot", r"\times", r"\sqrt", "!", r"\pm", r"\%", "["):
            return False
        if token in _ANGLES | {r"\log", r"\ln", r"\int", r"\sum", r"\prod"}:
            return False
        if token in (",", "/", ":", "{", "}", "(", ")"):
            lower = 0
        elif len(token) == 1 and token.islower():
            lower += 1
            if lower > 1:
                return False  # a product such as xy
        place += 1
    return any(token[-1:].isalpha() or token.startswith(("\\", "|")) for token in tokens)


def _value(tokens: Tokens) -> Node:
    """A number, words, or a formula, with its unit."""
    tokens = strip(tokens)
    if not tokens:
        raise UnreadableError("nothing")
    if _all_words(tokens):
        return Node("words", re.sub(r"[\W_]+", "", "".join(words(token) or token for token in tokens)).casefold())
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
    """Whether a text is words: nothing but letters, and at least one whole word."""
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
    """What has the unit, the unit in its one spelling, and a factor (of a percent sign, of "million")."""
    one = Fraction(1)
    if tokens[-1] in _PERCENT and len(tokens) > 1:
        return strip(tokens[:-1]), "%", Fraction(1, 100)
    for modulo in (r"\pmod", r"\bmod", r"\mod"):
        if modulo in tokens[1:]:
            place = tokens.index(modulo)
            return strip(tokens[:place]), "mod " + "".join(tokens[place + 1 :]).strip("{} "), one
    sign = tokens[:1] if tokens[0] in ("+", "-") else ()
    rest = strip(tokens[len(sign) :])
    if len(rest) > 1 and rest[0] in _CURRENCIES:
        base, unit, factor = _split_unit((*sign, *strip(rest[1:])))
        return base, _CURRENCIES[rest[0]] if not unit else unit, factor
    if len(tokens) > 1 and tokens[-1] in _CURRENCIES:
        return strip(tokens[:-1]), _CURRENCIES[tokens[-1]], one
    if _has_degree(tokens) and not set(tokens) & _ANGLES:
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
    """Whether letters from ``start`` on are a unit by how they are written: as text, or bare after a number.

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
