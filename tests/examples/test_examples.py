"""The scripts in ``examples/``: that they run, that a seed decides every bit, and that the loop's pieces are right."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl")

import torch

import ebpo_core
from ebpo_core.tasks.loading import Task, load_task

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {"hidden_size": 64, "layers": 2}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


loop = load("train_countdown")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """As the scripts run; and torch's generator and threads are afterwards as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("countdown", train_size=600, test_size=12, topics=["add"], levels=[2])


@pytest.fixture(scope="module")
def policy() -> Any:
    return loop.warm_policy(160, **SMALL)


def rollout(policy: Any, task: Task, group_size: int) -> Any:
    torch.manual_seed(0)
    return loop.sample(policy, task.train["prompt"][:24], group_size)


def test_a_rollout_is_groups_of_what_the_policy_said(policy: Any, task: Task) -> None:
    prompts, prompt_mask, completions, mask, logprobs = rollout(policy, task, 3)
    tokenizer, eos = policy.tokenizer, policy.tokenizer.eos_token_id
    assert len(completions) == 72
    assert tokenizer.batch_decode(prompts, skip_special_tokens=True) == [
        prompt for prompt in task.train["prompt"][:24] for _ in range(3)
    ]
    assert torch.equal(prompt_mask == 0, prompts == tokenizer.pad_token_id)
    lengths = mask.sum(1).tolist()
    assert len(set(lengths)) > 2
    for tokens, kept, length in zip(completions.tolist(), mask.tolist(), lengths, strict=True):
        assert kept == [1] * length + [0] * (len(tokens) - length)
        assert eos not in tokens[: length - 1]
        assert tokens[length - 1] == eos or length == loop.MAX_NEW_TOKENS
    assert ((logprobs <= 0) | (mask == 0)).all()


def test_the_loss_sees_the_probabilities_that_were_sampled_from(policy: Any, task: Task) -> None:
    drawn = rollout(policy, task, 2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        advantages = torch.randn(len(drawn.mask), generator=generator)
        with torch.no_grad():
            loss = loop.policy_loss(policy.model, drawn, advantages, 0.2)
        # Ratios of 1: each token counts its completion's advantage. A token or a position off by one would show here.
        expected = -(advantages * drawn.mask.sum(1)).sum() / drawn.mask.sum()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("shift", "advantage", "loss"), [(1.0, 1.0, -1.2), (1.0, -1.0, np.e), (-1.0, 1.0, -1 / np.e), (-1.0, -1.0, 0.8)]
)
def test_the_loss_is_clipped_on_the_side_that_would_gain(
    policy: Any, task: Task, shift: float, advantage: float, loss: float
) -> None:
    drawn = rollout(policy, task, 2)
    drawn = drawn._replace(logprobs=drawn.logprobs - shift)  # ratios of exp(shift)
    found = loop.policy_loss(policy.model, drawn, torch.full((48,), advantage), 0.2)
    assert found.item() == pytest.approx(loss, rel=1e-4)
    found.backward()
    moved = any(bool(weight.grad.abs().max() > 1e-7) for weight in policy.model.parameters())
    policy.model.zero_grad()
    assert moved == (shift * advantage < 0)


def test_training_learns_and_a_seed_decides_every_bit(policy: Any, task: Task) -> None:
    runs = []
    for seed in (0, 0, 1):
        copied = copy.deepcopy(policy)
        lines: list[dict[str, float]] = []
        options = {"prompts_per_step": 64, "group_size": 4, "learning_rate": 1e-3, "seed": seed}
        records = loop.train(
            copied,
            task,
            ebpo_core.EBPO(),
            steps=12,
            on_step=lambda record, _, seen=lines: seen.append(record),
            **options,
        )
        assert lines == records
        runs.append((records, copied.model.state_dict()))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert all(torch.equal(weight, runs[1][1][name]) for name, weight in runs[0][1].items())
    for records, _ in runs:
        rewards = [record["reward"] for record in records]
        assert [record["step"] for record in records] == list(range(1, 13))
        assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.08


def test_a_rule_gets_the_rows_of_the_prompts(task: Task) -> None:
    seen: list[np.ndarray] = []

    def rule(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
        assert rewards.shape == groups.shape == (12,)
        seen.append(groups)
        return np.zeros(12)

    policy = loop.warm_policy(1, **SMALL)
    before = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
    loop.train(policy, task, rule, steps=2, prompts_per_step=4, group_size=3, on_step=lambda *_: None)
    assert all((groups.reshape(4, 3) == groups[::3, None]).all() and len(set(groups)) == 4 for groups in seen)
    assert len(seen) == 2
    # Advantages of 0 move nothing, and weights do not decay.
    assert all(torch.equal(weight, before[name]) for name, weight in policy.model.state_dict().items())


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # TRL's own use of older names
def test_both_scripts_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = loop.main(ebpo_core.EBPO(), warm_up_steps=3, test_size=6, steps=1, prompts_per_step=8)
    assert len(found) == 2
    options = {"output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 8, "disable_tqdm": True}
    again = load("train_trl").main(warm_up_steps=3, test_size=6, **options)
    assert again[0] == found[0]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("pass@1")]
    assert [line.split(":")[0] for line in lines] == ["pass@1 after the warm-up", "pass@1 after the training"] * 2
