r"""TeX as tokens: layout and spelling taken away, every argument of a command in braces.

Math-Verify's grammar needs braces (``\sqrt{2}``, ``2^{\frac{1}{3}}``) where TeX takes the next token (``\sqrt2``,
``2^\frac13``); its own repair of that is by patterns and changes values. Here the rule of TeX itself is applied, to
references and answers alike. Nothing in this module knows what a formula means.
"""

from __future__ import annotations

import re
from functools import lru_cache

from ebpo_core.rewards.tex_names import CHARACTERS, DROPPED, FONTS, SPACES, SYNONYMS

Tokens = tuple[str, ...]

_TOKEN = re.compile(r"\\(?:begin|end)\{[a-zA-Z]+\*?\}|\\[a-zA-Z]+\*?|\\.|\s+|[0-9]+|.", re.DOTALL)

_DOUBLED = re.compile(r"\\\\(?=[a-zA-Z{}])")
_ARRAY = re.compile(r"\\(begin|end)\{array\}(?:\s*\{[^{}]*\})?")
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_UNICODE = str.maketrans(CHARACTERS)

THIN, COMMA = "\\,", "{,}"  # a thin space, and a comma that separates no members
TEXTS = {
    r"\text",
    r"\textbf",
    r"\textit",
    r"\textrm",
    r"\textnormal",
    r"\textsf",
    r"\mathrm",
    r"\mbox",
    r"\hbox",
    r"\rm",
}
_ARGUMENTS = {r"\frac": 2, r"\binom": 2, r"\sqrt": 1, "^": 1, "_": 1, r"\mathbb": 1, r"\mathcal": 1, r"\vec": 1}
_ARGUMENTS |= {r"\overline": 1, r"\bar": 1, r"\hat": 1, r"\overrightarrow": 1, r"\widehat": 1, r"\tilde": 1}
_ONE_DIGIT = {r"\frac", r"\binom", r"\sqrt", r"\log"}
_FUNCTIONS = frozenset(
    [
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "arcsin",
        "arccos",
        "arctan",
        "sinh",
        "cosh",
        "tanh",
        "log",
        "ln",
        "exp",
        "max",
        "min",
        "gcd",
        "det",
    ]
)
_OPENING, _CLOSING = {"{", "(", "[", r"\{", r"\langle"}, {"}", ")", "]", r"\}", r"\rangle"}


@lru_cache(maxsize=4096)
def tidy(text: str) -> Tokens:
    """The tokens of a formula, without layout and with braces around every argument.

    Words stay whole as one token ``\\text{...}``. Raises ValueError where braces do not match.
    """
    text = text.translate(_UNICODE)
    if "matrix}" not in text and "array}" not in text:
        text = _DOUBLED.sub(r"\\", text)  # escaped once too often, in many data sets
    text = _ARRAY.sub(r"\\\1{matrix}", text)
    text = _RAISED.sub(lambda match: "^{" + "".join(_SUPERSCRIPTS[c] for c in match[0]) + "}", text)
    text = _LOWERED.sub(lambda match: "_{" + "".join(_SUBSCRIPTS[c] for c in match[0]) + "}", text)
    return _braced(_plain(tuple(_TOKEN.findall(text))))


def group_end(tokens: Tokens, start: int) -> int:
    """The place after the brace group that opens at ``start``."""
    depth = 0
    for place in range(start, len(tokens)):
        depth += {"{": 1, "}": -1}.get(tokens[place], 0)
        if depth == 0:
            return place + 1
    raise ValueError("braces that do not match")


def strip(tokens: Tokens) -> Tokens:
    """Without spaces at the ends."""
    start, end = 0, len(tokens)
    while start < end and tokens[start] in (" ", THIN):
        start += 1
    while end > start and tokens[end - 1] in (" ", THIN):
        end -= 1
    return tokens[start:end]


def split(tokens: Tokens, separators: frozenset[str] | set[str]) -> tuple[list[Tokens], list[str]]:
    """The parts between separators that stand outside every bracket, and the separators."""
    parts: list[Tokens] = []
    found: list[str] = []
    depth = start = 0
    for place, token in enumerate(tokens):
        if token in _OPENING:
            depth += 1
        elif token in _CLOSING:
            depth -= 1
        elif depth == 0 and token in separators:
            parts.append(strip(tokens[start:place]))
            found.append(token)
            start = place + 1
    parts.append(strip(tokens[start:]))
    return parts, found


def bracketed(tokens: Tokens) -> tuple[str, Tokens, str] | None:
    """The opening bracket, what is inside, and the closing one, where one pair of brackets holds everything."""
    if len(tokens) < 2 or tokens[0] not in _OPENING or tokens[-1] not in _CLOSING:
        return None
    depth = 0
    for place, token in enumerate(tokens):
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth == 0:
            return (tokens[0], strip(tokens[1:-1]), tokens[-1]) if place == len(tokens) - 1 else None
    return None


def words(token: str) -> str | None:
    """The words of a token that holds any."""
    return token[6:-1] if token.startswith(r"\text{") else None


def latex(tokens: Tokens) -> str:
    """Tokens as LaTeX again."""
    parts: list[str] = []
    for token, after in zip(tokens, (*tokens[1:], ""), strict=True):
        parts.append(" " if token == THIN else token)
        if re.fullmatch(r"\\[a-zA-Z]+", token) and after[:1].isalnum():
            parts.append(" ")
    return "".join(parts)


