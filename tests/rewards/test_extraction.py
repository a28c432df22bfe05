"""What counts as a final answer, and which numbers and texts are the same: no process is started here."""

from __future__ import annotations

import sys
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ebpo_core.rewards import MathVerifier, final_answer
from ebpo_core.rewards.extraction import reference_answer
from ebpo_core.rewards.limits import MAX_DEPTH, MAX_LENGTH, refusal
from ebpo_core.rewards.numerals import UnreadableError
from ebpo_core.rewards.presets import STRICT
from ebpo_core.rewards.reading import read
from ebpo_core.rewards.simple import decided


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{42}.", "42"),
        ("\\boxed{41} no, \\boxed{42}", "42"),
        ("\\boxed {\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{\\boxed{7}}", "7"),
        ("\\boxed{-\\boxed{42}}", "-\\boxed{42}"),
        ("\\boxed{\\frac{\\boxed{42}}{2}}", "\\frac{\\boxed{42}}{2}"),
        ("\\boxed{\\boxed{1}, \\boxed{2}}", "\\boxed{1}, \\boxed{2}"),
        ("$$\\boxed{a\\text{ or }b}$$", "a\\text{ or }b"),
        ("I put it in \\boxed as asked: \\boxed{5}", "5"),
        ("\\boxed{5}, that is \\boxed", "5"),
        ("\\boxed{41} then \\boxed{4", None),
        ("\\boxed{}", None),
        ("So \\boxed{42}. Double-checking the answer: 6*7=42 ok", "42"),
        ("\\boxed{42}. I put it within \\boxed{}.", "42"),
        ("\\boxed{42}, the answer is above", "42"),
        ("\\boxed{42}\nFinal Answer: see the box", "42"),
        ("\\fbox{42}", "42"),
        ("\\boxed{42}, as asked in \\boxed{...} or \\boxed{\\;} or \\boxed{\\text{ }}", "42"),
        ("First \\boxed{3}. Then, \\boxed{42}.", "42"),
        ("$a = \\boxed{1}$ and $b = \\boxed{2}$", "1, 2"),
        ("\\boxed{1}, \\boxed{2}", "1, 2"),
        ("\\boxed{1} and \\boxed{2}", "1, 2"),
        ("$\\boxed{1}$\n$\\boxed{2}$", "1, 2"),
        ("\\boxed{1} \\text{ and } \\boxed{2}", "1, 2"),
        ("\\boxed{1}, \\boxed{2} and \\boxed{3}", "1, 2, 3"),
        ("\\boxed{42}\n\n**Final Answer**\n\\boxed{42}", "42"),
        ("\\boxed{41}. That is wrong. So \\boxed{42}", "42"),
        ("Answer:\n\\[\n42\n\\]", "42"),
        ("Answer:\n$$\n\\frac{1}{2}\n$$\nok", "\\frac{1}{2}"),
        ("\\textbf{Answer:} 42", "42"),
        ("\\textbf{Answer: 42}", "42"),
        ("**Answer**: 42", "42"),
        ("<answer>42</answer>", "42"),
        ("<think>\\boxed{41}</think><answer> 42 </answer> done", "42"),
        ("<answer>41</answer> <answer>42</answer>", "42"),
        ("<answer>\\boxed{42}</answer>", "42"),
        ("The final answer is $42$. I hope it is correct.", "$42$"),
        ("Answer: 42", "42"),
        ("ANSWER:42\nthanks", "42"),
        ("**Answer:** $42$", "$42$"),
        ("**Final answer: 42**", "42"),
        ("Answer:\n\n42\n", "42"),
        ("Answer: 4**2", "4**2"),
        ("Answer: 1\nAnswer: 2", "2"),
        ("Answer: \\boxed{42}.", "42"),
        ("Answer: 41\n\\boxed{42}", "42"),
        ("\\boxed{42}\nAnswer: 41", "42"),
        ("\\boxed{\\text{Answer: }42}", "\\text{Answer: }42"),
        ("Answer:", None),
        ("it is 6*7\n#### 42", "42"),
        ("#### $1,042\n", "$1,042"),
        ("#### 3. Add them\nso \\boxed{42}", "42"),
        ("\\boxed{42}\n#### Check", "42"),
        ("##### 42", None),
        ("The answer is 42.", None),
        ("42", None),
        ("", None),
    ],
)
def test_the_last_marker_states_the_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\frac{1}{2}", "\\frac{1}{2}"),
        (" 42 ", "42"),
        ("so $\\boxed{42}$", "42"),
        ("6*7\n#### 42", "42"),
        ("Answer: 42", "42"),
        ("The answer is 42", "42"),
        ("\\boxed{", "\\boxed{"),
    ],
)
def test_a_reference_is_bare_or_ends_a_solution(text: str, answer: str) -> None:
    assert reference_answer(text) == answer


