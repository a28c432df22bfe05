r"""The one reading that references and answers go through: which numbers, words, lists, intervals and relations a text
states, and with which unit.

Only plain numbers and words are decided by what is read here. Formulas stay LaTeX, for Math-Verify to compare.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from itertools import product

from ebpo_core.rewards.leaves import ANGLES, leaf
from ebpo_core.rewards.nodes import Node
from ebpo_core.rewards.numerals import UnreadableError, is_numeral, joined, written
from ebpo_core.rewards.tex import Tokens, bracketed, group_end, latex, split, strip, tidy, words

RELATIONS = frozenset(("=", "<", ">", r"\leq", r"\geq", r"\neq", r"\approx", r"\equiv"))
_SETS = {r"\cup", r"\cap", r"\setminus", r"\mathbb", r"\emptyset"}
_CONNECTIVES = {"and": "and", "or": "or", r"\land": "and", r"\lor": "or"}
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
        letters = len(run) >= (3 if run.isupper() and len(run) == len(tokens) else 4)  # an order such as BAC
        if run and not after_script and (run.lower() in _SHORT_WORDS or letters or foreign):
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
        return Node("ratio", latex(tokens), members=tuple(leaf(part) for part in parts), unit=_noon(parts))
    signed = _both_signs(tokens)
    if signed:
        return Node("list", latex(tokens), members=tuple(leaf(part) for part in signed), marks=(",",))
    return leaf(tokens)


def _noon(parts: list[Tokens]) -> str:
    """The unit of a clock time's last part ("pm")."""
    return leaf(parts[-1]).unit


def _list(parts: list[Tokens], found: list[str]) -> Node:
    if not parts[0]:
        raise UnreadableError("a list that begins with a separator")
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
                _, domain = split(parts[0], {r"\in"})
                if domain and latex(parts[0][-4:]) != r"\mathbb{R}":
                    raise UnreadableError("a set of numbers of another kind than real ones")
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
        return value._replace(
            name=names, members=value.members or tuple(_node(part) for part in parts[1:-1] if not _is_name(part))
        )
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
    r"""True if what stands before "=" names what follows: ``x``, ``f(x)``, ``AB``, ``(p,q)``, ``A:B``, ``|AB|``."""
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
            if "-1" in "".join(tokens[place:end]) and tokens[end : end + 1] != ("(",):
                return False  # x^{-1} is a reciprocal, f^{-1}(x) a name
            place = end
            continue
        if token == "(" and place:
            place = next((end + 1 for end in range(place, len(tokens)) if tokens[end] == ")"), len(tokens))
            lower = 0
            continue
        if is_numeral(token) or token in ("+", "-", r"\cdot", r"\times", r"\sqrt", "!", r"\pm", r"\%", "["):
            return False
        if token in ANGLES | {r"\log", r"\ln", r"\int", r"\sum", r"\prod"}:
            return False
        if token in (",", "/", ":", "{", "}", "(", ")"):
            lower = 0
        elif len(token) == 1 and token.islower():
            lower += 1
            if lower > 1:
                return False  # a product such as xy
        place += 1
    return any(token[-1:].isalpha() or token.startswith(("\\", "|")) for token in tokens)