def _plain(tokens: Tokens) -> Tokens:
    """Without layout, with one name for each command, words in tokens of their own."""
    out: list[str] = []
    place = 0
    while place < len(tokens):
        token = tokens[place]
        place += 1
        if token in (r"\left", r"\right", r"\middle", r"\mleft", r"\mright"):
            place += place < len(tokens) and tokens[place] == "."
            place = _skip_spaces(tokens, place) if place < len(tokens) else place
            continue
        if token == "," and place < len(tokens) and tokens[place] == r"\!":
            place = _skip_spaces(tokens, place + 1)
            token = COMMA
        elif token == "{" and "".join(tokens[place : place + 4]).replace(" ", "")[:2] == ",}":
            place = tokens.index("}", place) + 1
            token = COMMA
        if token in DROPPED:
            continue
        if token in TEXTS or token == r"\operatorname" or token == r"\operatorname*":
            start = _skip_spaces(tokens, place)
            if start < len(tokens) and tokens[start] == "{":
                place = group_end(tokens, start)
                out += _text(token, tokens[start + 1 : place - 1])
                continue
            if token in (r"\rm", r"\hbox"):
                continue
        if token in FONTS:
            start = _skip_spaces(tokens, place)
            if start < len(tokens) and tokens[start] == "{":
                place = group_end(tokens, start)
                inner = _plain(tokens[start + 1 : place - 1])
                out += inner if len(strip(inner)) == 1 or all(part.isdigit() for part in inner) else ("{", *inner, "}")
                continue
            continue
        if token in (r"\hspace", r"\hspace*", r"\phantom", r"\label", r"\tag", r"\vspace", r"\color"):
            start = _skip_spaces(tokens, place)
            if start < len(tokens) and tokens[start] == "{":
                place = group_end(tokens, start)
            token = " "
        if token.isspace() or token in SPACES:
            if out and out[-1] != " ":
                out.append(" ")
            continue
        replaced = SYNONYMS.get(token, token)
        out += ("^", "{", r"\circ", "}") if replaced == r"^\circ" else (replaced,)
    return tuple(out)


def _text(command: str, content: Tokens) -> Tokens:
    """A command for upright text: its words as one token, or its content where that is a formula."""
    inner = _plain(content)
    bare = "".join(" " if token == THIN else token for token in inner).strip()
    if command.startswith(r"\operatorname"):
        return (rf"\{bare}",) if bare in _FUNCTIONS else (r"\operatorname{" + bare + "}",)
    if bare == "":
        return (" ",)
    if not any(character.isalpha() for character in bare):
        return inner
    if bare in ("e", "i", "d", "T") or any(token.startswith("\\") and token[1:].isalpha() for token in inner):
        return inner
    bare = bare.replace("{", "").replace("}", "")
    out: list[str] = []
    for part in re.findall(r"[0-9]+|,|\b(?:and|or)\b|(?:(?!\b(?:and|or)\b)[^0-9,])+", bare):  # such as \text{42 apples}
        out += (r"\text{" + part.strip() + "}",) if any(map(str.isalpha, part)) else _TOKEN.findall(part)
    return tuple(out)


def _skip_spaces(tokens: Tokens, place: int) -> int:
    while place < len(tokens) and tokens[place].isspace():
        place += 1
    return place


def _braced(tokens: Tokens) -> Tokens:
    """With braces around every argument, after TeX's rule: without a brace it is one token."""
    left = list(reversed(tokens))
    out: list[str] = []
    while left:
        token = left.pop()
        if token == "}":
            raise ValueError("braces that do not match")
        if token == "{":
            inner = _braced(_group(left))
            out += inner if len(inner) == 1 else ("{", *inner, "}")  # in TeX 1{5} is 15
        else:
            out += _command(token, left)
    return tuple(out)


def _command(token: str, left: list[str]) -> list[str]:
    """A token with its arguments, which are taken from ``left``, the tokens that follow in reverse."""
    out = [token]
    if token == r"\sqrt" and "]" in left and _next(left) == "[":
        while out[-1] != "]":
            out.append(left.pop())
        out[2:-1] = _braced(tuple(out[2:-1]))
    if token == r"\log" and _next(left) == "_":
        left.pop()
        return [token, "_", "{", *(_argument(r"\log", left) or ()), "}"]
    for _ in range(_ARGUMENTS.get(token, 0)):
        argument = _argument(token, left)
        if argument is None:
            break
        out += ("{", *argument, "}")
    return out


def _argument(command: str, left: list[str]) -> Tokens | None:
    following = _next(left)
    if following in ("", "}", "^", "_", "&", r"\\"):
        return None
    token = left.pop()
    if token == "{":
        return strip(_braced(_group(left)))
    if token.isdigit() and command in _ONE_DIGIT:
        if token[1:]:
            left.append(token[1:])
        return (token[0],)
    if command == "^" and token in ("+", "-") and (left and left[-1].isalnum()):
        return token, left.pop()  # TeX would raise the sign alone, which nobody means; nor a bracket alone
    if command == "^" and token == "(":
        depth, inside = 1, [token]
        while left and depth:
            inside.append(left.pop())
            depth += {"(": 1, ")": -1}.get(inside[-1], 0)
        return _braced(tuple(inside[1:-1] if depth == 0 else inside))
    return tuple(_command(token, left))


def _next(left: list[str]) -> str:
    """The next token that is no space."""
    while left and left[-1].isspace():
        left.pop()
    return left[-1] if left else ""


def _group(left: list[str]) -> Tokens:
    """The text up to the brace that closes, which is taken as well."""
    depth = 1
    inside: list[str] = []
    while left:
        token = left.pop()
        depth += {"{": 1, "}": -1}.get(token, 0)
        if depth == 0:
            return tuple(inside)
        inside.append(token)
    raise ValueError("braces that do not match")
