"""verl's ``compute_advantage`` with ``adv_estimator="ebpo"`` against the NumPy twin."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from batches import batch, twins_advantages, with_padding
from omegaconf import OmegaConf
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.ray_trainer import compute_advantage

from ebpo_core import reference
from ebpo_core.integrations import checks, verl
from ebpo_core.integrations.verl import estimator as verl_estimator


def run(data: Any, config: Any = None) -> np.ndarray:
    """verl's own function, on a copy."""
    norm = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
    done = compute_advantage(copy.deepcopy(data), "ebpo", norm_adv_by_std_in_grpo=norm, config=config)
    assert torch.equal(done.batch["returns"], done.batch["advantages"])
    assert done.batch["advantages"].dtype == data.batch["token_level_rewards"].dtype
    return done.batch["advantages"].double().numpy()


def algorithm(**ebpo: Any) -> Any:
    config = OmegaConf.create({"adv_estimator": "ebpo", "ebpo": ebpo})
    OmegaConf.set_struct(config, True)
    return config


def test_steps_of_a_run_equal_the_twins() -> None:
    twin = reference.EBPO()
    for seed in range(5):
        data = batch(seed)
        np.testing.assert_allclose(run(data), twins_advantages(twin, data), atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"normalize": "scale", "eps": 1e-4},
        {"normalize": "none", "tau2": "debiased", "sigma2": "within"},
        {"leave_one_out": True, "decay": 0.9},
        {"score": "before", "ddof": 1, "norm_ddof": 0},
        {"shrinkage": 0.5},
    ],
)
def test_options_under_algorithm_ebpo_reach_the_estimator(options: dict[str, Any]) -> None:
    twin = reference.EBPO(**options)
    for seed in range(3):
        data = batch(seed)
        np.testing.assert_allclose(run(data, algorithm(**options)), twins_advantages(twin, data), atol=2e-6)


def test_a_saturated_group_gets_a_signal_that_grpo_does_not_give() -> None:
    data = batch(3)
    grpo = compute_advantage(copy.deepcopy(data), "grpo").batch["advantages"]
    assert not grpo[:4].any()
    assert np.abs(run(data)[:4]).max() > 0.1


def test_rows_may_stand_in_any_order() -> None:
    data = batch(1)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(data)))
    straight = run(data)
    verl.reset()
    shuffled = copy.deepcopy(data)
    shuffled.reorder(order)
    np.testing.assert_array_equal(run(shuffled), straight[order.numpy()])


def test_padding_leaves_no_trace() -> None:
    plain = [run(batch(seed)) for seed in range(3)]
    prior = verl_estimator.running(None).prior
    verl.reset()
    for seed in range(3):
        padded = run(with_padding(batch(seed), 3, seed))
        np.testing.assert_array_equal(padded[:-3], plain[seed])
        assert not padded[-3:].any()
    assert verl_estimator.running(None).prior == prior


def test_padding_is_also_known_by_its_uid() -> None:
    data = with_padding(batch(0), 2)
    data.batch["response_mask"][-2:, 0] = 1
    np.testing.assert_array_equal(run(data)[-2:], 0)
    assert verl_estimator.running(None).prior.count == 20


def test_a_row_without_response_tokens_does_not_count() -> None:
    """As one whose tokens rollout correction rejected."""
    data = batch(0)
    data.batch["response_mask"][5] = 0
    np.testing.assert_allclose(run(data), twins_advantages(reference.EBPO(), data), atol=2e-6)
    assert verl_estimator.running(None).prior.count == 19


def test_a_batch_of_padding_alone_is_no_update() -> None:
    data = with_padding(batch(0), 4)
    assert not run(data.select_idxs(list(range(20, 24)))).any()
    assert verl_estimator.running(None).prior.count == 0


def test_groups_of_different_sizes() -> None:
    data = batch(2).select_idxs([0, 1, 2, 3, 4, 8, 9, 10, 12, 13])
    np.testing.assert_allclose(run(data), twins_advantages(reference.EBPO(), data), atol=2e-6)


def test_sub_batches_of_one_step_are_updates_of_their_own() -> None:
    """As with ``parameter_sync_step`` above 1."""
    twin, data = reference.EBPO(), batch(4, prompts=6)
    for part in data.chunk(3):
        np.testing.assert_allclose(run(part), twins_advantages(twin, part), atol=2e-6)


def test_without_normalisation_by_std_the_raw_advantage_is_left() -> None:
    data = batch(0)
    config = OmegaConf.create({"norm_adv_by_std_in_grpo": False})
    np.testing.assert_allclose(run(data, config), twins_advantages(reference.EBPO(normalize="none"), data), atol=2e-6)
    verl.reset()
    config = OmegaConf.create({"norm_adv_by_std_in_grpo": False, "ebpo": {"normalize": "scale"}})
    np.testing.assert_allclose(run(data, config), twins_advantages(reference.EBPO(normalize="scale"), data), atol=2e-6)


