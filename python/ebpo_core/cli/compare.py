"""EBPO against TRL's unmodified GRPO on the demo's task: one warm-up, paired by seed, every run reported.

Pairs share the seed, hence the prompts and their order; the number compared is pass@1 on held-out prompts after the
last step, with Student's interval over the paired differences. A few seeds on one toy task are a demonstration, no
evidence about language models.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.table import Table
from scipy import stats

from ebpo_core.cli.arguments import parse
from ebpo_core.cli.parsing import has_flag
from ebpo_core.cli.report import print_titled
from ebpo_core.cli.train import TINY_MODEL, prepare_tiny_model, run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from rich.console import Console

METHODS = ("ebpo", "grpo")
RECORDS_NAME = "compare.jsonl"


class Interval(NamedTuple):
    """A mean with its 95% confidence interval and the number of positive differences."""

    mean: float
    half_width: float
    wins: int
    pairs: int


def paired_interval(differences: NDArray[np.float64]) -> Interval:
    """Mean of paired differences, (seeds,) float64, with its 95% t-interval; infinitely wide for a single pair."""
    count = len(differences)
    half = math.inf
    if count > 1:
        half = float(stats.t.ppf(0.975, count - 1) * differences.std(ddof=1) / math.sqrt(count))
    return Interval(float(differences.mean()), half, int((differences > 0).sum()), count)


def _without_output(flags: Sequence[str]) -> list[str]:
    """Flags that decide what a run does: all but those of its place on the disk."""
    names = ("--output_dir", "--output-dir")
    return [
        flag
        for previous, flag in zip(["", *flags], flags, strict=False)
        if previous not in names and not flag.startswith(names)
    ]


def compare(flags: Sequence[str], settings: dict[str, Any], seeds: int, console: Console) -> list[dict[str, Any]]:
    """Run what is missing of ``seeds`` times two methods, print the table and return the records of all runs.

    Records are appended to ``compare.jsonl`` in the output directory as runs end, so an interrupted comparison goes on
    where it was; runs with other settings do not count.
    """
    for fixed in ("seed", "method"):
        if has_flag(fixed, flags):
            raise ValueError(f"--{fixed} is varied by the comparison itself; leave it out")
    arguments, config, model_config = parse(flags, settings, prog="ebpo demo --compare grpo")
    if not arguments.eval_prompts:
        raise ValueError("eval_prompts=0: a comparison needs held-out prompts; give at least 1")
    # What an earlier start left: the records of runs with the same settings.
    directory = Path(config.output_dir) / "compare"
    directory.mkdir(parents=True, exist_ok=True)
    records_file = directory / RECORDS_NAME
    key = json.dumps({"settings": {**settings, "output_dir": None}, "flags": _without_output(flags)}, sort_keys=True)
    records = [json.loads(line) for line in records_file.read_text().splitlines()] if records_file.is_file() else []
    records = [record for record in records if record["key"] == key and record["seed"] < seeds]
    name = model_config.model_name_or_path
    if name == TINY_MODEL:
        name = str(prepare_tiny_model(directory / "warm-up", arguments, console))
    # The runs that are missing, both methods of a seed before the next seed.
    have = {(record["method"], record["seed"]) for record in records}
    for seed in range(seeds):
        for method in METHODS:
            if (method, seed) in have:
                continue
            console.rule(f"seed {seed} of {seeds}, {method}", align="left")
            output = str(directory / f"{method}-{seed}")
            parsed = parse(
                [*flags, "--method", method, "--seed", str(seed), "--model_name_or_path", name],
                {**settings, "output_dir": output, "save_strategy": "no"},
            )
            parsed[1].output_dir = output
            done = run(*parsed, console)
            if done.before is None or done.after is None:
                raise RuntimeError("a run of the comparison was not evaluated")
            record = {
                "method": method,
                "seed": seed,
                "before": done.before.pass_at_1,
                "after": done.after.pass_at_1,
                "train_seconds": round(done.train_seconds, 2),
                "key": key,
            }
            records.append(record)
            with records_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    print_comparison(records, console)
    return records


def print_comparison(records: list[dict[str, Any]], console: Console) -> Interval:
    """Print a row per seed, the means, and the paired difference with its interval, which is returned."""
    after = {(record["method"], record["seed"]): record["after"] for record in records}
    seeds = sorted({seed for _, seed in after})
    values = {method: np.array([after[method, seed] for seed in seeds]) for method in METHODS}
    differences = values["ebpo"] - values["grpo"]
    before = records[0]["before"]
    table = Table("seed")
    for column in (*METHODS, "difference"):
        table.add_column(column, justify="right")
    for row, seed in enumerate(seeds):
        table.add_row(str(seed), *(f"{values[method][row]:.3f}" for method in METHODS), f"{differences[row]:+.3f}")
    table.add_section()
    table.add_row("mean", *(f"{values[method].mean():.3f}" for method in METHODS), f"{differences.mean():+.3f}")
    if len(seeds) > 1:
        table.add_row("sd", *(f"{part.std(ddof=1):.3f}" for part in (*values.values(), differences)), style="dim")
    print_titled(console, f"pass@1 after training; {before:.3f} before", table)
    interval = paired_interval(differences)
    console.print(
        f"EBPO - GRPO: {100 * interval.mean:+.1f} points, 95% t-interval +-{100 * interval.half_width:.1f} "
        f"({interval.pairs} seeds, EBPO ahead in {interval.wins}).",
        highlight=False,
        soft_wrap=True,
    )
    return interval