@given(st.text() | st.text(alphabet="\\boxed{}Answer:#$ 1/2\n*", max_size=80))
@example("\\boxed{" * 1000)
@example("answer" + " " * 100_000)
@example("#### 1\n" * 50_000 + "x")
@example("\ud800\x00")
def test_arbitrary_text_is_read_without_raising(text: str) -> None:
    answer = final_answer(text)
    assert answer is None or 0 < len(answer) <= MAX_LENGTH + 1
    if answer is not None and refusal(answer) is None:
        try:
            node = read(answer)
        except UnreadableError:
            return
        assert decided(node, node, STRICT) in (True, None)


SAME = [
    ("42", "42 apples"),
    ("20\\%", "0.2"),
    ("42000000", "42\\text{ million}"),
    ("42", "42.0"),
    ("42", "042"),
    ("42", "$42$"),
    ("42", "\\(42\\)"),
    ("42", "42."),
    ("42", "+42"),
    ("-3", "\N{MINUS SIGN}3"),
    ("-3", "- 3"),
    ("1234", "1,234"),
    ("1234567", "1{,}234{,}567"),
    ("10000", "10,\\!000"),
    ("0.5", ".5"),
    ("0.5", "1/2"),
    ("\\frac{1}{2}", "0.50"),
    ("\\frac{1}{2}", "\\dfrac12"),
    ("\\frac{1}{2}", "\\tfrac{1}2"),
    ("\\frac{1}{2}", "\\frac 1 2"),
    ("-\\frac{1}{2}", "\\frac{-1}{2}"),
    ("\\frac{1}{2}", "2/4"),
    ("42", "42\\text{ cm}"),
    ("42", "42 \\mathrm{cm}^2"),
    ("42\\text{ cm}", "42"),
    ("42\\text{ cm}", "42 \\text{cm}"),
    ("42", "42 dollars"),
    ("42 dollars", "\\$42"),
    ("42", "$42"),
    ("90^\\circ", "90"),
    ("90", "90^{\\circ}"),
    ("90 degrees", "90^\\circ"),
    ("101_2", "101_{2}"),
    ("101_{2}", "101"),
    ("20\\%", "20\\%"),
    ("20%", "20 percent"),
    ("0.2", "20\\%"),
    ("\\text{Monday}", "Monday."),
    ("no solution", "\\text{No solution}"),
    ("A", "\\text{(A)}"),
    ("(B)", "B"),
    ("x^2 + 1", "$x^2+1$"),
    ("6\\pi\\text{ cm}", "6\\pi"),
]

DIFFERENT = [
    ("20\\%", "20"),
    ("42", "42\\text{ million}"),
    ("42", "41"),
    ("42", "-42"),
    ("42", "42\\%"),
    ("42\\text{ cm}", "42\\%"),
    ("\\frac{1}{3}", "0.333333"),
    ("42\\text{ cm}", "42\\text{ m}"),
    ("42\\text{ cm}^2", "42\\text{ cm}^3"),
    ("\\$42", "42 cents"),
    ("101_2", "101_3"),
    ("42", "\\text{forty-two}"),
    ("Evelyn", "Evelny"),
    ("\\text{Monday}", "Tuesday"),
    ("1000000", "1"),
]

UNDECIDED = [
    ("42", "84/2 = 42"),
    ("42", "41=42"),
    ("42", "x=41=42"),
    ("(1,2)", "(1,3)"),
    ("42", "6\\cdot 7"),
    ("42", "x=42"),
    ("42", "42 or 43"),
    ("42", "1,23"),
    ("42", "1/0"),
    ("42", "1e999999999"),
    ("x+1", "1+x"),
    ("1, 2", "2, 1"),
    ("A_1", "A_2"),
]


@pytest.mark.parametrize(("reference", "answer"), SAME)
def test_the_same(reference: str, answer: str) -> None:
    assert decided(read(reference), read(answer), STRICT) is True


