"""The paper's runs (recipes/verl): every combination is composed with verl's configuration and passes verl's checks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import verl.trainer
from hydra import compose, initialize_config_dir
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config

from ebpo_core import EBPO
from ebpo_core.integrations.verl.estimator import is_ebpo, key_columns, running

RECIPES = Path(__file__).parents[3] / "recipes" / "verl"


def choices(group: str) -> list[str]:
    return sorted(file.stem for file in (RECIPES / group).glob("*.yaml"))


def composed(*overrides: str) -> Any:
    """As ``python -m verl.trainer.main_ppo --config-dir recipes/verl`` composes it."""
    with initialize_config_dir(str(Path(verl.trainer.__file__).parent / "config"), version_base=None):
        return compose("ppo_trainer", [f"hydra.searchpath=[file://{RECIPES}]", *overrides])


def test_the_papers_choices_are_there() -> None:
    assert choices("policy") == ["llama-3.1-8b", "qwen3-14b", "qwen3-8b"]
    assert choices("method") == ["clip_cov", "dapo", "dr_grpo", "ebpo", "ebpo_keyed", "grpo", "kl_cov"]
    assert choices("order") == ["difficulty", "naive", "topic"]


RUNS = [("qwen3-8b", method, "topic") for method in choices("method")]
RUNS += [(policy, "ebpo", order) for policy, order in itertools.product(choices("policy"), choices("order"))]


@pytest.mark.parametrize(("policy", "method", "order"), sorted(set(RUNS)))
def test_every_run_passes_verls_checks(policy: str, method: str, order: str) -> None:
    config = composed(f"+policy={policy}", f"+method={method}", f"+order={order}")
    validate_config(config, need_reference_policy(config), need_critic(config))
    assert config.data.train_batch_size == 512
    assert config.actor_rollout_ref.actor.ppo_mini_batch_size == 128
    assert float(config.actor_rollout_ref.actor.optim.lr) == 1e-6
    assert config.actor_rollout_ref.rollout.n == 4
    assert config.data.shuffle is (order == "naive")
    assert not need_critic(config)
    assert config.actor_rollout_ref.actor.use_kl_loss is (method != "dapo")
    assert config.algorithm.filter_groups.enable is (method == "dapo")
    assert is_ebpo(config.algorithm) is method.startswith("ebpo")
    if is_ebpo(config.algorithm):
        assert running(config.algorithm).options == EBPO().options
        assert key_columns() == (("data_source",) if method == "ebpo_keyed" else ())


@pytest.mark.parametrize("completions", [4, 8, 16, 32])
def test_group_sizes_and_options_come_from_the_command_line(completions: int) -> None:
    config = composed(
        "+policy=qwen3-8b",
        "+method=ebpo",
        "+order=topic",
        f"actor_rollout_ref.rollout.n={completions}",
        "+algorithm.ebpo.decay=0.95",
    )
    validate_config(config, need_reference_policy(config), need_critic(config))
    assert config.actor_rollout_ref.rollout.n == completions
    assert running(config.algorithm).options == EBPO(decay=0.95).options
