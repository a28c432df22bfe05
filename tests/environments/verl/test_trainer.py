"""verl's trainer under Ray: padding and balancing, SIGKILL and resume, keys, sessions with several outputs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import transfer_queue
from omegaconf import OmegaConf
from trainer_process import Runner, compose, rollout

from ebpo_core import EBPO, reference
from ebpo_core.checkpoint import PRIOR_NAME

STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    transfer_queue.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
    yield
    transfer_queue.close()
    ray.shutdown()


def run(runner: Any, config: Any, steps: int = STEPS, **more: Any) -> dict[str, Any]:
    """A trainer made by ``config`` in the process ``runner``, trained to ``steps``."""
    started = ray.get(runner.start.remote(config))
    done = ray.get(runner.train.remote(steps, **more))
    return {**done, "started": started, "state": ray.get(runner.state.remote())}


@pytest.fixture(scope="module")
def first() -> Any:
    """The process of the uninterrupted run, and then of the one that is killed."""
    return Runner.remote()


@pytest.fixture(scope="module")
def runner() -> Any:
    """The process of all the rest: each trainer made in it starts anew. Importing verl is what takes the time here."""
    return Runner.remote()


@pytest.fixture(scope="module")
def uninterrupted(first: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(first, compose(tmp_path_factory.mktemp("uninterrupted")))


def real(keys: list[str]) -> list[str]:
    return [key for key in keys if not key.startswith("pad")]


def test_advantages_are_the_twins_under_padding_and_balancing(uninterrupted: dict[str, Any]) -> None:
    twin = reference.EBPO()
    for step in range(1, STEPS + 1):
        keys, fields, _ = rollout(step)
        seen = uninterrupted["rows"][step]
        assert len(seen) == 16, "verl pads 12 rows to 16 here; otherwise this test shows nothing"
        assert sorted(real(seen)) == sorted(keys)
        assert real(seen) != keys, "verl reorders the rows; otherwise this test shows nothing"
        rewards = [float(field["rm_scores"].sum()) for field in fields]
        expected = twin(rewards, np.array([field["uid"] for field in fields]))
        for key, value in zip(keys, expected, strict=True):
            np.testing.assert_allclose(uninterrupted["advantages"][key], value, atol=2e-6)
        for key in set(seen) - set(keys):
            assert not any(uninterrupted["advantages"][key])
    assert uninterrupted["state"]["prior"]["rewards"]["count"] == 12 * STEPS


def test_the_prior_is_logged_with_each_step(uninterrupted: dict[str, Any]) -> None:
    for metrics in uninterrupted["metrics"].values():
        assert {"ebpo/shrinkage", "ebpo/prior_mean", "ebpo/sigma2", "ebpo/tau2", "ebpo/saturated_fail"} <= set(metrics)


def test_a_killed_run_resumes_to_the_bit(
    first: Any, tmp_path: Path, uninterrupted: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    config = compose(tmp_path)
    with pytest.raises(ray.exceptions.RayActorError):
        run(first, config, killed_at=4)
    assert (tmp_path / "global_step_2" / PRIOR_NAME).is_file()
    runner = request.getfixturevalue("runner")
    resumed = run(runner, config)
    assert resumed["started"] == 2
    for step in range(3, STEPS + 1):
        for key in real(resumed["rows"][step]):
            assert resumed["advantages"][key] == uninterrupted["advantages"][key]
    assert resumed["state"] == uninterrupted["state"]

    later = compose(tmp_path, "trainer.resume_mode=resume_path", f"trainer.resume_from_path={tmp_path}/global_step_4")
    again = run(runner, later)
    assert again["started"] == 4
    assert again["state"] == uninterrupted["state"]

    fresh = run(runner, compose(tmp_path, "trainer.resume_mode=disable"), steps=1)
    assert fresh["started"] == 0
    assert fresh["state"]["prior"]["rewards"]["count"] == 12


def test_a_checkpoint_without_the_prior_is_not_resumed(runner: Any, tmp_path: Path) -> None:
    config = compose(tmp_path)
    run(runner, config, steps=2)
    (tmp_path / "global_step_2" / PRIOR_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"global_step_2.*resume_mode=disable.*allow_missing_prior=true"):
        run(runner, config)
    allowed = run(runner, compose(tmp_path, "+algorithm.ebpo.allow_missing_prior=true"), steps=3)
    assert allowed["started"] == 2
    assert allowed["state"]["prior"]["rewards"]["count"] == 12


def test_a_run_goes_on_under_other_options(runner: Any, tmp_path: Path) -> None:
    run(runner, compose(tmp_path), steps=2)
    done = run(runner, compose(tmp_path, "+algorithm.ebpo.decay=0.5"), steps=3)
    assert done["started"] == 2
    assert done["state"]["options"]["decay"] == 0.5
    assert done["state"]["prior"]["rewards"]["count"] == 24 * 0.5 + 12


def test_a_session_counts_once_by_its_last_output(runner: Any, tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    done = run(runner, compose(tmp_path), outputs=3)
    twin = reference.EBPO()
    for step in range(1, STEPS + 1):
        keys, fields, _ = rollout(step, outputs=3)
        rewards = {
            key.rsplit("_", 1)[0]: float(field["rm_scores"].sum()) for key, field in zip(keys, fields, strict=True)
        }
        expected = twin(list(rewards.values()), np.array([session.rsplit("_", 1)[0] for session in rewards]))
        advantages = dict(zip(rewards, expected, strict=True))
        for key in keys:
            np.testing.assert_allclose(done["advantages"][key], advantages[key.rsplit("_", 1)[0]], atol=2e-6)
    assert done["state"]["prior"]["rewards"]["count"] == uninterrupted["state"]["prior"]["rewards"]["count"]


def keyed(columns: str, *names: str) -> Any:
    """Overrides and the advantages expected with these columns as keys."""
    ebpo = EBPO()
    expected: dict[str, float] = {}
    for step in range(1, STEPS + 1):
        keys, fields, _ = rollout(step)
        values = [(field["data_source"], field["extra_info"]["level"]) for field in fields]
        rows = [value[0] if len(names) == 1 else value for value in values]
        rewards = np.array([float(field["rm_scores"].sum()) for field in fields])
        advantages = ebpo(rewards, [field["uid"] for field in fields], keys=rows)
        expected |= dict(zip(keys, advantages, strict=True))
    return [f"+algorithm.ebpo.keys={columns}"], expected, ebpo


@pytest.mark.parametrize(
    ("columns", "names"),
    [("data_source", ["data_source"]), ("[data_source,extra_info.level]", ["data_source", "extra_info.level"])],
)
def test_columns_of_the_data_set_choose_the_prior(runner: Any, tmp_path: Path, columns: str, names: list[str]) -> None:
    overrides, expected, ebpo = keyed(columns, *names)
    run(runner, compose(tmp_path, *overrides), steps=2)
    done = run(runner, compose(tmp_path, *overrides))  # resumes: the priors of all keys come back
    assert done["started"] == 2
    assert len(done["advantages"]) > 0
    for key in real(list(done["advantages"])):
        np.testing.assert_allclose(done["advantages"][key], expected[key], atol=2e-6)
    assert done["state"] == ebpo.state_dict()


def test_a_column_that_is_not_there_raises(runner: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"algorithm.ebpo.keys names 'topic', which is no column"):
        run(runner, compose(tmp_path, "+algorithm.ebpo.keys=topic"), steps=1)
    with pytest.raises(ValueError, match=r"names 'extra_info.topic', and a row has no 'topic'"):
        run(runner, compose(tmp_path, "+algorithm.ebpo.keys=extra_info.topic"), steps=1)


def test_another_estimator_is_left_alone(runner: Any, tmp_path: Path) -> None:
    config = compose(tmp_path, "algorithm.adv_estimator=grpo")
    done = run(runner, config, steps=2)
    assert not (tmp_path / "global_step_2" / PRIOR_NAME).exists()
    assert done["metrics"] == {1: {}, 2: {}}
