"""Advantages by turn in TRL's agent loop: real training of a tiny policy that calls a tool as often as it likes."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("trl")

import agent_policy as agent
import torch
import trainer_worker as tiny

from ebpo_core import reference
from ebpo_core.reference import by_turn
from ebpo_core.trainer import EBPOConfig, EBPOTrainer
from ebpo_core.trainer.turns import TurnRewards, by_token, turn_counts, turn_of_token

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

SETTINGS: dict[str, Any] = {
    "ebpo_turns": True,
    "ebpo_normalize": "none",
    "max_completion_length": 200,
    "max_tool_calling_iterations": 3,
    "learning_rate": 1e-4,
    "loss_type": "dr_grpo",
}


class Recording(tiny.Recorder, EBPOTrainer):
    """Keeps the completions, too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.completions: list[list[Any]] = []
        super().__init__(*args, **kwargs)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, *args: Any, **kwargs: Any) -> Any:
        self.completions.append(completions)
        return super()._calculate_rewards(inputs, prompts, completions, *args, **kwargs)


def messages(completion: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message for message in completion if message["role"] == "assistant"]


def costs(completions: list[Any], **_: Any) -> list[list[float]]:
    """A cost for each call, and what the last message is worth."""
    return [[-0.1] * (len(own) - 1) + [right(own[-1])] for own in map(messages, completions)]


def right(message: dict[str, Any]) -> float:
    return float("1" in str(message.get("content", "")))


def outcome(completions: list[Any], **_: Any) -> list[float]:
    """A number, where a function has nothing to say of turns."""
    return [right(messages(completion)[-1]) for completion in completions]


@pytest.fixture(scope="module")
def tokens() -> Any:
    return agent.tokenizer()


@pytest.fixture(scope="module")
def taught(tokens: Any) -> dict[str, torch.Tensor]:
    return agent.policy(tokens).state_dict()


def train(tmp_path: Path, tokens: Any, taught: Any, rewards: Any = costs, **settings: Any) -> Recording:
    policy = agent.policy(tokens, steps=0)
    policy.load_state_dict(taught)
    args = tiny.config(EBPOConfig, tmp_path, **(SETTINGS | {"max_steps": 3} | settings))
    data = agent.prompts()
    built = Recording(policy, rewards, args, train_dataset=data, processing_class=tokens, tools=[agent.look])
    built.train()
    return built


def expected(trainer: Recording, of_turns: Any, **options: Any) -> list[list[np.ndarray]]:
    """The twin's advantages of every batch: of each completion, those of its turns."""
    twin = reference.EBPO(**trainer.args.ebpo_options())
    batches = []
    for completions in trainer.completions:
        rewards = of_turns(completions=completions)
        counts = [len(own) for own in rewards]
        names = np.repeat(np.arange(len(counts)), counts).tolist()
        got = by_turn(
            twin,
            np.concatenate(rewards),
            [name // tiny.GROUP for name in names],
            names,
            [k for count in counts for k in range(1, count + 1)],
            np.ones(len(names), dtype=bool),
            **options,
        )
        batches.append(np.split(got, np.cumsum(counts)[:-1]))
    return batches


def runs(mask: list[bool]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff([0, *mask, 0]))
    return list(zip(edges[::2], edges[1::2], strict=True))


def check(trainer: Recording, batches: list[list[np.ndarray]]) -> None:
    """Each run of the policy's tokens has its turn's advantage, and no other token has one."""
    several = 0
    assert len(trainer.outputs) == len(batches) > 0
    for output, of_batch in zip(trainer.outputs, batches, strict=True):
        mask = (output["completion_mask"] * output["tool_mask"]).bool().numpy()
        assert output["advantages"].shape == mask.shape
        assert output["advantages"].dtype == torch.float32
        for row, of_one in enumerate(of_batch):
            wanted = np.zeros(mask.shape[1])
            found = runs(mask[row].tolist())
            assert len(found) == len(of_one)
            for (start, stop), advantage in zip(found, of_one, strict=True):
                wanted[start:stop] = advantage
            np.testing.assert_allclose(output["advantages"][row].numpy(), wanted, rtol=1e-6, atol=1e-7)
            several += len(of_one) > 1
    assert several > 3  # the policy did take several turns


@pytest.mark.parametrize(
    "options",
    [{"ebpo_leave_one_out": "row"}, {"ebpo_normalize": "scale", "ebpo_gamma": 0.5, "ebpo_kappa": 1.0}],
    ids=["row", "scale"],
)
def test_every_turn_has_the_advantage_of_the_twin(
    tmp_path: Path, tokens: Any, taught: Any, options: dict[str, Any]
) -> None:
    trainer = train(tmp_path, tokens, taught, **options)
    batches = expected(trainer, costs, gamma=options.get("ebpo_gamma", 1.0))
    check(trainer, batches)
    assert set(trainer.ebpo.priors) >= {(), 1, 2}
    logged = list(trainer._logs["advantages"])[-8:]
    np.testing.assert_allclose(logged, [of_one.mean() for of_one in batches[-1]], rtol=1e-6, atol=1e-7)
    history = trainer.state.log_history[0]
    assert np.isfinite(history["loss"])
    assert history["grad_norm"] > 0
    assert "ebpo/shrinkage" in history


def test_a_number_is_the_reward_of_the_last_turn(tmp_path: Path, tokens: Any, taught: Any) -> None:
    trainer = train(tmp_path, tokens, taught, [costs, outcome], reward_weights=[1.0, 2.0])

    def both(completions: list[Any]) -> list[list[float]]:
        return [
            [*own[:-1], own[-1] + 2 * last] for own, last in zip(costs(completions), outcome(completions), strict=True)
        ]

    check(trainer, expected(trainer, both))


def test_a_prior_for_each_reward_function(tmp_path: Path, tokens: Any, taught: Any) -> None:
    trainer = train(tmp_path, tokens, taught, [costs, outcome], reward_weights=[1.0, 2.0], ebpo_per_reward=True)

    def last(completions: list[Any]) -> list[list[float]]:
        return [[0.0] * (len(c) - 1) + [o] for c, o in zip(costs(completions), outcome(completions), strict=True)]

    one, other = expected(trainer, costs), expected(trainer, last)
    check(trainer, [[a + 2 * b for a, b in zip(x, y, strict=True)] for x, y in zip(one, other, strict=True)])


def test_a_resumed_run_goes_on_with_the_priors_of_the_turns(tmp_path: Path, tokens: Any, taught: Any) -> None:
    whole = train(tmp_path / "whole", tokens, taught, max_steps=2, save_strategy="steps", save_steps=1)
    policy = agent.policy(tokens, steps=0)
    args = tiny.config(EBPOConfig, tmp_path / "again", **SETTINGS, max_steps=2)
    data = agent.prompts()
    again = Recording(policy, costs, args, train_dataset=data, processing_class=tokens, tools=[agent.look])
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert again.ebpo.state_dict() == whole.ebpo.state_dict()
    assert 2 in again.ebpo.priors


def test_a_wrong_number_of_rewards_is_named(tmp_path: Path, tokens: Any, taught: Any) -> None:
    def short(completions: list[Any], **_: Any) -> list[list[float]]:
        return [[0.0] * (len(messages(completion)) + 1) for completion in completions]

    with pytest.raises(ValueError, match=r"'short' returned \d rewards for completion 0, which has \d turns"):
        train(tmp_path, tokens, taught, short, max_steps=1)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"ebpo_turns": True}, "ebpo_turns=True with ebpo_normalize='batch'.*'scale' or 'none'"),
        ({"ebpo_turns": True, "ebpo_normalize": "none", "ebpo_shadow": True}, "ebpo_turns=True with ebpo_shadow=True"),
        ({"ebpo_gamma": 0.9}, "ebpo_gamma=0.9 discounts turns"),
        ({"ebpo_turns": True, "ebpo_normalize": "none", "ebpo_gamma": 2.0}, r"ebpo_gamma=2.0.*\[0, 1\]"),
        ({"ebpo_leave_one_out": "row"}, 'leave_one_out="row".*normalize="none"'),
    ],
)
def test_settings_without_a_meaning_are_refused(tmp_path: Path, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tiny.config(EBPOConfig, tmp_path, **settings)


def test_tokens_of_turns() -> None:
    """Tools' tokens and padding belong to no turn; a masked (truncated) completion has its assistant messages."""
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 0], [0] * 8, [1] * 8], dtype=torch.bool)
    assert turn_of_token(mask).tolist()[0] == [0, 0, 0, 1, 1, 1, 2, 2]
    talk = [{"role": role} for role in ("assistant", "tool", "assistant")]
    assert turn_counts(mask, [talk, talk, "text"]) == [3, 2, 1]
    got = by_token([np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0]), np.array([6.0])], mask, torch.float32)
    assert got.tolist() == [[1, 1, 0, 2, 0, 0, 3, 0], [0] * 8, [6] * 8]


