"""The first screen of ``ebpo``: what a command prints is its own, whatever the libraries beneath it have to say.

Clean means: nothing but our own lines, and all of those on standard output. Standard error is for errors and warnings.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("rich")

from console_scripts import run_script

from ebpo_core.cli.dispatch import Command, Program
from ebpo_core.cli.quiet import hide_loading_bars

TRAIN = [
    *("train", "--model_name_or_path=tiny:countdown", "--warm_up_steps=1", "--warm_up_batch_size=4"),
    *("--tiny_hidden_size=32", "--tiny_layers=1", "--max_steps=2", "--per_device_train_batch_size=4"),
    *("--num_generations=2", "--max_completion_length=4", "--use_cpu=true", "--bf16=false"),
    *("--gradient_checkpointing=false", "--report_to=none", "--train_size=16", "--eval_prompts=2"),
    *("--save_steps=1", "--logging_steps=1", "--cpu_threads=1"),
]


@pytest.mark.slow
def test_train_prints_its_own_lines_alone(tmp_path: Path) -> None:
    done = run_script("ebpo", *TRAIN, "--output_dir=run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Supervised warm-up 1/1  loss ")
    assert lines[1] == "pass@1 before 8/8"
    assert lines[2].startswith("Training (ebpo) 1/2  reward ")
    assert lines[-1] == "Model, log and result: run"

    evaluate = ("eval", "--output=eval", "--model=run", "--samples=2", "--size=2", "--max-new-tokens=4", "--no-plot")
    done = run_script("ebpo", *evaluate, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "Sampling 4/4"


def test_one_warning_of_bitsandbytes_is_silenced_and_all_others_are_shown(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setitem(sys.modules, "noisy", Noisy)
    program = Program("program", "", "train", {"run": Command("", "noisy")})
    with pytest.warns(UserWarning, match="heed me"):
        assert program.run(["run"]) == 0
    assert [record.getMessage() for record in caplog.records] == ["an error", "another logger"]


class Noisy:
    """A module of a command whose libraries talk."""

    @staticmethod
    def main(_: list[str]) -> int:
        logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
        logger.warning("Failed to load")
        logger.error("an error")
        logging.getLogger("bitsandbytes.nn").warning("another logger")
        warnings.warn_explicit("renamed", FutureWarning, "x.py", 1, module="transformers.trainer")
        warnings.warn("heed me", stacklevel=1)
        return 0


def test_bars_of_loading_are_hidden_and_downloads_keep_theirs() -> None:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    try:
        transformers_logging.enable_progress_bar()
        hide_loading_bars()
        assert not transformers_logging.is_progress_bar_enabled()
        assert not are_progress_bars_disabled()
        disable_progress_bars()
        hide_loading_bars()
        assert are_progress_bars_disabled(), "a user who hid downloads has them hidden"
    finally:
        (transformers_logging.enable_progress_bar if shown[0] else transformers_logging.disable_progress_bar)()
        (enable_progress_bars if shown[1] else disable_progress_bars)()
