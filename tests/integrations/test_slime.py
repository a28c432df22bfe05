"""slime's reward post-processing without slime: objects with the fields that it reads of slime's samples."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ebpo_core import reference
from ebpo_core.integrations import checks, slime


@dataclass
class Sample:
    """The fields of ``slime.utils.types.Sample`` that are read; the suite in integrations/ runs slime's own class."""

    group_index: int | None
    reward: Any
    rollout_id: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def get_reward_value(self, args: Any) -> Any:
        return self.reward[args.reward_key] if args.reward_key else self.reward


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EBPO_OPTIONS", raising=False)
    monkeypatch.setattr(checks, "_warned", set())
    slime.estimator.reset()


def arguments(**changed: Any) -> Any:
    values = {"advantage_estimator": "grpo", "normalize_advantages": False, "grpo_std_normalization": True}
    values |= {"dynamic_sampling_filter_path": None, "reward_key": None}
    return SimpleNamespace(**{**values, **changed})


def uneven(seed: int, sizes: tuple[int, ...] = (4, 1, 3, 6)) -> list[Sample]:
    """Groups of different sizes, the first one saturated, rows in any order."""
    rng = np.random.default_rng(seed)
    samples = [
        Sample(100 * seed + group, 0.0 if group == 0 else float(rng.choice([0.0, 0.5, 1.0])))
        for group, size in enumerate(sizes)
        for _ in range(size)
    ]
    return [samples[row] for row in rng.permutation(len(samples))]


def test_uneven_groups_in_any_order_equal_the_twin_over_steps() -> None:
    twin = reference.EBPO()
    for step in range(4):
        samples = uneven(step)
        raw, advantages = slime.reward_post_process(arguments(), samples)
        assert raw == [sample.reward for sample in samples]
        assert all(type(value) is float for value in advantages)
        np.testing.assert_allclose(advantages, twin(raw, [sample.group_index for sample in samples]), atol=1e-12)


def test_rewards_may_be_mappings() -> None:
    plain = [Sample(0, 1.0), Sample(0, 0.0), Sample(1, 0.5)]
    named = [Sample(sample.group_index, {"score": sample.reward, "other": 9.0}) for sample in plain]
    expected = slime.reward_post_process(arguments(), plain)
    slime.estimator.reset()
    assert slime.reward_post_process(arguments(reward_key="score"), named) == expected


def test_what_could_not_be_scored_gets_zero_and_does_not_count() -> None:
    scored = [Sample(0, 1.0), Sample(0, 0.0), Sample(1, 1.0), Sample(1, 1.0)]
    _, expected = slime.reward_post_process(arguments(), scored)
    seen = slime.estimator.get().state_dict()
    slime.estimator.reset()
    raw, advantages = slime.reward_post_process(arguments(), [Sample(0, None), *scored, Sample(2, math.nan)])
    assert raw[0] is None
    assert advantages == [0.0, *expected, 0.0]
    assert slime.estimator.get().state_dict() == seen


def test_samples_cut_from_one_rollout_count_once() -> None:
    whole = [Sample(0, 1.0, 1), Sample(0, 0.0, 2), Sample(1, 0.5, 3), Sample(1, 0.0, 4)]
    _, expected = slime.reward_post_process(arguments(), whole)
    seen = slime.estimator.get().state_dict()
    slime.estimator.reset()
    cut = [whole[0], Sample(0, 1.0, 1), *whole[1:], Sample(0, 1.0, 1)]
    _, advantages = slime.reward_post_process(arguments(), cut)
    assert advantages == [expected[0], expected[0], *expected[1:], expected[0]]
    assert slime.estimator.get().state_dict() == seen


def test_a_rollout_counts_once_whatever_kind_of_number_its_reward_is() -> None:
    torch = pytest.importorskip("torch")
    rewards, rollouts = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0], [0, 0, 0, 1, 2, 3]
    groups = [0, 0, 0, 0, 1, 1]
    results = []
    for kind in (float, np.float32, torch.tensor):
        slime.estimator.reset()
        samples = [Sample(g, kind(r), rollout) for g, r, rollout in zip(groups, rewards, rollouts, strict=True)]
        results.append(slime.reward_post_process(arguments(), samples)[1])
        assert slime.running(arguments()).prior.count == 4
    assert results[0] == results[1] == results[2]


def test_equal_rewards_of_different_rollouts_all_count() -> None:
    slime.reward_post_process(arguments(), [Sample(0, 1.0), Sample(0, 1.0), Sample(0, 1.0, 1), Sample(0, 1.0, 2)])
    assert slime.estimator.get().prior.state_dict()["rewards"]["count"] == 4


def test_keys_are_fields_of_the_metadata() -> None:
    samples = [Sample(g, float(i % (g + 2) == 0), metadata={"topic": "ab"[g]}) for g in range(2) for i in range(4)]
    keyed = arguments(ebpo={"keys": "topic"})
    slime.reward_post_process(keyed, samples)
    assert set(slime.running(keyed).priors) >= {"a", "b"}
    slime.estimator.reset()
    with pytest.raises(ValueError, match=r"'subject'.*only \['topic'\]"):
        slime.reward_post_process(arguments(ebpo={"keys": ["subject"]}), samples)


def test_a_sample_without_a_group_is_refused_and_leaves_no_trace() -> None:
    slime.reward_post_process(arguments(), uneven(0))
    seen = slime.estimator.get().state_dict()
    for bad, message in ((Sample(None, 1.0), "group_index"), (Sample(0, math.inf), "inf")):
        with pytest.raises(ValueError, match=message):
            slime.reward_post_process(arguments(), [Sample(0, 1.0), bad])
    assert slime.estimator.get().state_dict() == seen


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"advantage_estimator": "reinforce_plus_plus"}, "grpo, gspo, cispo"),
        ({"normalize_advantages": True}, "--normalize-advantages"),
        ({"ebpo": {"decai": 0.9}}, "did you mean 'decay'"),
    ],
)
def test_settings_under_which_it_would_not_be_ebpo_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slime.reward_post_process(arguments(**changed), uneven(0))


def test_the_dynamic_filter_warns_once() -> None:
    filtered = arguments(dynamic_sampling_filter_path="slime.rollout.filter_hub.check_reward_nonzero_std")
    with pytest.warns(UserWarning, match="--dynamic-sampling-filter-path"):
        slime.reward_post_process(filtered, uneven(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slime.reward_post_process(filtered, uneven(1))


def test_slimes_switch_for_the_std_is_obeyed() -> None:
    samples = uneven(3)
    raw, advantages = slime.reward_post_process(arguments(grpo_std_normalization=False), samples)
    twin = reference.EBPO(normalize="none")
    np.testing.assert_allclose(advantages, twin(raw, [sample.group_index for sample in samples]), atol=1e-12)


def test_the_data_source_needs_slime_and_nothing_else_does() -> None:
    with pytest.raises(ModuleNotFoundError, match="slime"):
        _ = slime.PriorDataSource
    with pytest.raises(AttributeError, match="has no attribute 'DataSource'"):
        _ = slime.DataSource
