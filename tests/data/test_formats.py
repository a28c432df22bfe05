"""Every published form is read from rows in its real schema; forms that cannot be told apart are an error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from ebpo_core.data import BOXED, FORMATS, Problem, read

if TYPE_CHECKING:
    from pathlib import Path

DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'
DAPO_PROMPT = f"{DAPO_PREFIX}What is $6 \\cdot 7$?{DAPO_SUFFIX}"
QUESTION = "What is $6 \\cdot 7$?"

# name: (row, format that it is told to be, what is read). A prompt of None is the question with the instruction.
ROWS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "openai/gsm8k": (
        {"question": QUESTION, "answer": "It is 6*7=<<6*7=42>>1,042 - 1000.\n#### 1,042"},
        "gsm8k",
        {"answer": "1042", "id": "data/0"},
    ),
    "BytedTsinghua-SIA/DAPO-Math-17k": (
        {
            "data_source": "math_dapo",
            "prompt": [{"content": DAPO_PROMPT, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "42", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
        },
        "verl",
        {"prompt": DAPO_PROMPT, "id": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079", "source": "math_dapo"},
    ),
    "open-r1/DAPO-Math-17k-Processed": (
        {
            "prompt": QUESTION,
            "solution": "42",
            "data_source": "math_dapo",
            "source_prompt": [{"content": DAPO_PROMPT, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "42", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4"},
        },
        "dapo-processed",
        {"prompt": DAPO_PROMPT, "id": "9a9b6eb4"},
    ),
    "Maxwell-Jia/AIME_2024": (
        {"ID": "2024-II-4", "Problem": QUESTION, "Solution": "Multiply.", "Answer": 42},
        "aime",
        {"id": "2024-II-4"},
    ),
    "HuggingFaceH4/aime_2024": (
        {"id": 60, "problem": QUESTION, "solution": "Multiply.", "answer": "042", "url": "https://x", "year": "2024"},
        "aime",
        {"id": "60", "answer": "042"},
    ),
    "AI-MO/aimo-validation-aime": (
        {"id": 0, "problem": QUESTION, "solution": "Multiply.", "answer": "42", "url": "https://x"},
        "aime",
        {"id": "0"},
    ),
    "math-ai/aime24": (
        {"id": 60, "problem": QUESTION, "solution": "\\boxed{42}", "url": "https://x"},
        "aime",
        {"id": "60"},
    ),
    "math-ai/aime25": ({"problem": QUESTION, "answer": "42", "id": "0"}, "aime", {"id": "0"}),
    "MathArena/aime_2025": (
        {"problem_idx": 1, "problem": QUESTION, "answer": 0, "problem_type": ["Number Theory"]},
        "aime",
        {"answer": "0", "id": "data/0"},
    ),
    "opencompass/AIME2025": ({"question": QUESTION, "answer": "42"}, "aime", {"id": "data/0"}),
    "AI-MO/aimo-validation-amc": (
        {"id": 3, "problem": QUESTION, "answer": 42.0, "url": "https://x"},
        "amc",
        {"id": "3"},
    ),
    "math-ai/amc23": (
        {"id": 3, "question": QUESTION, "answer": "27.5", "url": "https://x"},
        "amc",
        {"answer": "27.5", "id": "3"},
    ),
    "HuggingFaceH4/MATH-500": (
        {
            "problem": QUESTION,
            "solution": "$\\boxed{\\frac{84}{2}}$",
            "answer": "\\frac{84}{2}",
            "subject": "Prealgebra",
            "level": 5,
            "unique_id": "test/prealgebra/1.json",
        },
        "math",
        {"answer": "\\frac{84}{2}", "topic": "Prealgebra", "level": "5", "id": "test/prealgebra/1.json"},
    ),
    "EleutherAI/hendrycks_math": (
        {
            "problem": QUESTION,
            "level": "Level 3",
            "type": "Number Theory",
            "solution": "So $\\boxed{\\left\\{ \\frac{1}{2} \\right\\}}$.",
        },
        "math",
        {"answer": "\\left\\{ \\frac{1}{2} \\right\\}", "topic": "Number Theory", "level": "3", "id": "data/0"},
    ),
    "Hothan/OlympiadBench": (
        {
            "id": 1606,
            "question": QUESTION,
            "solution": ["Multiply."],
            "final_answer": ["$42$", "$\\frac{1}{2}$"],
            "context": None,
            "image_1": None,
            "image_2": None,
            "modality": "Text-only",
            "difficulty": "Competition",
            "is_multiple_answer": True,
            "unit": None,
            "answer_type": "Numerical",
            "error": None,
            "question_type": "Open-ended",
            "subfield": "Algebra",
            "subject": "Math",
            "language": "English",
        },
        "olympiadbench",
        {"answer": "42, \\frac{1}{2}", "topic": "Algebra", "level": "Competition", "id": "1606"},
    ),
    "agentica-org/DeepScaleR-Preview-Dataset": (
        {"problem": QUESTION, "answer": "42", "solution": "Multiply."},
        "deepscaler",
        {"id": "data/0"},
    ),
    "AI-MO/NuminaMath-1.5": (
        {
            "problem": QUESTION,
            "solution": "Multiply: $\\boxed{42}$",
            "answer": "42",
            "problem_type": "Algebra",
            "question_type": "math-word-problem",
            "problem_is_valid": "Yes",
            "solution_is_valid": "Yes",
            "source": "olympiads",
            "synthetic": False,
        },
        "numinamath",
        {"topic": "Algebra", "id": "data/0", "source": "olympiads"},
    ),
    "AI-MO/NuminaMath-CoT": (
        {
            "source": "cn_k12",
            "problem": QUESTION,
            "solution": "Multiply: $\\boxed{42}$",
            "messages": [{"content": QUESTION, "role": "user"}],
        },
        "numinamath",
        {"id": "data/0", "source": "cn_k12"},
    ),
    "open-r1/OpenR1-Math-220k": (
        {
            "problem": QUESTION,
            "solution": "Multiply.",
            "answer": "42",
            "problem_type": "Algebra",
            "question_type": "math-word-problem",
            "source": "olympiads",
            "uuid": "c1",
            "is_reasoning_complete": [True],
            "generations": ["<think>...</think> \\boxed{42}"],
            "correctness_math_verify": [True],
            "finish_reasons": None,
            "correctness_count": 1,
            "messages": [{"content": QUESTION, "role": "user"}],
        },
        "openr1",
        {"topic": "Algebra", "id": "c1", "source": "olympiads"},
    ),
    "SynthLabsAI/Big-Math-RL-Verified": (
        {
            "problem": QUESTION,
            "answer": "42",
            "source": "orca_math",
            "domain": ["Mathematics -> Algebra -> Prealgebra -> Integers"],
            "llama8b_solve_rate": 0.75,
        },
        "big-math",
        {"topic": "Algebra", "id": "data/0", "source": "orca_math"},
    ),
    "Minerva as Qwen2.5-Math evaluates it": (
        {"problem": QUESTION, "solution": "So $\\boxed{42}$.", "type": "Introduction to Astronomy", "idx": 7},
        "minerva",
        {"topic": "Introduction to Astronomy", "id": "7"},
    ),
    "problems and answers alone": ({"problem": QUESTION, "answer": "42"}, "minerva", {"id": "data/0"}),
    "OlympiadBench, copied to three columns": (
        {"id": "1606", "problem": QUESTION, "answer": "$42$"},
        "aime",
        {"id": "1606", "answer": "$42$"},
    ),
    "problems of one's own": (
        {"id": "a", "prompt": QUESTION, "answer": "42", "topic": "mul", "level": "1", "source": "mine"},
        "problem",
        {"prompt": QUESTION, "id": "a", "topic": "mul", "level": "1", "source": "mine"},
    ),
}


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ROWS)
def test_published_form(name: str, tmp_path: Path) -> None:
    row, form, expected = ROWS[name]
    path = write(tmp_path, row)
    problem = Problem(
        **{
            "prompt": f"{QUESTION}\n\n{BOXED}",
            "answer": "42",
            "topic": None,
            "level": None,
            "source": "data",
            **expected,
        }
    )
    assert read(path) == [problem]
    assert read(path, form) == [problem]


def test_proofs_and_faulty_rows_of_numinamath_are_left_out(tmp_path: Path) -> None:
    row = ROWS["AI-MO/NuminaMath-1.5"][0]
    changes: list[dict[str, Any]] = [
        {"answer": "proof"},
        {"answer": "notfound"},
        {"question_type": "proof"},
        {"problem_is_valid": "No"},
        {"answer": None, "solution": "qed"},
    ]
    path = write(tmp_path, row, *({**row, **change} for change in changes))
    with pytest.warns(UserWarning, match=r"data: 5 rows left out.*the first: row 1"):
        assert [problem.answer for problem in read(path)] == ["42"]


def test_every_form_is_read_above() -> None:
    assert {form for _, form, _ in ROWS.values()} == set(FORMATS)


def test_the_instruction_follows_bare_questions_only(tmp_path: Path) -> None:
    for name, prompt in (("openai/gsm8k", QUESTION), ("BytedTsinghua-SIA/DAPO-Math-17k", DAPO_PROMPT)):
        assert read(write(tmp_path, ROWS[name][0]), instruction=None)[0].prompt == prompt
    assert read(write(tmp_path, ROWS["openai/gsm8k"][0]), instruction="End on ####.")[0].prompt.endswith(
        "\n\nEnd on ####."
    )


def test_unknown_columns_list_the_forms_and_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not known") as error:
        read(write(tmp_path, {"text": "What?", "label": 1}))
    assert "['label', 'text']" in str(error.value)
    assert all(f"{form}: {{" in str(error.value) for form in FORMATS)


def test_columns_of_two_forms_are_ambiguous_and_a_name_decides(tmp_path: Path) -> None:
    path = write(tmp_path, {**ROWS["Maxwell-Jia/AIME_2024"][0], **ROWS["problems of one's own"][0], "answer": "43"})
    with pytest.raises(ValueError, match=r"ambiguous between \['aime', 'problem'\]"):
        read(path)
    assert read(path, "aime")[0].answer == "42"
    assert read(path, "problem")[0].answer == "43"


def test_wrong_names_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS["openai/gsm8k"][0])
    with pytest.raises(ValueError, match="format='gsm'"):
        read(path, "gsm")
    with pytest.raises(ValueError, match="do not fit format='verl'"):
        read(path, "verl")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("openai/gsm8k", {"answer": "no marker #### "}, "row 1 of data: no answer"),
        ("Hothan/OlympiadBench", {"final_answer": None}, "row 1 of data: no answer"),
        ("Hothan/OlympiadBench", {"image_1": {"bytes": "iVBORw0KGgo="}}, "row 1 of data: the problem needs an image"),
        ("HuggingFaceH4/MATH-500", {"problem": "  "}, "row 1 of data: no question"),
        ("EleutherAI/hendrycks_math", {"solution": "none"}, "row 1 of data: no answer"),
    ],
)
def test_rows_that_cannot_be_verified_are_named(
    name: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    row = ROWS[name][0]
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, row, {**row, **change}))


def test_conversations_of_several_turns_are_refused(tmp_path: Path) -> None:
    row = ROWS["BytedTsinghua-SIA/DAPO-Math-17k"][0]
    prompt = [{"role": "system", "content": "Be brief."}, *row["prompt"]]
    with pytest.raises(ValueError, match=r"\['system', 'user'\]"):
        read(write(tmp_path, {**row, "prompt": prompt}))
