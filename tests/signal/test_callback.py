"""SignalCallback in real runs of TRL's GRPOTrainer and of EBPOTrainer, and on logs made by hand."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl")

import trainer_worker as tiny
from trl import GRPOConfig, GRPOTrainer

from ebpo_core.signal import SignalCallback, SignalWarning
from ebpo_core.trainer import EBPOConfig, EBPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def zero(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [0.1] * len(completion_ids)


def by_prompt(prompts: list[str], **_: Any) -> list[float]:
    """One reward for all completions of a prompt: every group is dead, and the verifier is not constant."""
    return [float(prompt.split()[0]) for prompt in prompts]


def train(
    tmp_path: Path, rewards: Any, *, ebpo: bool = False, window: int = 2, **settings: Any
) -> tuple[SignalCallback, list[str]]:
    """The callback of a run of four steps, and the messages of its warnings."""
    callback = SignalCallback(window=window)
    args = tiny.config(EBPOConfig if ebpo else GRPOConfig, tmp_path, **({"max_steps": 4} | settings))
    trainer = tiny.build(EBPOTrainer if ebpo else GRPOTrainer, args, rewards, callbacks=[callback])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SignalWarning)
        trainer.train()
    return callback, [str(one.message) for one in caught if issubclass(one.category, SignalWarning)]


@pytest.mark.parametrize("ebpo", [False, True], ids=["grpo", "ebpo"])
def test_a_run_with_a_signal_is_left_alone(tmp_path: Path, ebpo: bool) -> None:
    callback, messages = train(tmp_path, tiny.size, ebpo=ebpo)
    assert callback.warned == {}
    assert messages == []


@pytest.mark.parametrize("ebpo", [False, True], ids=["grpo", "ebpo"])
def test_a_constant_verifier_is_warned_of_once(tmp_path: Path, ebpo: bool) -> None:
    callback, messages = train(tmp_path, zero, ebpo=ebpo)
    assert list(callback.warned) == ["constant_verifier"]
    assert len(messages) == 1
    assert messages[0].startswith("step 2: over the last 2 logs every reward was 0.1:")


@pytest.mark.parametrize("ebpo", [False, True], ids=["grpo", "ebpo"])
def test_dead_groups_are_warned_of_once(tmp_path: Path, ebpo: bool) -> None:
    callback, messages = train(tmp_path, by_prompt, ebpo=ebpo)
    assert list(callback.warned) == ["dead_groups"]
    assert len(messages) == 1
    assert "100% of the groups had equal rewards, more than max_dead=50%" in messages[0]


def test_a_constant_function_beside_another(tmp_path: Path) -> None:
    assert list(train(tmp_path, [tiny.size, zero])[0].warned) == ["constant_reward"]


def test_one_prompt_per_generation_batch(tmp_path: Path) -> None:
    one = {"per_device_train_batch_size": tiny.GROUP, "max_steps": 1}
    callback, messages = train(tmp_path, tiny.size, ebpo=True, **one)
    assert list(callback.warned) == ["one_group_per_step"]
    assert 'ebpo_normalize="scale"' in messages[0]
    assert train(tmp_path, tiny.size, ebpo=True, ebpo_normalize="scale", **one)[1] == []


def test_batch_scaling_hides_the_share(tmp_path: Path) -> None:
    # TRL's own metric is 0 here, though every group is dead.
    assert list(train(tmp_path, by_prompt, scale_rewards="batch")[0].warned) == ["no_dead_share"]


def test_evaluation_and_short_runs_are_not_judged(tmp_path: Path) -> None:
    callback, _ = train(tmp_path, zero, window=5)
    assert callback.warned == {}


def watch(logs: list[dict[str, Any]], main: bool = True, **args: Any) -> SignalCallback:
    callback = SignalCallback(window=len(logs))
    state = SimpleNamespace(is_world_process_zero=main, global_step=1)
    settings = SimpleNamespace(**args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SignalWarning)
        for log in logs:
            callback.on_log(settings, state, None, logs={"eval_reward": 0.0})
            callback.on_log(settings, state, None, logs=log)
    return callback


def test_logs_without_a_reward() -> None:
    healthy = {"reward": 0.5, "reward_std": 0.5, "frac_reward_zero_std": 0.2}
    assert list(watch([healthy, {**healthy, "reward": None, "reward_std": None}]).warned) == ["failing_verifier"]
    assert watch([healthy] * 3).warned == {}


def test_the_estimators_own_shares_go_before_those_of_trl() -> None:
    log = {"reward": 0.5, "reward_std": 0.5, "frac_reward_zero_std": 0.0}
    dead = log | {"ebpo/saturated_fail": 0.4, "ebpo/saturated_pass": 0.3}
    assert list(watch([dead] * 2).warned) == ["dead_groups"]
    assert watch([dead] * 2, main=False).warned == {}
    assert watch([{**log, "frac_reward_zero_std": 1.0}] * 2, scale_rewards="batch").warned == {}


@pytest.mark.parametrize(("name", "value"), [("window", 0), ("max_dead", 1.5), ("max_dead", -0.1)])
def test_arguments_are_checked(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        SignalCallback(**{name: value})  # type: ignore[arg-type]