def test_the_dataclass_config_works() -> None:
    data = batch(0)
    np.testing.assert_array_equal(run(data, AlgoConfig(adv_estimator="ebpo")), run_again(data))


def run_again(data: Any) -> np.ndarray:
    verl.reset()
    return run(data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_advantages_have_the_rewards_dtype(dtype: torch.dtype) -> None:
    data = batch(0, dtype=dtype)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-12
    np.testing.assert_allclose(run(data), twins_advantages(reference.EBPO(), data), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_raises_and_leaves_the_prior(value: float) -> None:
    run(batch(0))
    before = verl_estimator.running(None).state_dict()
    data = batch(1)
    data.batch["token_level_rewards"][7, 0] = value
    with pytest.raises(ValueError, match=r"row 7 \(uid '.*1 of 20 rows are not finite.*reward function"):
        run(data)
    assert verl_estimator.running(None).state_dict() == before


@pytest.mark.parametrize(
    ("ebpo", "error", "match"),
    [
        ({"epsilon": 1}, ValueError, "algorithm.ebpo has the unknown option 'epsilon'.*'eps'"),
        ({"key": "data_source"}, ValueError, "unknown option 'key'.*did you mean 'keys'"),
        ({"decay": 0}, ValueError, "algorithm.ebpo: .*decay"),
        ({"allow_missing_prior": "yes"}, TypeError, "allow_missing_prior='yes'.*true or false"),
        ({"keys": 3}, TypeError, "algorithm.ebpo.keys=3.*column"),
        ({"keys": {"a": 1}}, TypeError, "algorithm.ebpo.keys=.*column"),
    ],
)
def test_wrong_options_raise_at_the_first_batch(ebpo: dict[str, Any], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        run(batch(0), algorithm(**ebpo))


def test_another_setting_in_the_same_process_raises() -> None:
    run(batch(0), algorithm(eps=1e-4))
    with pytest.raises(ValueError, match=r"already estimates with.*reset\(\)"):
        run(batch(1), algorithm(eps=1e-3))


def test_keys_without_the_callback_raise() -> None:
    with pytest.raises(ValueError, match=r"keys=\['data_source'\].*checkpoint_callback_class=ebpo_core"):
        run(batch(0), algorithm(keys="data_source"))


def test_a_batch_without_uids_raises() -> None:
    data = batch(0)
    data.non_tensor_batch.pop("uid")
    with pytest.raises(ValueError, match="no 'uid'"):
        run(data)


def whole(completions: int = 4, save_freq: int = -1, **more: Any) -> Any:
    """A configuration with the nodes that the estimator looks at; its ``algorithm`` node knows its parent."""
    return OmegaConf.create(
        {
            "algorithm": {"adv_estimator": "ebpo", **more},
            "trainer": {"save_freq": save_freq},
            "actor_rollout_ref": {"rollout": {"n": completions}},
        }
    ).algorithm


def test_sessions_of_several_outputs_raise_without_the_callback() -> None:
    data = batch(0)
    run(data, whole(completions=4))
    with pytest.raises(ValueError, match=r"4 rows and actor_rollout_ref.rollout.n=2.*checkpoint_callback_class"):
        run(with_padding(data, 7), whole(completions=2))


@pytest.mark.parametrize("rollout", [{}, {"rollout": {}}, {"rollout": {"n": None}}])
def test_a_configuration_without_n_has_verls_default(rollout: dict[str, Any]) -> None:
    nodes = {"algorithm": {"adv_estimator": "ebpo"}, "trainer": {"save_freq": -1}}
    for root in (nodes, {**nodes, "actor_rollout_ref": rollout}):
        with pytest.raises(ValueError, match=r"4 rows and actor_rollout_ref.rollout.n is not set.*checkpoint_callback"):
            run(batch(0), OmegaConf.create(root).algorithm)


def test_a_filter_of_saturated_groups_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_warned", set())
    config = whole(filter_groups={"enable": True, "metric": "acc"})
    with pytest.warns(UserWarning, match=r"verl filters saturated groups.*algorithm\.filter_groups\.enable"):
        run(batch(0), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(batch(1), config)


def test_checkpoints_that_will_lack_the_prior_are_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verl, "_warned_unsaved", False)
    with pytest.warns(UserWarning, match=r"will not hold EBPO's prior.*checkpoint_callback_class"):
        run(batch(0), whole(save_freq=10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(batch(1), whole(save_freq=10))
