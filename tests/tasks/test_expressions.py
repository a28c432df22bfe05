"""The strict grammar: equal to Python's arithmetic where it accepts, silent and quick where it does not."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ebpo_core.tasks.expressions import MAX_DEPTH, MAX_DIGITS, MAX_LENGTH, parse_expression, parse_integer

numbers = st.integers(0, 10**MAX_DIGITS - 1).map(str)
spaces = st.sampled_from(["", " ", "  "])


def combine(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    operation = st.builds("{0}{2}{1}{3}{4}".format, parts, st.sampled_from("+-*"), spaces, spaces, parts)
    return operation | st.builds("({0}{1}{0})".format, spaces, parts)


expressions = st.recursive(numbers, combine, max_leaves=12).filter(lambda text: len(text) <= MAX_LENGTH)


def python_value(text: str) -> Any:
    """Python's own parser as the oracle; safe, since ``text`` was generated here from digits and operators."""
    # Python refuses leading zeros; none are generated, for integers come from str(int).
    return eval(text, {"__builtins__": {}})  # noqa: S307


@given(expressions)
def test_agrees_with_python(text: str) -> None:
    parsed = parse_expression(text)
    assert parsed is not None
    assert parsed.value == python_value(text)
    assert parsed.operators == set(text) & set("+-*")
    assert sorted(parsed.numbers) == sorted(int(part) for part in text.translate(SEPARATORS).split())


SEPARATORS = str.maketrans("+-*()", "     ")


@given(st.text() | st.text(alphabet="0123456789+-*/() ._e\n\t", max_size=40))
@example("9**9**9**9")
@example("1_000")
@example("٣+٤")
def test_arbitrary_text_never_raises_and_is_python_where_accepted(text: str) -> None:
    parsed = parse_expression(text)
    if parsed is not None:
        assert set(text) <= set("0123456789+-*() ")
        # Leading zeros are integers here and an error in Python.
        plain = " ".join(str(int(part)) if part.isdigit() else part for part in tokens(text))
        assert parsed.value == python_value(plain)
    integer = parse_integer(text)
    assert integer is None or integer == int(text)


def tokens(text: str) -> list[str]:
    for symbol in "+-*()":
        text = text.replace(symbol, f" {symbol} ")
    return text.split()


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "9**9**9**9",
        "2 ** 3",
        "__import__('os').system('true')",
        "1 + + 2",
        "-1 + 2",
        "+1",
        "1 2",
        "1 +",
        "* 2",
        "()",
        "(1",
        "1)",
        "(1))",
        "2(3)",
        "1 / 2",
        "1 // 2",
        "1.5 + 1",
        "1e3",
        "0x10",
        "1_0",
        "\N{ARABIC-INDIC DIGIT THREE} + 4",
        "\N{SUPERSCRIPT TWO}",
        "\N{FULLWIDTH DIGIT ONE}",
        "1\n+ 2",
        "1\t+ 2",
        "1 + 2 # three",
        "1 + 2;",
        "lambda: 1",
        "1 if 1 else 2",
        "9" * (MAX_DIGITS + 1),
        "1 + " * (MAX_LENGTH // 4) + "1 + 1",
        "(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1),
        "(" * 1_000_000,
        "9" * 1_000_000,
        " " * 1_000_000 + "1",
        "1*" * 1_000_000 + "1",
    ],
    ids=lambda text: text[:24] or "empty",
)
def test_text_outside_the_grammar_is_no_expression(text: str) -> None:
    assert parse_expression(text) is None


def test_limits_are_inclusive() -> None:
    assert parse_expression("9" * MAX_DIGITS).value == 10**MAX_DIGITS - 1  # type: ignore[union-attr]
    assert parse_expression("(" * MAX_DEPTH + "7" + ")" * MAX_DEPTH).value == 7  # type: ignore[union-attr]
    longest = "1+" * (MAX_LENGTH // 2 - 1) + "11"
    assert len(longest) == MAX_LENGTH
    assert parse_expression(longest).value == MAX_LENGTH // 2 - 1 + 11  # type: ignore[union-attr]


def test_precedence_and_associativity() -> None:
    assert parse_expression("2 + 3 * 4 - 5 - 6").value == 3  # type: ignore[union-attr]
    assert parse_expression("(2 + 3) * (4 - 5) - 6").value == -11  # type: ignore[union-attr]


def test_depth_bounds_recursion_whatever_the_interpreter_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = sys.getrecursionlimit()
    monkeypatch.setattr("ebpo_core.tasks.expressions.MAX_LENGTH", 10 * limit)
    assert parse_expression("(" * limit + "1" + ")" * limit) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        (" -7\n", -7),
        ("007", 7),
        ("", None),
        ("-", None),
        ("--7", None),
        ("+7", None),
        ("4 2", None),
        ("4.0", None),
        ("\N{ARABIC-INDIC DIGIT FOUR}", None),
        ("1" * (MAX_DIGITS + 1), None),
        ("1" * 1_000_000, None),
        ("7" + " " * 1_000_000, None),
    ],
    ids=lambda value: str(value)[:12],
)
def test_integers(text: str, value: int | None) -> None:
    assert parse_integer(text) == value
