"""`ebpo demo`, its comparison, and `ebpo plot`, with a few steps of a very small model."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("trl")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

from matplotlib.image import imread

from ebpo_core.cli import main
from ebpo_core.cli.compare import paired_interval
from ebpo_core.cli.plot import plot_runs, read_log, series, smooth

if TYPE_CHECKING:
    from pathlib import Path

SMALL = [
    "--max_steps=3",
    "--warm_up_steps=20",
    "--warm_up_batch_size=16",
    "--warm_up_learning_rate=0.01",
    "--tiny_hidden_size=32",
    "--tiny_layers=1",
    "--eval_prompts=12",
    "--eval_completions=2",
    "--per_device_train_batch_size=8",
    "--cpu_threads=1",
]


def colours(image: Path) -> int:
    """How many different colours a picture has; an empty axes has a handful."""
    pixels = (imread(image)[..., :3] * 255).astype(np.int64)
    return len(np.unique(pixels @ np.array([1, 256, 65536])))


def test_demo_prints_what_it_measured_and_leaves_logs_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "demo"
    assert main(["demo", f"--output_dir={output}", *SMALL]) == 0
    shown = capsys.readouterr().out
    result = json.loads((output / "result.json").read_text())
    before, after = result["before"], result["after"]
    assert f"from {before['pass_at_1']:.3f} after the warm-up to {after['pass_at_1']:.3f} after 3 steps" in shown
    assert f"({100 * (after['pass_at_1'] - before['pass_at_1']):+.1f} points)" in shown
    assert before["completions"] == 24
    assert list(before["clusters"]) == [f"{topic}/{level}" for topic in ("add", "mul") for level in (2, 3, 4)]
    assert [record["step"] for record in read_log(output)] == [1, 2, 3]
    assert list(output.rglob("events.out.tfevents.*"))
    assert colours(output / "demo.png") > 50
    assert (output / "warm-up" / "model.safetensors").is_file()
    assert "[+-*]" in shown, "prompts must not be taken for markup"
    # A second start finds the warm-up, and the same seed gives the same numbers.
    assert main(["demo", f"--output_dir={output}", *SMALL]) == 0
    assert "Warm-up: found" in capsys.readouterr().out
    again = json.loads((output / "result.json").read_text())
    assert {**again, "train_seconds": 0} == {**result, "train_seconds": 0}


def test_compare_pairs_runs_by_seed_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["demo", "--compare=grpo", f"--output_dir={tmp_path}", *SMALL, "--report_to=none"]
    assert main([*command, "--seeds=1"]) == 0
    capsys.readouterr()
    assert main([*command, "--seeds=2"]) == 0
    shown = capsys.readouterr().out
    assert "seed 0 of 2" not in shown
    assert "95% t-interval" in shown
    records = [json.loads(line) for line in (tmp_path / "compare" / "compare.jsonl").read_text().splitlines()]
    assert [(record["seed"], record["method"]) for record in records] == [
        (seed, method) for seed in (0, 1) for method in ("ebpo", "grpo")
    ]
    assert len({record["before"] for record in records}) == 1, "one warm-up, one evaluation seed"
    first = [read_log(tmp_path / "compare" / f"{method}-1")[0] for method in ("ebpo", "grpo")]
    assert first[0]["reward"] == first[1]["reward"]
    assert first[0]["entropy"] == first[1]["entropy"]
    assert main([*command, "--seed=3"]) == 1
    assert main([*command, "--seeds=0"]) == 1


@pytest.mark.parametrize(("degrees", "expected"), [(1, 12.7062), (2, 4.30265), (7, 2.36462), (30, 2.04227)])
def test_the_interval_is_students(degrees: int, expected: float) -> None:
    differences = np.random.default_rng(degrees).normal(size=degrees + 1)
    standard_error = differences.std(ddof=1) / math.sqrt(degrees + 1)
    assert paired_interval(differences).half_width / standard_error == pytest.approx(expected, rel=1e-5)


def test_paired_interval() -> None:
    interval = paired_interval(np.array([0.01, 0.03, -0.01, 0.05]))
    assert interval.mean == pytest.approx(0.02)
    assert interval.half_width == pytest.approx(3.18245 * 0.0258199 / 2, rel=1e-4)
    assert (interval.wins, interval.pairs) == (3, 4)
    assert math.isinf(paired_interval(np.array([0.1])).half_width)


def write_log(path: Path, steps: int, *, ebpo: bool) -> Path:
    path.mkdir()
    rows = []
    for step in range(1, steps + 1):
        row: dict[str, Any] = {"step": step, "reward": step / steps, "entropy": 1 / step, "frac_reward_zero_std": 0.5}
        if ebpo:
            row |= {"ebpo/shrinkage": 0.4, "ebpo/saturated_fail": 0.3, "ebpo/saturated_pass": 0.2}
        rows.append(row)
    rows.append({"step": steps, "train_runtime": 1.0})
    (path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_plot_of_one_and_of_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_log(tmp_path / "ebpo", 60, ebpo=True), write_log(tmp_path / "grpo", 60, ebpo=False)]
    assert main(["plot", str(runs[0])]) == 0
    assert capsys.readouterr().out.strip() == str(runs[0] / "plot.png")
    assert colours(runs[0] / "plot.png") > 50
    target = tmp_path / "pictures" / "both.png"
    assert main(["plot", *map(str, runs), "--output", str(target), "--title", "both"]) == 0
    assert colours(target) > 50
    assert main(["plot", str(runs[1] / "log.jsonl"), "--output", str(tmp_path / "grpo.png")]) == 0
    svg = plot_runs({"x": read_log(runs[0])}, tmp_path / "x.svg")
    assert svg.read_text().count("<path") > 20


def test_series_and_smoothing(tmp_path: Path) -> None:
    log = read_log(write_log(tmp_path / "run", 5, ebpo=True))
    steps, values = series(log, "ebpo/saturated_fail", "ebpo/saturated_pass")
    assert steps.tolist() == [1, 2, 3, 4, 5]
    assert values == pytest.approx([0.5] * 5)
    assert series(log, "nothing")[0].size == 0
    assert smooth(np.array([0.0, 3.0, 6.0, 3.0]), 3).tolist() == [1.5, 3.0, 4.0, 4.5]
    assert smooth(np.array([1.0]), 9).tolist() == [1.0]


def test_damaged_logs(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    assert [record["step"] for record in read_log(tmp_path)] == [1]
    file.write_text('{"step": 1, "rew\n{"step": 2, "reward": 0.5}\n')
    with pytest.raises(ValueError, match="damaged"):
        read_log(tmp_path)
    file.write_text("")
    with pytest.raises(ValueError, match="no training step"):
        read_log(tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::FutureWarning:trl")  # of older names
def test_commands_without_a_flag_have_their_defaults():
    """`make demo` passes none."""
    from ebpo_core.cli.arguments import parse
    from ebpo_core.cli.demo import SETTINGS

    arguments, config, _ = parse([], SETTINGS, prog="ebpo demo")
    assert (arguments.method, config.max_steps) == ("ebpo", SETTINGS["max_steps"])
