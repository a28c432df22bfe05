"""``ebpo plot RUN...``: four panels from the JSON Lines logs of one or more runs, without importing torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

LOG_NAME = "log.jsonl"
COLORS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#64748b")

Log = list[dict[str, Any]]


def read_log(run: str | Path) -> Log:
    """The training records of a run: a directory that holds ``log.jsonl``, or such a file.

    A last line that a killed run left half written is passed over.

    Raises:
        FileNotFoundError: There is no log.
        ValueError: The log is damaged or holds no training step.
    """
    file = Path(run)
    if file.is_dir():
        file = file / LOG_NAME
    if not file.is_file():
        raise FileNotFoundError(f"no log at {str(file)!r}: give a run's output directory, or its {LOG_NAME}")
    lines = file.read_text(encoding="utf-8").splitlines()
    if lines and not lines[-1].endswith("}"):
        lines.pop()
    try:
        records: Log = [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is damaged: a line is not JSON ({error})") from error
    records = [record for record in records if "reward" in record]
    if not records:
        raise ValueError(f"{str(file)!r} holds no training step yet")
    return records


def series(log: Log, *keys: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and the sum of ``keys`` over the records that have them all, both (records,) float64."""
    rows = [row for row in log if all(row.get(key) is not None for key in keys)]
    steps = np.array([row["step"] for row in rows], dtype=np.float64)
    return steps, np.array([sum(row[key] for key in keys) for row in rows], dtype=np.float64)


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centred moving average of ``values``, (steps,) float64; at both ends over the part of the window that exists."""
    # Differences of cumulative sums: the sum over [first, last) around each index.
    totals = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    return np.asarray((totals[last] - totals[first]) / (last - first))


def _draw(axes: Axes, log: Log, keys: tuple[str, ...], color: str, label: str | None, style: str = "-") -> bool:
    """One smoothed curve over its faint raw values; False where the log does not have ``keys``."""
    steps, values = series(log, *keys)
    if not len(values):
        return False
    if len(values) >= 20:
        axes.plot(steps, values, color=color, alpha=0.18, linewidth=0.8)
    axes.plot(steps, smooth(values, max(1, len(values) // 12)), style, color=color, linewidth=1.8, label=label)
    return True


def plot_runs(logs: dict[str, Log], output: str | Path, *, title: str | None = None) -> Path:
    """Draw every log into four panels, write them to ``output`` (PNG, PDF or SVG by its suffix) and return its path.

    The saturated share is that of groups whose rewards are all equal. An EBPO run splits it into failed and passed
    groups; for a run of plain GRPO there is the total only, and no shrinkage.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use("default")
    figure, panels = plt.subplots(2, 2, figsize=(10, 6.4), dpi=130, sharex=True, layout="constrained")
    (reward, entropy), (shrinkage, saturated) = panels
    several = len(logs) > 1
    # Curves: a colour for each run, or one for each part of the saturated share where there is one run.
    for index, (label, log) in enumerate(logs.items()):
        color = COLORS[index % len(COLORS)]
        _draw(reward, log, ("reward",), color, label if several else None)
        _draw(entropy, log, ("entropy",), color, None)
        _draw(shrinkage, log, ("ebpo/shrinkage",), color, None)
        failed = _draw(saturated, log, ("ebpo/saturated_fail",), color if several else COLORS[4], "all failed", "--")
        passed = _draw(saturated, log, ("ebpo/saturated_pass",), color if several else COLORS[2], "all passed", ":")
        total = ("ebpo/saturated_fail", "ebpo/saturated_pass") if failed and passed else ("frac_reward_zero_std",)
        _draw(saturated, log, total, color, "total")
    # Titles and axes.
    for axes, name, unit in (
        (reward, "Reward", "mean of a batch"),
        (entropy, "Entropy", "nats per token"),
        (shrinkage, "Shrinkage S", "mean over groups"),
        (saturated, "Saturated groups", "share of groups"),
    ):
        axes.set_title(name, loc="left", fontsize=11, fontweight="bold")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    saturated.set_ylim(0, 1)
    entropy.set_ylim(bottom=0)
    if not shrinkage.lines:
        shrinkage.text(0.5, 0.5, "not logged by plain GRPO", ha="center", transform=shrinkage.transAxes, color="0.5")
    for axes in (shrinkage, saturated):
        axes.set_xlabel("step")
    # Legends stand to the right of the panels' titles.
    beside_title: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.98), "borderaxespad": 0.2}
    if several:
        reward.legend(frameon=False, ncols=len(logs), **beside_title)
    handles, labels = saturated.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    saturated.legend(
        unique.values(),
        unique.keys(),
        frameon=False,
        ncols=3,
        fontsize=9,
        handlelength=1.6,
        columnspacing=1.0,
        **beside_title,
    )
    if title:
        figure.suptitle(title, fontsize=12)
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path


def main(argv: Sequence[str]) -> int:
    """Draw the runs and print the path of the picture."""
    parser = argparse.ArgumentParser(prog="ebpo plot", description=__doc__)
    parser.add_argument("runs", nargs="+", help="output directories of runs, or their log.jsonl files")
    parser.add_argument("--output", help="PNG, PDF or SVG file; by default plot.png in the first run's directory")
    parser.add_argument("--title", help="title above the four panels")
    arguments = parser.parse_args(argv)
    logs = {}
    for run in arguments.runs:
        folder = Path(run).parent if Path(run).is_file() else Path(run)
        label = folder.resolve().name
        logs[label if label not in logs else str(folder)] = read_log(run)
    first = Path(arguments.runs[0])
    output = arguments.output or (first if first.is_dir() else first.parent) / "plot.png"
    print(plot_runs(logs, output, title=arguments.title))
    return 0
