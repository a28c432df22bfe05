"""rLLM's advantage computation with EBPO. Runs where rLLM's source is (fetch_sources.py)."""

# ruff: noqa: E402 - what is imported last needs what comes before it
from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import absent
import numpy as np
import pytest
from omegaconf import OmegaConf

advantage = absent.source("rllm", "rllm.trainer.algorithms.advantage")
algorithms = absent.source("rllm", "rllm.trainer.algorithms.config")
types = absent.source("rllm", "rllm.types")

from ebpo_core import reference
from ebpo_core.integrations import rllm


def config(**changed: Any) -> Any:
    """As rLLM's trainers make it of ``rllm.algorithm``."""
    return algorithms.AlgorithmConfig.from_config(OmegaConf.create({"adv_estimator": "ebpo", **changed}))


def groups(seed: int, role: str = "solver", sizes: tuple[int, ...] = (3, 1, 4, 2)) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [
        types.TrajectoryGroup(
            group_id=f"task{seed}-{number}:{role}",
            trajectories=[
                types.Trajectory(
                    reward=0.0 if number == 0 else float(rng.integers(2)), steps=[types.Step(response_ids=[1, 2])]
                )
                for _ in range(size)
            ],
        )
        for number, size in enumerate(sizes)
    ]


def rewards(made: list[Any]) -> list[np.ndarray]:
    return [np.array([trajectory.reward for trajectory in group.trajectories]) for group in made]


def assigned(made: list[Any]) -> np.ndarray:
    return np.array([t.steps[0].advantage for group in made for t in group.trajectories])


def test_the_unknown_name_reaches_it_by_way_of_other() -> None:
    made = config()
    assert made.estimator is algorithms.rLLMAdvantageEstimator.OTHER
    assert advantage.get_rllm_adv_estimator(made.estimator) is rllm.compute_ebpo_advantages
    assert advantage.get_rllm_adv_estimator("ebpo") is rllm.compute_ebpo_advantages


def test_a_batch_equals_the_twin_over_steps() -> None:
    twin = reference.EBPO()
    for step in range(3):
        made = groups(step)
        advantage.collect_reward_and_advantage_from_trajectory_groups(made, config())
        sizes = [len(group) for group in rewards(made)]
        index = np.repeat(np.arange(len(sizes)), sizes)
        expected = twin(np.concatenate(rewards(made)), index, keys=["solver"] * len(index))
        np.testing.assert_allclose(assigned(made), expected, atol=1e-12)


def test_single_groups_are_scored_as_they_come() -> None:
    """As rLLM's asynchronous buffer calls it: one finished group at a time."""
    twin = reference.EBPO()
    for step in range(4):
        for group in groups(step, sizes=(3, 4)):
            advantage.collect_reward_and_advantage_from_trajectory_groups([group], config())
            expected = twin.group(rewards([group])[0], key="solver")
            np.testing.assert_allclose(assigned([group]), expected, atol=1e-12)


def test_roles_have_priors_of_their_own() -> None:
    made = groups(0, "solver") + groups(0, "judge")
    advantage.collect_reward_and_advantage_from_trajectory_groups(made, config())
    assert {"solver", "judge"} <= set(rllm.running().priors)
    by_role = config(norm_adv_by_std_in_grpo=True)
    by_role.estimator_map = {"solver": "ebpo"}
    advantage.collect_reward_and_advantage_from_trajectory_groups(groups(1), by_role)


def test_rllms_switch_for_the_std_is_obeyed() -> None:
    made, twin = groups(5), reference.EBPO(normalize="none")
    advantage.collect_reward_and_advantage_from_trajectory_groups(made, config(norm_adv_by_std_in_grpo=False))
    sizes = [len(group) for group in rewards(made)]
    index = np.repeat(np.arange(len(sizes)), sizes)
    expected = twin(np.concatenate(rewards(made)), index, keys=["solver"] * len(index))
    np.testing.assert_allclose(assigned(made), expected, atol=1e-12)


def test_save_and_load(tmp_path: Path) -> None:
    advantage.collect_reward_and_advantage_from_trajectory_groups(groups(0), config())
    saved = rllm.running().state_dict()
    rllm.save(tmp_path)
    rllm.estimator.reset()
    rllm.load(tmp_path)
    assert rllm.running().state_dict() == saved
    with pytest.raises(FileNotFoundError, match="allow_missing_prior"):
        rllm.load(tmp_path / "none")


def test_bad_rewards_are_refused_and_leave_no_trace() -> None:
    rllm.compute_ebpo_advantages(rewards(groups(0)))
    seen = rllm.running().state_dict()
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="return finite rewards"):
            rllm.compute_ebpo_advantages([np.array([bad, 1.0]), np.array([0.0])])
    assert rllm.running().state_dict() == seen
    assert rllm.compute_ebpo_advantages([]) == ([], [])


def test_seams() -> None:
    """What this adapter rests on and rLLM may move."""
    called = inspect.getsource(advantage.collect_reward_and_advantage_from_trajectory_groups)
    for text in ("rewards=traj_rewards", "algorithm_config=algorithm_config", "traj_groups=traj_groups"):
        assert text in called
    buffer = inspect.getsource(absent.source("rllm", "rllm.trainer.buffer"))
    scored = buffer.index("collect_reward_and_advantage_from_trajectory_groups(\n")
    assert scored < buffer.index("self._rs_config.filter_uniform_groups:")  # after EBPO has scored them: no harm
