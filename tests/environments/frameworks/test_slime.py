"""slime's rollout manager, samples and data source with EBPO. Runs where slime's source is (fetch_sources.py)."""

# ruff: noqa: E402 - what is imported last needs what comes before it
from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import absent
import numpy as np
import pytest
import torch

types = absent.source("slime", "slime.utils.types")
misc = absent.source("slime", "slime.utils.misc")
ppo_utils = absent.source("slime", "slime.utils.ppo_utils")

from ebpo_core import reference
from ebpo_core.integrations import slime

ROOT = Path(misc.__file__).parents[1]
FUNCTION = "ebpo_core.integrations.slime.reward_post_process"
DATA_SOURCE = "ebpo_core.integrations.slime.PriorDataSource"


def manager() -> Any:
    """slime's own reward methods of ``RolloutManager``; its module needs SGLang, so they are cut from the file."""
    tree = ast.parse((ROOT / "ray" / "rollout.py").read_text())
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "RolloutManager"]
    found.body = [
        node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "_post_process_rewards"
    ]
    found.decorator_list = []
    space = {"torch": torch, "Sample": types.Sample}
    exec(compile(ast.Module([found], []), "rollout.py", "exec"), space)  # noqa: S102
    return space["RolloutManager"]()


def arguments(folder: Path | None = None, **changed: Any) -> Any:
    values = {"advantage_estimator": "grpo", "normalize_advantages": False, "grpo_std_normalization": True}
    values |= {"dynamic_sampling_filter_path": None, "reward_key": None, "rollout_global_dataset": True}
    values |= {"prompt_data": None, "buffer_filter_path": None, "n_samples_per_prompt": 2, "rollout_shuffle": False}
    values |= {"save": str(folder), "load": str(folder), "hf_checkpoint": None}
    return SimpleNamespace(**{**values, **changed})


def samples(seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [
        types.Sample(group_index=group, index=row, reward=0.0 if group == 0 else float(rng.integers(2)))
        for row, group in enumerate(rng.permutation(np.repeat(np.arange(4), [3, 4, 1, 5])).tolist())
    ]


def test_slimes_rollout_manager_calls_it_and_equals_the_twin_over_steps() -> None:
    runner, twin = manager(), reference.EBPO()
    runner.args, runner.custom_reward_post_process_func = arguments(), misc.load_function(FUNCTION)
    for step in range(3):
        batch = samples(step)
        raw, rewards = runner._post_process_rewards(batch)
        assert raw == [sample.reward for sample in batch]
        np.testing.assert_allclose(rewards, twin(raw, [sample.group_index for sample in batch]), atol=1e-12)


def test_slime_takes_the_rewards_for_advantages() -> None:
    rewards, kl = torch.tensor([0.5, -2.0]), [torch.zeros(3), torch.zeros(2)]
    returns = ppo_utils.get_grpo_returns(rewards, kl)
    assert [row.tolist() for row in returns] == [[0.5] * 3, [-2.0] * 2]


def test_slimes_data_source_saves_and_loads_the_prior(tmp_path: Path) -> None:
    source = misc.load_function(DATA_SOURCE)(arguments(tmp_path))
    assert len(source.get_samples(2)) == 2
    slime.reward_post_process(source.args, samples(0))
    saved = slime.estimator.get().state_dict()
    source.save(4)
    assert (tmp_path / "rollout" / "4" / "ebpo_prior.json").is_file()
    slime.estimator.reset()
    again = misc.load_function(DATA_SOURCE)(arguments(tmp_path))
    again.load(4)
    assert again.sample_group_index == 2
    assert slime.estimator.get().state_dict() == saved
    again.load(-1)  # a fresh run
    with pytest.raises(FileNotFoundError, match="allow_missing_prior"):
        again.load(5)


def test_a_data_source_that_slime_never_saves_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--disable-rollout-global-dataset"):
        misc.load_function(DATA_SOURCE)(arguments(tmp_path, rollout_global_dataset=False))


def test_seams() -> None:
    """What this adapter rests on and slime may move."""
    flags = (ROOT / "utils" / "arguments.py").read_text()
    for flag in (
        "custom-reward-post-process-path",
        "data-source-path",
        "normalize-advantages",
        "dynamic-sampling-filter-path",
        "disable-grpo-std-normalization",
        "disable-rollout-global-dataset",
        "custom-config-path",
    ):
        assert f'"--{flag}"' in flags
    loss = (ROOT / "backends" / "megatron_utils" / "loss.py").read_text()
    assert 'in ["grpo", "gspo", "cispo"]' in loss
    assert "rollout_manager.save.remote(rollout_id)" in (ROOT.parent / "train.py").read_text()
    assert "rollout_manager.load.remote(args.start_rollout_id - 1)" in (ROOT / "ray" / "placement_group.py").read_text()
