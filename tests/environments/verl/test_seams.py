"""Where the adapter touches verl. Each of these fails first, and by name, when a release of verl moves the seam."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from typing import Any

import verl
from verl.trainer.ppo import checkpoint_callback, core_algos, padding_utils
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

from ebpo_core.integrations.verl import PriorCheckpoint, compute_ebpo_advantage


def names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def source(function: Any) -> str:
    return textwrap.dedent(inspect.getsource(inspect.unwrap(function)))


def calls(function: Any) -> list[str]:
    """The names called in ``function``, in order, methods by their last name."""
    nodes = [node.func for node in ast.walk(ast.parse(source(function))) if isinstance(node, ast.Call)]
    return [node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in nodes]


def test_this_is_the_verl_meant() -> None:
    assert verl.__version__ == "0.9.1"


def test_the_registry() -> None:
    assert names(core_algos.register_adv_est) == ["name_or_enum"]
    assert core_algos.get_adv_estimator_fn("ebpo") is compute_ebpo_advantage


def test_the_arguments_that_an_estimator_gets() -> None:
    assert "config" in names(compute_advantage)
    passed = set(re.findall(r'adv_kwargs\["(\w+)"\]', source(compute_advantage)))
    assert passed >= {"index"}
    built = re.search(r"adv_kwargs = \{(.*?)\}", source(compute_advantage), re.DOTALL)
    assert built is not None
    assert set(re.findall(r'"(\w+)":', built.group(1))) == {"token_level_rewards", "response_mask", "config"}


def test_padding_is_marked_as_we_know_it() -> None:
    text = source(padding_utils.upsample_batch_to_divisible_size)
    assert 'pad_uid = f"pad{uuid.uuid4().hex}"' in text
    assert "response_mask = torch.zeros_like(responses)" in source(padding_utils.construct_minimal_padding_template)


def test_the_trainers_method_that_is_wrapped() -> None:
    assert names(PPOTrainer._compute_advantage) == ["self", "batch", "metrics"]
    assert "compute_advantage_for_multi_trajectories" in calls(PPOTrainer._compute_advantage)
    assert "keys=batch.keys" in source(PPOTrainer._compute_advantage)


def test_the_callback_is_made_before_the_checkpoint_is_loaded() -> None:
    assert "build_checkpoint_callback" in calls(PPOTrainer.__init__)
    assert "_load_checkpoint" in calls(PPOTrainer._setup)
    assert names(checkpoint_callback.CheckpointCallback.__init__) == ["self", "config"]
    assert {"global_step", "checkpoint_dir"} <= set(names(checkpoint_callback.CheckpointCallback.on_save))
    assert names(PriorCheckpoint.__init__) == ["self", "config"]


def test_the_rules_of_resuming() -> None:
    text = source(PPOTrainer._load_checkpoint)
    assert set(re.findall(r'resume_mode == "(\w+)"', text)) == {"disable", "auto", "resume_path"}
    assert "find_latest_ckpt_path" in calls(PPOTrainer._load_checkpoint)
    assert names(find_latest_ckpt_path)[0] == "path"
