"""The demo's problems, their tokenizer and splits, and what is trained on them."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from hypothesis import given
from hypothesis import strategies as st

from ebpo_core.data import Problem
from ebpo_core.evaluation.estimators import mean_and_error
from ebpo_core.fusionroute.demo.domains import (
    DOMAINS,
    KINDS,
    LETTERS,
    MAX_ANSWER_TOKENS,
    MIXED,
    Question,
    build_tokenizer,
    compose,
    corrupted,
    draw_question,
    generate,
    preference_rows,
    sft_rows,
)
from ebpo_core.fusionroute.demo.experts import (
    Course,
    build_model,
    encode,
    train_base,
    train_expert,
)
from ebpo_core.fusionroute.demo.results import difference, mean_share, outcomes, percent
from ebpo_core.fusionroute.demo.rivals import greedy_fit, merges
from ebpo_core.tasks.supervised import IGNORED_LABEL
from ebpo_core.tasks.tiny_model import LONGEST_SEQUENCE

TOKENIZER = build_tokenizer()

words = st.text(LETTERS, min_size=5, max_size=5)
questions = st.one_of(
    st.builds(lambda a, b: Question("add", f"{a:02d}+{b:02d}"), st.integers(0, 99), st.integers(0, 99)),
    words.map(lambda word: Question("reverse", word)),
    words.map(lambda word: Question("caesar", word)),
)
problems = st.lists(questions, min_size=1, max_size=2).map(lambda parts: compose(*parts))


def questions_of(problem: Problem) -> list[Question]:
    names = {domain[0].upper(): domain for domain in DOMAINS}
    return [Question(names[text[0]], text[1:]) for text in problem.text.removesuffix(":").split(";")]


def solve(prompt: str) -> str:
    """The right answer, from the prompt alone and by other means than the domains use."""
    answers = []
    for question in prompt.removesuffix(":").split(";"):
        kind, argument = question[0], question[1:]
        if kind == "A":
            left, right = argument.split("+")
            result = str(int(left) + int(right)).rjust(3, "0")
        elif kind == "R":
            result = "".join(reversed(argument))
        else:
            result = argument.translate(str.maketrans("abcdefghij", "defghijabc"))
        answers.append(f"{question}={result}")
    return ";".join(answers)


@given(problems)
def test_answers_are_right_and_fit(problem: Problem) -> None:
    assert problem.answer == solve(problem.prompt)
    ids = TOKENIZER(problem.answer)["input_ids"]
    assert len(ids) <= MAX_ANSWER_TOKENS  # with <bos> in the place of <eos>
    assert len(TOKENIZER(problem.prompt)["input_ids"]) + MAX_ANSWER_TOKENS <= LONGEST_SEQUENCE
    assert problem.topic in KINDS


def test_the_longest_answer_takes_all_the_tokens_there_are() -> None:
    problem = compose(Question("reverse", "abcde"), Question("caesar", "abcde"))
    assert len(TOKENIZER(problem.answer)["input_ids"]) == MAX_ANSWER_TOKENS
    assert problem.answer == "Rabcde=edcba;Cabcde=defgh"
    assert problem.topic == MIXED


@given(problems)
def test_the_tokenizer_has_a_token_per_character_and_keeps_the_text(problem: Problem) -> None:
    text = problem.prompt + problem.answer
    ids = TOKENIZER(text)["input_ids"]
    assert ids[0] == TOKENIZER.bos_token_id
    assert len(ids) == 1 + len(text)
    assert TOKENIZER.unk_token_id not in ids
    assert TOKENIZER.decode([*ids, TOKENIZER.eos_token_id], skip_special_tokens=True) == text
    assert TOKENIZER(text + TOKENIZER.eos_token)["input_ids"] == [*ids, TOKENIZER.eos_token_id]


def test_batches_are_padded_on_the_left() -> None:
    encoded = TOKENIZER(["A12+34;Rabcde:", "Cabcde:"], padding=True)
    assert encoded["attention_mask"] == [[1] * 15, [0] * 7 + [1] * 8]


@pytest.mark.parametrize("seed", [0, 1])
def test_no_question_is_in_both_splits(seed: int) -> None:
    held_out = {question.key for problem in generate(3000, seed, "test") for question in questions_of(problem)}
    trained_on = {question.key for problem in generate(20_000, 17, "train") for question in questions_of(problem)}
    assert not held_out & trained_on
    assert len(held_out) > 1500


def test_the_two_orders_of_a_sum_are_in_one_split() -> None:
    rng = random.Random(0)
    for _ in range(300):
        question = draw_question(rng, "add", "test")
        left, right = question.argument.split("+")
        assert Question("add", f"{right}+{left}").key == question.key
    assert Question("reverse", "abcde").key != Question("caesar", "abcde").key


def test_kinds_take_turns_and_are_what_they_are_called() -> None:
    drawn = list(generate(700, 3, "train"))
    assert Counter(problem.topic for problem in drawn) == dict.fromkeys(KINDS, 100)
    assert {problem.topic for problem in generate(50, 3, "train", ("add", "add pair"))} == {"add", "add pair"}
    for problem in drawn:
        domains = [question.domain for question in questions_of(problem)]
        assert len(set(domains)) == (2 if problem.topic == MIXED else 1)
    orders = {tuple(q.domain for q in questions_of(problem)) for problem in generate(200, 3, "test", (MIXED,))}
    assert len(orders) == 6


def test_problems_are_seeded() -> None:
    assert list(generate(50, 5, "train")) == list(generate(50, 5, "train"))
    assert list(generate(50, 5, "train")) == list(generate(90, 5, "train"))[:50]
    assert list(generate(50, 5, "train")) != list(generate(50, 6, "train"))


def test_unknown_kinds_and_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="kinds="):
        next(generate(1, 0, "train", ("multiply",)))
    with pytest.raises(ValueError, match="split="):
        next(generate(1, 0, "validation"))


@given(problems, st.integers(0, 2**32))
def test_a_corrupted_answer_differs_in_one_character_of_one_result(problem: Problem, seed: int) -> None:
    wrong = corrupted(problem, random.Random(seed))
    places = [place for place, (a, b) in enumerate(zip(problem.answer, wrong, strict=True)) if a != b]
    assert len(places) == 1
    assert re.fullmatch(r"[A-Z][0-9a-j+]{5}=[0-9a-j]{3,5}(;[A-Z][0-9a-j+]{5}=[0-9a-j]{3,5})?", wrong)
    before = problem.answer[: places[0]]
    assert before.count("=") > before.count(";"), "the questions stay as they are"
    assert wrong[places[0]].isdigit() == problem.answer[places[0]].isdigit()


def test_every_result_can_be_corrupted() -> None:
    problem = compose(Question("add", "12+34"), Question("reverse", "abcde"))
    rng = random.Random(0)
    places = {
        next(i for i, (a, b) in enumerate(zip(problem.answer, corrupted(problem, rng), strict=True)) if a != b)
        for _ in range(500)
    }
    assert places == {7, 8, 9, 18, 19, 20, 21, 22}


def test_rows_hold_what_the_trainers_want() -> None:
    drawn = list(generate(40, 1, "train"))
    assert sft_rows(drawn)[0] == {"prompt": drawn[0].prompt, "completion": drawn[0].answer}
    answers = [problem.answer if index % 2 else f"wrong {index}" for index, problem in enumerate(drawn)]
    rows = preference_rows(drawn, answers, seed=4)
    for index, (row, problem) in enumerate(zip(rows, drawn, strict=True)):
        assert (row["prompt"], row["chosen"]) == (problem.prompt, problem.answer)
        assert row["rejected"] != problem.answer
        assert (row["rejected"] == f"wrong {index}") == (index % 2 == 0)
    assert rows == preference_rows(drawn, answers, seed=4)
    assert rows != preference_rows(drawn, answers, seed=5)


def test_labels_are_the_answer_and_its_end() -> None:
    drawn = list(generate(21, 2, "train"))
    ids, mask, labels = encode(drawn, TOKENIZER)
    assert ids.shape == mask.shape == labels.shape
    for row, problem in enumerate(drawn):
        length = int(mask[row].sum())
        assert TOKENIZER.decode(ids[row, :length], skip_special_tokens=True) == problem.prompt + problem.answer
        learned = labels[row][labels[row] != IGNORED_LABEL]
        assert learned.tolist() == [*TOKENIZER(problem.answer)["input_ids"][1:], TOKENIZER.eos_token_id]
        assert (labels[row, length - len(learned) : length] != IGNORED_LABEL).all()


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.slow
def test_training_is_seeded_and_leaves_the_base_and_torch_s_generator_alone() -> None:
    course = Course(steps=4, batch_size=8, learning_rate=1e-3)
    state = torch.get_rng_state()
    bases = [build_model(TOKENIZER, hidden_size=16, heads=2, seed=3) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    steps: list[int] = []
    losses = [
        train_base(base, TOKENIZER, course, seed=3, on_step=lambda step, _loss: steps.append(step)) for base in bases
    ]
    assert losses[0] == losses[1]
    assert steps == [1, 2, 3, 4] * 2
    before = {name: tensor.clone() for name, tensor in bases[0].state_dict().items()}
    expert = train_expert(bases[0], "reverse", TOKENIZER, course, seed=4)
    again = train_expert(bases[1], "reverse", TOKENIZER, course, seed=4)
    other = train_expert(bases[1], "caesar", TOKENIZER, course, seed=4)
    assert not expert.training
    for name, tensor in expert.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        assert torch.equal(bases[0].state_dict()[name], before[name])
    assert any(not torch.equal(other.state_dict()[name], tensor) for name, tensor in expert.state_dict().items())
    with pytest.raises(ValueError, match="domain='multiply'"):
        train_expert(bases[0], "multiply", TOKENIZER, course, seed=4)


@pytest.mark.slow
def test_an_expert_learns_its_domain_and_merging_chooses_the_better_setting() -> None:
    base = build_model(TOKENIZER, hidden_size=48, seed=0)
    caesar = train_expert(base, "caesar", TOKENIZER, Course(150, 32, 4e-3), seed=1)
    drawn = {domain: list(generate(60, 8, "test", (domain,))) for domain in DOMAINS}
    right, likelihood = greedy_fit(caesar, TOKENIZER, drawn["caesar"])
    assert right > 0.5
    assert likelihood > greedy_fit(base, TOKENIZER, drawn["caesar"])[1]
    assert greedy_fit(caesar, TOKENIZER, drawn["reverse"])[0] < 0.1
    found = merges(base, [caesar], TOKENIZER, drawn["caesar"], seed=0)
    assert found["task arithmetic"].setting == {"weight": 1.0}, "of one expert, all of it"
    assert greedy_fit(found["task arithmetic"].model, TOKENIZER, drawn["caesar"])[0] == pytest.approx(right, abs=0.02)
    assert found["DARE"].setting["drop"] == 0.2


# -------------------------------------------------------------------------------------------------------------- results


def test_shares_are_means_within_kinds() -> None:
    drawn = [
        compose(Question("reverse", "abcde")),
        compose(Question("add", "01+02")),
        compose(Question("reverse", "aaaab")),
    ]
    found = outcomes(drawn, ["Rabcde=edcba", "A01+02=03", "Raaaab=baaaa "])
    assert found == {"reverse": [1.0, 0.0], "add": [0.0]}
    assert mean_and_error([1.0, 0.0, 0.0, 0.0]).value == 0.25
    assert mean_and_error([1.0, 0.0, 0.0, 0.0]).standard_error == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    mean = mean_share({"a": [1.0, 0.0], "b": [1.0, 1.0, 1.0, 1.0]})
    assert mean.value == 0.75
    assert mean.standard_error == pytest.approx(mean_and_error([1.0, 0.0]).standard_error / 2)
    assert percent(mean_and_error([1.0, 1.0])) == "100.0±0.0"


def test_differences_are_taken_by_problem() -> None:
    better, worse = {"a": [1.0, 1.0, 0.0, 1.0]}, {"a": [1.0, 0.0, 0.0, 1.0]}
    assert difference(better, worse).value == 0.25
    assert difference(worse, better).value == -0.25
    assert difference(better, better) == (0.0, 0.0)
    assert difference(better, worse).standard_error == pytest.approx(
        mean_and_error([0.0, 1.0, 0.0, 0.0]).standard_error
    )