def test_answers_of_every_kind_reach_trl_as_numbers() -> None:
    kept = TurnRewards()
    answers = [[1.0, None], 0.5, None, np.array([1.0, 2.0]), torch.tensor([0.25]), [None]]
    assert kept.recorded(0, lambda **_: answers)() == [1.0, 0.5, None, 3.0, 0.25, None]
    numbers = torch.full((6, 1), 9.0)
    got = kept.take(numbers, [2, 2, 2, 2, 1, 1], ["f"])
    wanted = [[1.0, np.nan], [0.0, 0.5], [np.nan] * 2, [1.0, 2.0], [0.25], [np.nan]]
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one, [other])

    async def later(**_: Any) -> Any:
        return answers

    assert asyncio.run(kept.recorded(1, functools.partial(later))()) == [1.0, 0.5, None, 3.0, 0.25, None]
    model = torch.nn.Linear(1, 1)
    assert kept.recorded(1, model) is model


def test_keys_with_their_turns_are_counted_when_the_trainer_is_built(tmp_path: Path, tokens: Any, taught: Any) -> None:
    data = agent.prompts().add_column("topic", ["a", "b", "a", "b"])
    policy = agent.policy(tokens, steps=0)
    policy.load_state_dict(taught)

    def built(max_keys: int) -> Recording:
        settings = SETTINGS | {"ebpo_keys": ["topic"], "ebpo_max_keys": max_keys, "max_steps": 2}
        args = tiny.config(EBPOConfig, tmp_path, **settings)
        return Recording(policy, costs, args, train_dataset=data, processing_class=tokens, tools=[agent.look])

    with pytest.raises(ValueError, match="10 keys, parents and turns included, more than ebpo_max_keys=9"):
        built(9)
    trainer = built(10)  # two topics, and in each of them up to three calls and an answer
    trainer.train()
    assert {("a", 1), ("a", 2), ("b", 1)} < set(trainer.ebpo.priors)


def test_the_callers_list_of_reward_functions_is_left_alone(tmp_path: Path, tokens: Any) -> None:
    """A second trainer that is given it would get sums in the place of turns."""
    rewards = [costs, outcome]
    data, policy = agent.prompts(), agent.policy(tokens, steps=0)
    for _ in range(2):
        args = tiny.config(EBPOConfig, tmp_path, **SETTINGS)
        trainer = Recording(policy, rewards, args, train_dataset=data, processing_class=tokens, tools=[agent.look])
        assert rewards == [costs, outcome]
        assert [function.__wrapped__ for function in trainer.reward_funcs] == rewards
