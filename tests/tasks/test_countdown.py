"""Mini-countdown: solvable problems, splits that cannot meet, and a reward that only pays for solutions."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpo_core.tasks import countdown
from ebpo_core.tasks.splits import split_of

pytest.importorskip("datasets")


@given(st.integers(0, 2**32), st.sampled_from(list(countdown.TOPICS)), st.sampled_from(countdown.LEVELS))
def test_every_problem_is_solved_by_its_answer_and_lies_in_its_split(seed: int, topic: str, level: int) -> None:
    for split in ("train", "test"):
        problem = countdown.generate_problem(random.Random(seed), topic, level, split)
        numbers, target = problem["numbers"], problem["target"]
        assert countdown.is_solution(problem["answer"], numbers, target, problem["operators"])
        assert 0 <= target <= countdown.LARGEST_TARGET
        assert all(1 <= number <= countdown.LARGEST_NUMBER for number in numbers)
        assert problem["level"] == level == len(numbers)
        assert split_of(countdown.problem_key(topic, numbers, target)) == split


def test_dataset_is_reproducible_balanced_and_seeded() -> None:
    data = countdown.dataset(60, seed=3)
    assert data.to_dict() == countdown.dataset(60, seed=3).to_dict()
    assert data.to_dict() != countdown.dataset(60, seed=4).to_dict()
    assert set(Counter(zip(data["topic"], data["level"], strict=True)).values()) == {10}
    assert data.column_names == ["prompt", "answer", "numbers", "target", "operators", "topic", "level"]
    # Pinned: a change of the generator changes every published number.
    assert data[1]["prompt"] == "[+-] 12 6 2 = 16 :"
    assert data[4]["prompt"] == "[+-*] 6 8 4 = 38 :"
    assert data[4]["answer"] == "4 * 8 + 6"


def test_train_and_test_share_no_problem_in_any_order_of_numbers() -> None:
    def keys(split: str, seed: int) -> set[str]:
        rows = countdown.generate(3000, seed, split)
        return {countdown.problem_key(row["topic"], row["numbers"], row["target"]) for row in rows}

    train = keys("train", 0) | keys("train", 1)
    test = keys("test", 0) | keys("test", 7)
    assert len(test) > 200
    assert not train & test


@pytest.mark.parametrize("options", [{"topics": ["div"]}, {"levels": [5]}, {"levels": []}, {"split": "validation"}])
def test_unknown_clusters_and_splits_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        countdown.dataset(1, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("3 + 7 * 2", True),
        ("7 * 2 + 3", True),
        (" 2*7+3 ", True),
        ("(7 * 2) + 3", True),
        ("17", False),
        ("3 + 7 * 2 = 17", False),
        ("3 + 7 + 7", False),
        ("3 + 7 * 2 + 0", False),
        ("2 + 3 * 7", False),
        ("3 + 7 * 2 3 + 7 * 2", False),
        ("", False),
        ("9**9**9**9", False),
        ("__import__('os')", False),
        ("(" * 100_000, False),
        ("3 + \N{ARABIC-INDIC DIGIT SEVEN} * 2", False),
    ],
)
def test_reward_pays_for_solutions_only(text: str, right: bool) -> None:
    columns = {"numbers": [[3, 7, 2]], "target": [17], "operators": ["+-*"], "topic": ["mul"], "trainer_state": None}
    assert countdown.reward(prompts=["p"], completions=[text], **columns) == [float(right)]
    message = [[{"role": "assistant", "content": text}]]
    assert countdown.reward(prompts=[[{"role": "user", "content": "p"}]], completions=message, **columns) == [
        float(right)
    ]


def test_reward_refuses_operators_that_the_topic_does_not_allow() -> None:
    columns = {"numbers": [[3, 7]], "target": [21], "operators": ["+-"]}
    assert countdown.reward(["p"], ["3 * 7"], **columns) == [0.0]
    assert countdown.reward(["p"], ["3 * 7"], **{**columns, "operators": ["+-*"]}) == [1.0]


def test_reward_needs_as_many_columns_as_completions() -> None:
    with pytest.raises(ValueError, match="zip"):
        countdown.reward(["p", "p"], ["1", "2"], numbers=[[1]], target=[1], operators=["+"])
