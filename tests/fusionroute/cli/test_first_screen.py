"""The first screen of ``fusionroute``: what a command prints is its own.

Clean means: nothing but our own lines. The answer of ``generate`` goes to standard output alone, the paths of what it
wrote and the progress of the expert cache to standard error. ``eval`` also shows the bars of the harness, which are all
the progress that there is.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("rich")

from console_scripts import run_script
from fusionroute_saved import DOCUMENTS, save_fused, save_tasks
from fusionroute_tiny import save_tiny_adapter, tiny_model, tiny_tokenizer

from ebpo_core.fusionroute import FusionRouteForCausalLM

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two models in ``fused``, and one of a LoRA adapter beside its base in ``adapted``."""
    root = tmp_path_factory.mktemp("models")
    save_fused(root)
    save_tiny_adapter(root / "adapter", tiny_model("llama", seed=1))
    experts = {"math": {"path": root / "math", "adapter": root / "adapter"}, "base": root / "math"}
    model = FusionRouteForCausalLM.from_experts(root / "router", experts)
    model.save_pretrained(root / "adapted")
    tiny_tokenizer().save_pretrained(root / "adapted")
    return root


@pytest.mark.parametrize("checkpoint", ["fused", "adapted"])
def test_generate_prints_the_answer_alone(checkpoint: str, folder: Path, tmp_path: Path) -> None:
    flags = ["--prompt", "w10 w20", "--max-new-tokens", 4, "--device", "cpu"]
    done = run_script("fusionroute", "generate", folder / checkpoint, *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    assert len(done.stdout.split()) == 4


def test_convert_prints_a_line_per_expert(folder: Path, tmp_path: Path) -> None:
    done = run_script("fusionroute", "convert", folder / "adapted", "plain", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["math", "base", "plain"]


def test_train_prints_its_progress(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"w{10 + n}", "completion": f" w{30 + n} w{40 + n}"} for n in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--model_name_or_path={folder / 'router'}", "--experts", f"math={folder / 'math'}"]
    flags += ["--data=data.jsonl", "--use_cpu=true", "--max_steps=2", "--per_device_train_batch_size=4"]
    flags += ["--logging_steps=1", "--save_steps=1", "--report_to=none", "--output_dir=run"]
    done = run_script("fusionroute", "train", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith("expert cache ")] == []
    assert done.stdout.splitlines()[0].startswith("Training (sft) 1/2  loss ")
    assert done.stdout.splitlines()[-1] == "Checkpoint, log and result: run"


def test_eval_shows_no_remark_on_the_way_we_call_the_harness(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    save_tasks(tmp_path, ["w5"] * len(DOCUMENTS))
    flags = ["--tasks", "tiny_choices", "--include-path", tmp_path, "--limit", 2, "--device", "cpu"]
    done = run_script("fusionroute", "eval", folder / "fused", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pretrained" not in done.stderr
    assert "Loading weights" not in done.stderr
    assert "bitsandbytes" not in done.stderr


def test_help_prints_nothing_else(tmp_path: Path) -> None:
    for command in ("train", "eval", "demo"):
        done = run_script("fusionroute", command, "--help", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"usage: fusionroute {command} ")
