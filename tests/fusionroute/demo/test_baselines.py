"""Merging against NumPy, and sequence selection against a loop over single answers."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from ebpo_core.evaluation import Completion, SamplingOptions, complete
from ebpo_core.fusionroute.baselines import (
    dare,
    likelihood_scores,
    reward_scores,
    select_sequences,
    task_arithmetic,
    ties,
)
from ebpo_core.fusionroute.demo.domains import build_tokenizer
from ebpo_core.rewards.text import exact_match

TOKENIZER = build_tokenizer()
PROMPTS = ["A12+34:", "Rabcde;Cjihgf:", "Cabcde:", "A01+02;A99+98:"]

State = dict[str, torch.Tensor]


def states(seed: int, count: int, dtype: torch.dtype = torch.float32) -> list[State]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 5), "b": (7,), "c": ()}
    return [
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def greedy(tokens: int) -> SamplingOptions:
    return SamplingOptions(max_new_tokens=tokens, temperature=0.0)


def tiny(seed: int, tie: bool = False) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(TOKENIZER),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=0.3,
            tie_word_embeddings=tie,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        return LlamaForCausalLM(config).eval()


# -------------------------------------------------------------------------------------------------------------- merging


@given(st.integers(0, 2**32), st.lists(st.floats(-3, 3), min_size=1, max_size=4))
def test_task_arithmetic_is_its_formula(seed: int, weights: list[float]) -> None:
    base, *tuned = states(seed, 1 + len(weights))
    merged = task_arithmetic(base, tuned, weights)
    assert list(merged) == list(base)
    for name, start in base.items():
        theta = start.numpy().astype(np.float64)
        expected = theta + sum(w * (t[name].numpy() - theta) for w, t in zip(weights, tuned, strict=True))
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 2**32), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_weight_0_is_the_base_and_one_task_of_weight_1_the_tuned_model(seed: int, dtype: torch.dtype) -> None:
    base, one, other = states(seed, 3, dtype)
    nothing = task_arithmetic(base, [one, other], 0.0)
    itself = task_arithmetic(base, [one], 1.0)
    average = task_arithmetic(base, [one, one], 0.5)
    for name, start in base.items():
        assert nothing[name].dtype == dtype
        assert torch.equal(nothing[name], start)
        assert nothing[name].data_ptr() != start.data_ptr()
        # base + (tuned - base) is rounded twice, at the largest of the three.
        scale = torch.maximum(start.abs(), one[name].abs()).double()
        tolerance = 4 * torch.finfo(dtype).eps * scale + 1e-12
        assert ((itself[name].double() - one[name].double()).abs() <= tolerance).all()
        assert ((average[name].double() - one[name].double()).abs() <= tolerance).all()


def test_narrow_dtypes_are_added_up_in_float32() -> None:
    base = {"w": torch.tensor([256.0], dtype=torch.bfloat16)}  # the next bfloat16 is 258
    tuned = [{"w": torch.tensor([258.0], dtype=torch.bfloat16)} for _ in range(3)]
    # In bfloat16, 256 + 0.5 stays 256, three times over.
    assert task_arithmetic(base, tuned, 0.25)["w"].item() == 258.0
    assert task_arithmetic(base, tuned[:1], 0.25)["w"].item() == 256.0


@given(st.integers(0, 2**32), st.lists(st.floats(-2, 2), min_size=1, max_size=3))
def test_dare_that_drops_nothing_is_task_arithmetic(seed: int, weights: list[float]) -> None:
    base, *tuned = states(seed, 1 + len(weights))
    for name, expected in task_arithmetic(base, tuned, weights).items():
        assert torch.equal(dare(base, tuned, weights, drop=0.0, seed=seed)[name], expected)


@given(st.integers(0, 1000), st.floats(0.05, 0.95))
@settings(max_examples=30)
def test_dare_drops_or_rescales_each_change(seed: int, drop: float) -> None:
    base = {"w": torch.zeros(2000)}
    change = torch.linspace(1, 2, 2000)
    merged = dare(base, [{"w": change}], drop=drop, seed=seed)["w"]
    kept = merged != 0
    torch.testing.assert_close(merged[kept], change[kept] / (1 - drop))
    share = kept.double().mean().item()
    assert abs(share - (1 - drop)) < 6 * math.sqrt(drop * (1 - drop) / 2000)


@pytest.mark.parametrize("drop", [0.3, 0.9])
def test_dare_is_unbiased_over_masks(drop: float) -> None:
    base, *tuned = states(3, 3)
    weights, draws = [0.7, -0.4], 2000
    total = {name: np.zeros(tuple(start.shape)) for name, start in base.items()}
    for seed in range(draws):
        for name, merged in dare(base, tuned, weights, drop=drop, seed=seed).items():
            total[name] += merged.numpy()
    for name, exact in task_arithmetic(base, tuned, weights).items():
        changes = [w * (t[name] - base[name]).numpy() for w, t in zip(weights, tuned, strict=True)]
        error = np.sqrt(sum(change**2 for change in changes) * drop / (1 - drop) / draws)
        assert (np.abs(total[name] / draws - exact.numpy()) < 5 * error).all()


@given(st.integers(0, 2**32), st.lists(st.floats(0.1, 3), min_size=1, max_size=4), st.sampled_from([0.2, 0.5, 1.0]))
def test_ties_is_its_formula(seed: int, weights: list[float], density: float) -> None:
    """Algorithm 1 by loops over entries."""
    base, *tuned = states(seed, 1 + len(weights))
    merged = ties(base, tuned, weights, density=density)
    for name, start in base.items():
        theta = start.numpy().astype(np.float64).reshape(-1)
        changes = [t[name].numpy().astype(np.float64).reshape(-1) - theta for t in tuned]
        kept = max(1, round(density * theta.size))
        for change in changes:
            change[np.argsort(-np.abs(change))[kept:]] = 0
        expected = theta.copy()
        for entry in range(theta.size):
            sign = np.sign(sum(w * c[entry] for w, c in zip(weights, changes, strict=True)))
            agree = [(w, c[entry]) for w, c in zip(weights, changes, strict=True) if c[entry] * sign > 0]
            if agree:
                expected[entry] += sum(w * c for w, c in agree) / sum(w for w, _ in agree)
        np.testing.assert_allclose(merged[name].numpy().reshape(-1), expected, atol=1e-5)


def test_ties_of_one_whole_change_is_the_tuned_model_and_bad_settings_are_named() -> None:
    base, one, other = states(0, 3)
    for name, value in ties(base, [one], density=1.0).items():
        torch.testing.assert_close(value, one[name])
    assert all(torch.isfinite(value).all() for value in ties(base, [base, base]).values())
    for density in (0, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"density={density}"):
            ties(base, [one], density=density)
    with pytest.raises(ValueError, match="a sign is elected by weights of at least 0"):
        ties(base, [one, other], [1, -1])


def test_masks_are_seeded_and_differ_between_models_and_tensors() -> None:
    base = {"a": torch.zeros(200), "b": torch.zeros(200)}
    one = {"a": torch.ones(200), "b": torch.ones(200)}
    merged = dare(base, [one], drop=0.5, seed=7)
    again = dare(dict(reversed(base.items())), [one], drop=0.5, seed=7)
    assert all(torch.equal(merged[name], again[name]) for name in base)
    assert not torch.equal(merged["a"], merged["b"])
    assert not torch.equal(merged["a"], dare(base, [one], drop=0.5, seed=8)["a"])
    both = dare(base, [one, one], drop=0.5, seed=7)["a"]
    assert set(both.tolist()) == {0.0, 2.0, 4.0}, "two models with one mask would give no 2"


@pytest.mark.parametrize("tie", [False, True])
def test_a_merged_model_loads_and_tied_weights_stay_tied(tie: bool) -> None:
    base, one, other = (tiny(seed, tie) for seed in range(3))
    merged = dare(base.state_dict(), [one.state_dict(), other.state_dict()], 0.5, drop=0.5)
    assert (merged["lm_head.weight"] is merged["model.embed_tokens.weight"]) == tie
    model = copy.deepcopy(base)
    model.load_state_dict(merged)
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        logits = model(ids).logits
    assert not torch.allclose(logits, base(ids).logits)
    model.load_state_dict(task_arithmetic(base.state_dict(), [one.state_dict()]))
    torch.testing.assert_close(model(ids).logits, one(ids).logits, rtol=1e-4, atol=1e-4)


def test_integers_are_copied_if_they_are_equal() -> None:
    base = {"w": torch.zeros(2), "steps": torch.tensor([3, 4])}
    same = {"w": torch.ones(2), "steps": torch.tensor([3, 4])}
    merged = task_arithmetic(base, [same])
    assert torch.equal(merged["steps"], base["steps"])
    assert merged["steps"].data_ptr() != base["steps"].data_ptr()
    with pytest.raises(ValueError, match=r"tuned\[1\]: 'steps' .* differs"):
        task_arithmetic(base, [same, {**same, "steps": torch.tensor([3, 5])}])


def test_errors_name_what_differs() -> None:
    base = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"tuned\[0\]: 'b' is missing in tuned\[0\] \(1 names"):
        task_arithmetic(base, [{"a": torch.zeros(2)}])
    with pytest.raises(ValueError, match="'c' is missing in the base"):
        task_arithmetic(base, [{**base, "c": torch.zeros(1)}])
    with pytest.raises(ValueError, match=r"tuned\[1\]: 'b' has shape \(4,\) and the base's has \(3,\)"):
        task_arithmetic(base, [base, {**base, "b": torch.zeros(4)}])
    with pytest.raises(ValueError, match="'a' is torch.int64"):
        task_arithmetic(base, [{**base, "a": torch.zeros(2, dtype=torch.int64)}])
    with pytest.raises(ValueError, match="at least one"):
        task_arithmetic(base, [])
    for weights in ([1.0], [1.0, 2.0, 3.0], math.nan, [0.5, math.inf]):
        with pytest.raises(ValueError, match="weights="):
            task_arithmetic(base, [base, base], weights)
    for drop in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="drop="):
            dare(base, [base], drop=drop)
    shared = torch.zeros(2)
    with pytest.raises(ValueError, match="'a' and 'b' differ, but the base ties them"):
        task_arithmetic({"a": shared, "b": shared}, [{"a": torch.zeros(2), "b": torch.ones(2)}])


# --------------------------------------------------------------------------------------------------- sequence selection


def test_responses_are_the_greedy_ones_of_each_prompt_alone() -> None:
    model = tiny(4).train()
    responses = complete(model, TOKENIZER, PROMPTS, greedy(9), batch_size=3)
    assert model.training
    model.eval()
    for prompt, response in zip(PROMPTS, responses, strict=True):
        ids = list(TOKENIZER(prompt)["input_ids"])
        answer: list[int] = []
        with torch.no_grad():
            while len(answer) < 9 and TOKENIZER.eos_token_id not in answer:
                answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
        assert response.ids == tuple(answer)
        assert response.text == TOKENIZER.decode(answer, skip_special_tokens=True)


def test_an_answer_ends_with_its_first_end_token() -> None:
    model = tiny(4)
    with torch.no_grad():  # an output that is the end token whatever comes in
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.eye(len(TOKENIZER))[TOKENIZER.eos_token_id])
    assert complete(model, TOKENIZER, PROMPTS, greedy(5)) == [Completion("", "stop", 1, (2,))] * 4


def test_samples_are_seeded_and_each_is_cut_at_its_own_end() -> None:
    model = tiny(4)
    drawn = []
    for seed in (0, 0, 1):
        options = SamplingOptions(max_new_tokens=40, temperature=3.0, seed=seed)
        drawn.append(complete(model, TOKENIZER, PROMPTS * 16, options))
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert len({len(response.ids) for response in drawn[0]}) > 5
    for response in drawn[0]:
        assert response.ids.count(2) == (len(response.ids) < 40 or response.ids[-1] == 2)
        assert 2 not in response.ids[:-1]


def test_batches_are_reported_and_options_reach_generate() -> None:
    done: list[tuple[int, int]] = []
    [first, *_] = complete(
        tiny(4),
        TOKENIZER,
        PROMPTS,
        greedy(4),
        batch_size=3,
        on_batch=lambda *counts: done.append(counts),
        logits_processor=[lambda _ids, scores: scores.fill_(0.0).index_fill_(1, torch.tensor([7]), 1.0)],
    )
    assert done == [(3, 4), (4, 4)]
    assert first.ids == (7, 7, 7, 7)


@pytest.mark.parametrize("per_token", [False, True])
def test_likelihoods_are_those_of_each_answer_alone(per_token: bool) -> None:
    model = tiny(5)
    answers = [Completion("", ids=ids) for ids in [(4, 5, 2), (6,), (), (9, 9, 9, 9, 9, 9, 2)]]
    scored = likelihood_scores(model, TOKENIZER, per_token=per_token, batch_size=3)(PROMPTS, answers)
    for prompt, answer, score in zip(PROMPTS, answers, scored, strict=True):
        ids, total = list(TOKENIZER(prompt)["input_ids"]), 0.0
        for token in answer.ids:
            with torch.no_grad():
                total += model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()
            ids.append(token)
        assert score == pytest.approx(total / (max(1, len(answer.ids)) if per_token else 1), abs=1e-4)


@given(st.lists(st.lists(st.sampled_from([-1.0, 0.0, 2.5, -math.inf]), min_size=3, max_size=3), min_size=1, max_size=4))
def test_the_best_answer_is_selected_and_ties_go_to_the_first(table: list[list[float]]) -> None:
    prompts = ["p0", "p1", "p2"]
    responses = [
        [Completion(f"{expert} {prompt}", ids=(expert,)) for prompt in prompts] for expert in range(len(table))
    ]
    scores = dict(zip(range(len(table)), table, strict=True))
    selected = select_sequences(prompts, responses, lambda _prompts, answers: scores[answers[0].ids[0]])
    for column, selection in enumerate(selected):
        expected = int(np.argmax([row[column] for row in table]))
        assert selection.expert == expected
        assert selection.response.text == f"{expected} p{column}"
        assert selection.scores == tuple(row[column] for row in table)


def test_a_verifier_as_the_reward_finds_every_right_answer() -> None:
    right = ["046", "edcba", "defgh"]
    responses = [
        [Completion(text, ids=()) for text in texts]
        for texts in (["046", "x", "x"], ["047", "edcba", ""], ["046", "edcb", "ghi"])
    ]
    selected = select_sequences(["a", "b", "c"], responses, reward_scores(exact_match, answer=right))
    assert [selection.expert for selection in selected] == [0, 1, 0]
    assert [selection.response.text == answer for selection, answer in zip(selected, right, strict=True)] == [
        True,
        True,
        False,
    ]


def test_selection_needs_one_number_per_answer() -> None:
    one = [Completion("x", ids=())]
    with pytest.raises(ValueError, match="at least one expert"):
        select_sequences(["p"], [], lambda _prompts, _answers: [0.0])
    with pytest.raises(ValueError, match=r"holds \[1, 1\] answers"):
        select_sequences(["p", "q"], [one, one], lambda _prompts, _answers: [0.0])
    with pytest.raises(ValueError, match="1 of them NaN"):
        select_sequences(["p"], [one], lambda _prompts, _answers: [math.nan])
    with pytest.raises(ValueError, match="gave 2 values"):
        select_sequences(["p"], [one], lambda _prompts, _answers: [1.0, 2.0])
