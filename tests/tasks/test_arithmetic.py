"""Chat arithmetic and the rewards for data sets of one's own."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpo_core.rewards.text import completion_text, exact_match, integer_match, load_reward
from ebpo_core.tasks import arithmetic

pytest.importorskip("datasets")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("19", 19),
        ("The answer is 19.", 19),
        ("12 + 7 = 19", 19),
        ("12+7=19", 19),
        ("**19**", 19),
        ("$19$", 19),
        ("\\boxed{19}", 19),
        ("First 5, then 19!", 19),
        ("-5", -5),
        ("3 - 8 = -5.", -5),
        ("(-5)", -5),
        ("\N{MINUS SIGN}5", -5),
        ("12-5", 5),
        ("(12)-5", 5),
        ("1,234", 1234),
        ("It is 1,234,567.", 1234567),
        ("007", 7),
        ("", None),
        ("nineteen", None),
        ("19.5", None),
        ("19 or 19.0", None),
        ("1e3", None),
        ("19a", None),
        ("x19", None),
        ("1_000", None),
        ("12,34", None),
        ("1,2,3,19", None),
        ("\N{ARABIC-INDIC DIGIT ONE}\N{ARABIC-INDIC DIGIT NINE}", None),
        ("19 \N{SUPERSCRIPT TWO}", 19),
        ("19 \N{ARABIC-INDIC DIGIT NINE}", None),
        ("9" * 13, None),
        ("9" * 1_000_000, None),
        ("1 " * 500_000, 1),
    ],
    ids=lambda text: str(text)[:24],
)
def test_final_integer(text: str, value: int | None) -> None:
    assert arithmetic.final_integer(text) == value


@given(st.text())
def test_final_integer_never_raises(text: str) -> None:
    value = arithmetic.final_integer(text)
    assert value is None or any(character.isdigit() for character in text)


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "So it is {}.", "= {}", "**{}**", "{:,}"]))
def test_final_integer_reads_every_integer_back(value: int, form: str) -> None:
    assert arithmetic.final_integer(form.format(value)) == value


def test_listing_candidates_wins_nothing() -> None:
    listing = " ".join(map(str, range(100)))
    rewards = arithmetic.reward([""] * 99, [listing] * 99, answer=list(range(99)))
    assert rewards == [0.0] * 99
    assert arithmetic.reward([""], [listing], answer=[99]) == [1.0], "one number counts: the last"


def test_dataset_is_conversational_reproducible_and_not_won_by_repeating_the_question() -> None:
    data = arithmetic.dataset(180, seed=1, levels=[1, 2])
    assert data.to_dict() == arithmetic.dataset(180, seed=1, levels=[1, 2]).to_dict()
    assert data[0]["prompt"] == [{"role": "user", "content": data[0]["prompt"][0]["content"]}]
    assert set(zip(data["topic"], data["level"], strict=True)) == {(t, n) for t in arithmetic.TOPICS for n in (1, 2)}
    echoes = [[{"role": "assistant", "content": prompt[0]["content"]}] for prompt in data["prompt"]]
    assert arithmetic.reward(data["prompt"], echoes, answer=data["answer"]) == [0.0] * 180
    right = [[{"role": "assistant", "content": f"It is {answer}."}] for answer in data["answer"]]
    assert arithmetic.reward(data["prompt"], right, answer=data["answer"]) == [1.0] * 180


def operands(row: dict[str, Any]) -> tuple[int, int]:
    """Both numbers, from the question alone."""
    left, right = re.findall(r"[0-9]+", row["prompt"][0]["content"])
    return int(left), int(right)


def test_train_and_test_share_no_problem() -> None:
    def keys(size: int, split: str) -> set[str]:
        rows = arithmetic.generate(size, 0, split)
        return {arithmetic.problem_key(row["topic"], *operands(row)) for row in rows}

    train, test = keys(2000, "train"), keys(600, "test")
    assert not train & test
    assert len(test) > 100


@given(st.sampled_from(list(arithmetic.TOPICS)), st.integers(1, 3), st.integers(0, 999))
def test_answers_are_right(topic: str, level: int, seed: int) -> None:
    problem = next(arithmetic.generate(1, seed, "train", topics=[topic], levels=[level]))
    left, right = operands(problem)
    expected = {"add": left + right, "sub": left - right}
    assert problem["answer"] == expected.get(topic, left * right)
    assert len(str(left)) == len(str(right)) == level


def test_completion_text_takes_what_the_assistant_said() -> None:
    assert completion_text("plain") == "plain"
    assert completion_text([{"role": "assistant", "content": "a"}, {"role": "tool", "content": "7"}]) == "a"
    parts = [{"type": "text", "text": "x"}, {"type": "image", "image": None}, {"type": "text", "text": "y"}]
    assert completion_text([{"role": "assistant", "content": parts}]) == "xy"
    assert completion_text([{"role": "assistant", "content": None, "tool_calls": []}]) == ""


def test_rewards_for_own_data_sets() -> None:
    assert exact_match(["p", "p"], [" blue\n", "Blue"], answer=["blue", "blue"], topic=["", ""]) == [1.0, 0.0]
    assert integer_match(["p"] * 4, ["7", " 07 ", "7.", "x"], answer=[7, "7", 7, "x"]) == [1.0, 1.0, 0.0, 0.0]


def test_load_reward() -> None:
    assert load_reward("exact") is exact_match
    assert load_reward("ebpo_core.tasks.countdown:reward") is load_reward("ebpo_core.tasks.countdown.reward")
    for path in ("nothing", "no_such_module:reward", "ebpo_core.tasks.countdown:nope", ""):
        with pytest.raises(ValueError, match="no such function"):
            load_reward(path)
    with pytest.raises(TypeError, match="dict"):
        load_reward("ebpo_core.tasks.countdown:TOPICS")
