"""FusionRoute's recipes parse for every stage, hold the paper's settings, and train with tiny models in place."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml

pytest.importorskip("trl")
pytest.importorskip("rich")

from fusionroute_tiny import save_tiny
from transformers import AutoModelForCausalLM

from ebpo_core.fusionroute.cli import main
from ebpo_core.fusionroute.cli.arguments import parse

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:(transformers|trl)")

RECIPES = sorted((Path(__file__).parents[3] / "recipes" / "fusionroute").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_parse_for_every_stage_and_hold_the_papers_settings(recipe: Path) -> None:
    for stage in ("sft", "mix"):
        arguments, config, _ = parse(
            ["--config", str(recipe), "--stage", stage, "--use_cpu", "true", "--bf16", "false"]
            + (["--preferences", "pairs.jsonl"] if stage == "mix" else [])
        )
        assert arguments.stage == stage
        assert list(arguments.named_experts()) == ["math", "code", "instruct"]
        assert config.learning_rate == 1e-5
        assert config.num_train_epochs == 1
        assert config.routing_loss_weight == pytest.approx(1 / 3)
    assert config.beta == 0.1
    assert config.sft_loss_weight == pytest.approx(1 / 3)


def commands(recipe: Path) -> list[list[str]]:
    """The commands in the comment at the recipe's head, as words."""
    head = [line.removeprefix("#") for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    lines = "\n".join(head).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.split()[:1] == ["fusionroute"]]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_the_commands_of_a_recipe_run_in_sequence_with_tiny_models(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    paths = {content["model_name_or_path"], *content["experts"].values()}
    for seed, path in enumerate(sorted(paths)):
        save_tiny(tmp_path / path, "llama", seed=seed, hidden_size=32)
    (tmp_path / "data").mkdir()
    rows = [{"prompt": f"w{10 + n} w{20 + n}", "completion": f" w{30 + n} w{40 + n}"} for n in range(4)]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " w60"} for row in rows]
    for name, written in ((content["data"], rows), ("data/preferences.jsonl", pairs)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in written))
    (tmp_path / "recipes").symlink_to(RECIPES[0].parents[1])
    monkeypatch.chdir(tmp_path)
    small = ["--use_cpu=true", "--bf16=false", "--dtype=float32", "--max_steps=1", "--gradient_accumulation_steps=1"]
    run = commands(recipe)
    assert [words[:4] for words in run] == [
        ["fusionroute", "train", "--config", f"recipes/fusionroute/{recipe.name}"]
    ] * 2
    for words, stage in zip(run, ("sft", "mix"), strict=True):
        assert main([*words[1:], *small]) == 0
        output = tmp_path / f"runs/fusionroute/{stage}"
        assert json.loads((output / "result.json").read_text())["stage"] == stage
        model = AutoModelForCausalLM.from_pretrained(output)
        assert model.experts.names == ["math", "code", "instruct"]
