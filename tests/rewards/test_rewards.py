"""The verifier as a reward function: in TRL's signature and trainer, and in verl's signature."""

from __future__ import annotations

import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("math_verify")

from ebpo_core.rewards import MathVerifier, compute_score, math_reward
from ebpo_core.rewards.rewards import shared_verifier
from ebpo_core.rewards.text import load_reward

if TYPE_CHECKING:
    from pathlib import Path

COMPLETIONS = ["\\boxed{\\frac{1}{2}}", "\\boxed{1+x}", "Answer: 3", "three"]
ANSWERS = ["0.5", "x+1", "4", "3"]
SCORES = [1.0, 1.0, 0.0, 0.0]


@pytest.fixture(scope="module", autouse=True)
def closed_afterwards() -> Any:
    yield
    shared_verifier().close()


def as_messages(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def test_all_that_trl_passes_is_taken() -> None:
    logged: dict[str, float] = {}
    columns = {
        "prompts": ["p"] * 4,
        "completion_ids": [[1]] * 4,
        "topic": ["algebra"] * 4,
        "trainer_state": None,
        "log_extra": print,
        "log_metric": logged.__setitem__,
    }
    assert math_reward(completions=COMPLETIONS, answer=ANSWERS, **columns) == SCORES
    assert logged == {
        "verifier/fast": 2,
        "verifier/math_verify": 1,
        "verifier/no_answer": 1,
        "verifier/refused": 0,
        "verifier/timeouts": 0,
        "verifier/errors": 0,
        "verifier/unscorable": 0,
    }
    assert math_reward(completions=[as_messages(text) for text in COMPLETIONS], answer=ANSWERS, **columns) == SCORES
    assert math_reward(completions=COMPLETIONS, solution=[f"so \\boxed{{{a}}}" for a in ANSWERS], **columns) == SCORES


def test_a_reference_that_cannot_be_scored_is_nan() -> None:
    first, second = math_reward(["\\boxed{1}", "\\boxed{1}"], ["@@@", "1"])
    assert math.isnan(first)
    assert second == 1.0


def test_a_missing_column_is_named() -> None:
    with pytest.raises(ValueError, match=r"neither an 'answer' nor a 'solution' column, only \['level', 'prompts'\]"):
        math_reward(completions=["\\boxed{1}"], prompts=["p"], level=[1])


def test_it_is_found_by_its_name_and_pickles() -> None:
    assert load_reward("ebpo_core.rewards:math_reward") is math_reward
    assert math_reward.__name__ == "math_reward"
    for function in (math_reward, compute_score):
        assert pickle.loads(pickle.dumps(function)) is function
    with MathVerifier(math_verify=False) as verifier:
        reward = pickle.loads(pickle.dumps(verifier.reward))
        assert reward(["\\boxed{2}", "\\boxed{1+x}"], answer=["2", "x+1"], prompts=["p", "p"]) == [1.0, 0.0]


def test_agrees_with_trls_own_reward_where_both_are_sure() -> None:
    accuracy_reward = pytest.importorskip("trl.rewards").accuracy_reward
    pairs = [
        ("\\frac{1}{2}", "0.5"),
        ("x+1", "1+x"),
        ("x+1", "1-x"),
        ("42", "41"),
        ("\\sqrt{8}", "2\\sqrt{2}"),
        ("(1,2)", "(2,1)"),
        ("\\frac{\\pi}{4}", "\\frac{\\pi}{3}"),
    ]
    references = [f"${reference}$" for reference, _ in pairs]
    completions = [as_messages(f"It is $\\boxed{{{answer}}}$.") for _, answer in pairs]
    assert math_reward(completions, references) == accuracy_reward(completions, references)


def test_verls_signature() -> None:
    row = {"data_source": "math_dapo", "ground_truth": "42", "extra_info": {"index": 3}}
    assert compute_score(solution_str="Answer: $6\\cdot 7$", **row) == {"score": 1.0, "acc": 1.0, "pred": "$6\\cdot 7$"}
    assert compute_score(solution_str="Answer: 41", reward_router_address=None, **row)["score"] == 0.0
    assert compute_score("any", "nothing", "42") == {"score": 0.0, "acc": 0.0, "pred": ""}
    # verl scores rows in threads of an event loop's executor.
    with ThreadPoolExecutor(4) as threads:
        tasks = [threads.submit(compute_score, "any", f"\\boxed{{x+{n}}}", f"{n}+x") for n in range(12)]
        assert [task.result()["acc"] for task in tasks] == [1.0] * 12


def test_verl_hears_of_a_reference_that_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match=r"ground_truth='@@@' of data_source='mine'.*unscorable"):
        compute_score("mine", "\\boxed{1}", "@@@")
    assert compute_score("mine", "\\boxed{1}", "@@@", unscorable=0)["score"] == 0.0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_in_a_real_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from ebpo_core.data import Problem, to_rows
    from ebpo_core.tasks.tiny_model import build_model, build_tokenizer

    tokenizer = build_tokenizer()
    problems = [Problem(str(n), f"{n} + {n} =", str(2 * n), "double", None, "mine") for n in range(4)]
    # A reference that nobody can read: its rewards are missing, and the run goes on.
    problems[3] = Problem("3", "3 + 3 =", "@@@", "double", None, "mine")
    trainer = trl.GRPOTrainer(
        model=build_model(tokenizer, hidden_size=32, layers=1),
        processing_class=tokenizer,
        reward_funcs=[math_reward],
        train_dataset=Dataset.from_list(to_rows(problems, conversational=False)),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8,
            num_generations=2,
            max_completion_length=4,
            max_steps=1,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            bf16=False,
            use_cpu=True,
        ),
    )
    trainer.train()
    (logs,) = [entry for entry in trainer.state.log_history if "rewards/math_reward/mean" in entry]
    assert logs["rewards/math_reward/mean"] == 0.0
    assert logs["verifier/no_answer"] == 6
    assert logs["verifier/unscorable"] == 2
    assert math.isfinite(logs["grad_norm"])
