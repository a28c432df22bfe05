"""Integer arithmetic read from model text by a strict grammar, without ``eval`` and without a symbolic library.

    expression := term (("+" | "-") term)*
    term       := factor ("*" factor)*
    factor     := integer | "(" expression ")"
    integer    := 1 to ``MAX_DIGITS`` ASCII digits

Precedence and associativity are those of ordinary arithmetic. Spaces may stand between tokens; nothing else may: no
unary sign, no other alphabet's digits, no underscore, no power, no name. Text outside the grammar or beyond a limit is
simply not an expression (``None``), so a verifier built on this scores it 0 in a time bounded by ``MAX_LENGTH``.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_LENGTH = 256  # characters beyond which text is refused unread
MAX_DIGITS = 9  # of an integer
MAX_DEPTH = 16  # parentheses that are open at once

_TOKEN = re.compile(r" *([0-9]+|[-+*()])")
_INTEGER = re.compile(r"-?[0-9]+")


class Expression(NamedTuple):
    """A whole expression: its value, the integers in order of appearance, and the operators that were used."""

    value: int
    numbers: tuple[int, ...]
    operators: frozenset[str]


class _RejectedError(Exception):
    """The text left the grammar; raised and caught inside this module only."""


class _Parser:
    """Recursive descent over a bounded token list; recursion only happens at "(", so ``MAX_DEPTH`` bounds it."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0
        self.numbers: list[int] = []
        self.operators: set[str] = set()

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.position += 1
        return token

    def expression(self, depth: int) -> int:
        value = self.term(depth)
        while self.peek() in ("+", "-"):
            operator = self.take()
            self.operators.add(operator)
            right = self.term(depth)
            value = value + right if operator == "+" else value - right
        return value

    def term(self, depth: int) -> int:
        value = self.factor(depth)
        while self.peek() == "*":
            self.operators.add(self.take())
            value *= self.factor(depth)
        return value

    def factor(self, depth: int) -> int:
        token = self.take()
        if token == "(":  # noqa: S105
            if depth >= MAX_DEPTH:
                raise _RejectedError
            value = self.expression(depth + 1)
            if self.take() != ")":
                raise _RejectedError
            return value
        if not token.isdigit() or len(token) > MAX_DIGITS:
            raise _RejectedError
        self.numbers.append(int(token))
        return self.numbers[-1]


def parse_expression(text: str) -> Expression | None:
    """Read one whole expression.

    Args:
        text: Any text, trusted or not; leading and trailing spaces are allowed.

    Returns:
        The expression, or None where ``text`` is not one within the limits. Never raises on text.
    """
    if len(text) > MAX_LENGTH:
        return None
    text = text.strip(" ")
    tokens: list[str] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        tokens.append(match[1])
        position = match.end()
    parser = _Parser(tokens)
    try:
        value = parser.expression(0)
    except _RejectedError:
        return None
    if parser.position != len(tokens):
        return None
    return Expression(value, tuple(parser.numbers), frozenset(parser.operators))


def parse_integer(text: str) -> int | None:
    """Read ``text`` as one integer in ASCII digits with an optional leading "-"; spaces around it are allowed.

    Returns:
        The integer, or None where ``text`` is anything else or longer than ``MAX_DIGITS``. Never raises on text.
    """
    # Bounded before stripping, so that a megabyte of spaces is not copied.
    if len(text) > MAX_LENGTH:
        return None
    text = text.strip(" \t\r\n")
    if _INTEGER.fullmatch(text) is None or len(text.lstrip("-")) > MAX_DIGITS:
        return None
    return int(text)
