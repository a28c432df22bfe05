"""A run on the screen and on the disk: progress, a JSON Lines log, the result file, tables."""

# ruff: noqa: ARG002 (transformers fixes the signatures of callbacks)

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PrinterCallback, TrainerCallback
from transformers import ProgressCallback as TransformersProgress

from ebpo_core.cli.plot import LOG_NAME
from ebpo_core.files import write_json
from ebpo_core.progress import Bar

if TYPE_CHECKING:
    from ebpo_core.evaluation.pass_at_1 import Evaluation, Sample

RESULT_NAME = "result.json"


def main_console() -> Console:
    """The console of this process: of several the first one talks. torchrun and accelerate set the variable."""
    return Console(quiet=os.environ.get("RANK", "0") != "0")


class ProgressCallback(TrainerCallback):
    """The bar of a trainer's steps, with numbers from its log behind it.

    Args:
        console: Where the bar is drawn.
        name: In front of the bar.
        shown: The keys of the log that are shown, each with its label.
    """

    def __init__(self, console: Console, name: str, shown: Mapping[str, str] | None = None) -> None:
        self.console, self.name, self.shown = console, name, dict(shown or {})
        self.bar: Bar | None = None
        self.note = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = Bar(self.console, self.name, state.max_steps, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        values = {label: (logs or {}).get(key) for key, label in self.shown.items()}
        note = "  ".join(f"{label} {value:.3f}" for label, value in values.items() if isinstance(value, (int, float)))
        self.note = note or self.note
        if self.bar is not None:
            self.bar.update(state.global_step, self.note)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back, also when training ends in an exception."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class JsonlCallback(TrainerCallback):
    """The log of a run, ``log.jsonl``: a line for each record of the trainer, one object with its ``step``, flushed.

    On resume, records of steps that will be done again are dropped, so that a log holds each step once.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory) / LOG_NAME

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept: list[str] = []
        if state.global_step > 0 and self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                step = _step_of(line)
                if step is not None and step <= state.global_step:
                    kept.append(line)
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        record = {"step": state.global_step, **{name: _json_number(value) for name, value in logs.items()}}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")


def train_shown(trainer: Any, progress: ProgressCallback, output: Path, checkpoint: str | None) -> float:
    """Train, or resume from ``checkpoint``, with our progress and log in place of transformers' own.

    Returns:
        Wall seconds.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(TransformersProgress)
    trainer.add_callback(progress)
    trainer.add_callback(JsonlCallback(output))
    if checkpoint:
        progress.console.print(f"Resuming from {checkpoint}", markup=False, highlight=False, soft_wrap=True)
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        progress.close()
    return time.perf_counter() - started


def write_result(output: Path, result: Mapping[str, Any]) -> None:
    """Write ``result.json``: the settings of a run and the numbers that came of it, for scripts."""
    write_json(output / RESULT_NAME, dict(result))


def _step_of(line: str) -> int | None:
    """The step of a log line; None for the half line that a killed run leaves."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _json_number(value: Any) -> Any:
    """The value as JSON can hold it: null stands for NaN and infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_pass_at_1(console: Console, evaluations: dict[str, Evaluation], title: str) -> None:
    """Print a row per (topic, level) cluster, a column per evaluation, and their difference if there are two."""
    table = Table("topic", "level")
    for name in evaluations:
        table.add_column(name, justify="right")
    parts = list(evaluations.values())
    if len(parts) == 2:
        table.add_column("difference", justify="right")

    def cells(shares: list[float]) -> list[str]:
        shown = [f"{share:.3f}" for share in shares]
        return [*shown, f"{shares[1] - shares[0]:+.3f}"] if len(shares) == 2 else shown

    for topic, level in parts[0].clusters:
        table.add_row(topic or "-", level or "-", *cells([part.clusters[topic, level] for part in parts]))
    table.add_section()
    table.add_row("all", "", *cells([part.pass_at_1 for part in parts]), style="bold")
    table.add_row("", "s.e.", *[f"{part.standard_error:.3f}" for part in parts], *[""] * (len(parts) == 2), style="dim")
    print_titled(console, title, table)


def print_samples(console: Console, samples: list[Sample], title: str) -> None:
    """Print completions as the policy wrote them, with their rewards."""
    table = Table("prompt", "completion")
    table.add_column("reward", justify="right")
    for sample in samples:
        style = "green" if sample.reward >= 1 else "red"
        table.add_row(Text(sample.prompt), Text(sample.completion), Text(f"{sample.reward:g}", style=style))
    print_titled(console, title, table)


def print_titled(console: Console, title: str, table: Table) -> None:
    """Print a line above a table; rich's own titles are wrapped to the width of the table."""
    console.print()
    console.print(Text(title, style="bold"))
    console.print(table)
