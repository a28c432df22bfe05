"""What is the same answer: a table by kind, both presets, votes, and references that cannot be scored."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("math_verify")

from math_pairs import PAIRS

from ebpo_core.rewards import MathVerifier

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def strict() -> Iterator[MathVerifier]:
    with MathVerifier(workers=2, timeout=30) as verifier:
        yield verifier


@pytest.fixture(scope="module")
def lenient() -> Iterator[MathVerifier]:
    with MathVerifier(preset="lenient", workers=1, timeout=30) as verifier:
        yield verifier


def scores(verifier: MathVerifier, pairs: list[tuple[str, str, int]]) -> list[float]:
    return verifier.score([f"\\boxed{{{answer}}}" for _, answer, _ in pairs], [reference for reference, *_ in pairs])


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_of_a_kind(strict: MathVerifier, kind: str) -> None:
    pairs = [pair for pair in PAIRS[kind] if "\\frac{1}{0}" not in pair[0]]
    found = scores(strict, pairs)
    wrong = [pair for pair, score in zip(pairs, found, strict=True) if score != pair[2]]
    assert wrong == []


@pytest.mark.parametrize("kind", PAIRS)
def test_strict_is_symmetric(strict: MathVerifier, kind: str) -> None:
    # "12,345" is a number; beside a list as reference it may be a list of two.
    pairs = [(a, r, s) for r, a, s in PAIRS[kind] if not {r, a} & {"12,345", "2,100"}]
    known = strict.scorable([reference for reference, *_ in pairs])
    pairs = [pair for pair, fine in zip(pairs, known, strict=True) if fine]
    wrong = [pair for pair, score in zip(pairs, scores(strict, pairs), strict=True) if score != pair[2]]
    assert wrong == []


LENIENT_ONLY = [
    ("20\\%", "20"),
    ("20", "20\\%"),
    ("\\frac{1}{3}", "0.3333"),
    ("0.33", "\\frac{1}{3}"),
    ("3.14", "\\pi"),
    ("3.14", "3.14159"),
    ("\\sqrt{2}", "1.4142"),
    ("1000.99", "1000,99"),
    ("(1,3)", "1,3"),
    ("(3,4)", "x=3, y=4"),
    ("x", "X"),
    ("11", "x=5+5+2=11"),
    ("1,2", "1,2,2"),
]
NEVER = [
    ("42", "42.4"),
    ("3.14", "3.15"),
    ("\\pi", "3.14"),
    ("0.5", "0.52"),
    ("(1,3)", "3,1"),
    ("(1,3)", "\\{1,3\\}"),
    ("6\\text{ cm}", "6\\text{ m}"),
    ("R^2-r^2", "0"),
    ("6.63\\times10^{-34}", "6.62\\times10^{-34}"),
    ("0.2", "20"),
    ("\\frac{1}{2^{99}}", "\\frac{1}{2^{98}}"),
]


def test_what_only_lenient_accepts(strict: MathVerifier, lenient: MathVerifier) -> None:
    accepted = [(reference, answer, 1) for reference, answer in LENIENT_ONLY]
    assert dict(zip(LENIENT_ONLY, scores(lenient, accepted), strict=True)) == dict.fromkeys(LENIENT_ONLY, 1.0)
    assert dict(zip(LENIENT_ONLY, scores(strict, accepted), strict=True)) == dict.fromkeys(LENIENT_ONLY, 0.0)
    refused = [(reference, answer, 0) for reference, answer in NEVER]
    assert dict(zip(NEVER, scores(lenient, refused), strict=True)) == dict.fromkeys(NEVER, 0.0)


def test_lenient_accepts_what_strict_does(lenient: MathVerifier) -> None:
    pairs = [pair for kind in PAIRS.values() for pair in kind if pair[2] == 1]
    wrong = [pair for pair, score in zip(pairs, scores(lenient, pairs), strict=True) if score != 1]
    assert wrong == []


def test_votes_group_answers_by_meaning(strict: MathVerifier) -> None:
    answers = ["\\frac12", "0.5", None, "x+1", "1+x", "41", "41.0", "@@@", "@@@", "1/2", "(((("]
    assert strict.groups(answers) == [0, 0, None, 3, 3, 5, 5, 7, 7, 0, 10]


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        (42, "42"),
        (42.0, "42"),
        (1e-05, "0.00001"),
        (Fraction(1, 2), "0.5"),
        (Decimal("0.5"), "1/2"),
        (["42"], "42"),
        ("Answer: 34", "34"),
        ("The answer is 34.", "34"),
        ("**Answer:** 34", "34"),
        ("<answer>34</answer>", "34"),
        ("The final answer is $34$. I hope it is correct.", "34"),
    ],
)
def test_references_that_are_read(strict: MathVerifier, reference: Any, answer: str) -> None:
    assert strict.score([f"\\boxed{{{answer}}}", "\\boxed{7}"], [reference] * 2) == [1.0, 0.0]


def test_the_outer_of_nested_boxes_is_the_answer(strict: MathVerifier) -> None:
    completions = [r"\boxed{-\boxed{42}}", r"\boxed{-\boxed{42}}", r"\boxed{43-\boxed{1}}", r"\boxed{\boxed{42}}"]
    assert strict.score(completions, ["42", "-42", "1", "42"]) == [0.0, 1.0, 0.0, 1.0]


def test_numpy_scalars_are_numbers(strict: MathVerifier) -> None:
    np = pytest.importorskip("numpy")
    assert strict.score(["\\boxed{42}"] * 2, [np.int64(42), np.float32(42)]) == [1.0, 1.0]
    assert math.isnan(strict.score(["\\boxed{42}"], [np.float64("nan")])[0])


@pytest.mark.parametrize("reference", [{"value": 34}, True, ["1", "2"], b"34", object()])
def test_references_of_a_wrong_type_are_named(strict: MathVerifier, reference: Any) -> None:
    with pytest.raises(TypeError, match=f"is a {type(reference).__name__}: give the answer as text or a number"):
        strict.score(["\\boxed{34}"], [reference])
    assert strict.scorable([reference]) == [False]


@pytest.mark.parametrize(
    "reference", ["There are 34 apples and 2 pears in it", "see solution 3 above", "1, \\ldots, 9"]
)
def test_sentences_are_unscorable_not_zero(strict: MathVerifier, reference: str) -> None:
    assert math.isnan(strict.score(["\\boxed{34}"], [reference])[0])
    assert strict.scorable([reference]) == [False]


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(ValueError, match="preset='loose': choose one of strict, lenient"):
        MathVerifier(preset="loose")