@pytest.mark.parametrize(("reference", "answer"), DIFFERENT)
def test_different(reference: str, answer: str) -> None:
    assert decided(read(reference), read(answer), STRICT) is False


@pytest.mark.parametrize(("reference", "answer"), UNDECIDED)
def test_left_to_math_verify(reference: str, answer: str) -> None:
    assert decided(read(reference), read(answer), STRICT) is None


integers = st.integers(-(10**30), 10**30)


@given(integers, st.integers(1, 10**12))
def test_numbers_are_read_exactly(numerator: int, denominator: int) -> None:
    value = Fraction(numerator, denominator)
    for text in (f"{numerator}/{denominator}", f"\\frac{{{numerator:,}}}{{{denominator}}}"):
        assert read(text).number == value
    assert read(f"{numerator:,}").number == numerator
    decimals = f"{numerator // 1000}.{abs(numerator) % 1000:03}" if numerator >= 0 else str(numerator)
    assert read(decimals).number == (Fraction(numerator, 1000) if numerator >= 0 else numerator)


@pytest.mark.parametrize(
    "text",
    [
        "9" * (MAX_LENGTH + 1),
        "(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1),
        "9**9**9**9",
        "9^{9^{9^{9}}}",
        "(9^9)^{9^9}",
        "10^{1000001}",
        "4\x002",
        "4\ud8002",
        "4\u202e2",
        "1e99999",
        "2^{-9999999}",
        "__import__('os').system('true')",
        "42}{",
        "{42",
    ],
    ids=ascii,
)
def test_refused(text: str) -> None:
    assert refusal(text) is not None


@pytest.mark.parametrize(
    "text",
    [
        "9" * MAX_LENGTH,
        "(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH,
        "2^{2024}-1",
        "2^{2^{10}}",
        "(x^2)^3",
        "e^{x^{2}}",
        "9^{1^{9}}",
        "\\frac 1 2",
        "\\{1, 2\\}",
        "\\left\\{ 1 \\right.",
        "1, 2",
        "是",
    ],
    ids=ascii,
)
def test_not_refused(text: str) -> None:
    assert refusal(text) is None


@pytest.mark.parametrize("text", ["40 2", "40\\quad 2", "1.2.3", "see solution 3 above", "1, \\ldots, 9", "42}{"])
def test_unreadable(text: str) -> None:
    with pytest.raises(UnreadableError):
        read(text)


def test_without_math_verify_nothing_is_undecided_and_no_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)  # Python's own way to say: not installed
    with pytest.raises(ImportError, match=r"ebpo-core\[math\].*math_verify=False"):
        MathVerifier()
    with MathVerifier(math_verify=False) as verifier:
        scores = verifier.score(["\\boxed{x+1}", "\\boxed{1+x}", "\\boxed{6\\cdot 7}", "x"], ["x+1", "x+1", "42", "42"])
        assert scores == [1.0, 0.0, 0.0, 0.0]
        assert verifier.pool.pids == []
        assert verifier.metrics["verifier/fast"] == 3
        assert verifier.metrics["verifier/no_answer"] == 1
        assert verifier.metrics["verifier/answers"] == 4


def test_numbers_need_no_process() -> None:
    pytest.importorskip("math_verify")
    with MathVerifier() as verifier:
        assert verifier.score(["\\boxed{1/2}", "Answer: 3", "#### 7"], ["0.5", 4, 7.0]) == [1.0, 0.0, 1.0]
        assert verifier.pool.pids == []


def test_only_what_follows_the_reasoning_counts() -> None:
    texts = ["<think>\\boxed{41}</think>\\boxed{42}", "<think>\\boxed{42}", "<think>\\boxed{42}</think>42"]
    with MathVerifier(math_verify=False, after="</think>") as verifier:
        assert verifier.score(texts, ["42"] * 3) == [1.0, 0.0, 0.0]
        assert verifier.metrics["verifier/no_answer"] == 2


@pytest.mark.parametrize(
    "options",
    [{"workers": 0}, {"workers": 0.5}, {"timeout": 0}, {"timeout": float("nan")}, {"memory_mb": -1}, {"after": ""}],
)
def test_options_out_of_range_are_named(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        MathVerifier(**options)  # type: ignore[arg-type]


def test_one_reference_per_completion() -> None:
    with MathVerifier(math_verify=False) as verifier, pytest.raises(ValueError, match="1 and 2"):
        verifier.score(["\\boxed{1}"], ["1", "2"])
