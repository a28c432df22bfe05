"""The report as a picture, by matplotlib."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ebpo_core.signal.report import Report

COLORS = {"failed": "#dc2626", "passed": "#059669", "signal": "#2563eb", "prompts": "#64748b"}


def draw_report(report: Report, output: str | os.PathLike[str]) -> Path:
    """Draw mean rewards of groups, expected dead shares, and signal per rollout; returns the picture's path.

    Args:
        report: With an expectation.
        output: PNG, PDF or SVG by its suffix.

    Raises:
        ValueError: No group has two scored completions.
    """
    found = report.expectation
    if found is None:
        raise ValueError("no group has two scored completions: there is nothing to draw; leave the picture out")
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use("default")
    figure, (means, shares, signal) = plt.subplots(1, 3, figsize=(12, 3.8), dpi=130, layout="constrained")
    groups, sizes = report.groups, [one.size for one in found.sizes]

    low, high = groups.lowest, groups.highest
    edges = np.linspace(low, high if high > low else low + 1, 18)
    for name, rows in (
        ("prompts", groups.paired & ~groups.dead),
        ("failed", groups.dead & groups.failed),
        ("passed", groups.dead & ~groups.failed),
    ):
        label = "informative" if name == "prompts" else name
        means.hist(groups.means[rows], edges, color=COLORS[name], label=label, alpha=0.8)
    means.set_title("Groups by mean reward", loc="left", fontsize=11, fontweight="bold")
    means.set_xlabel("mean reward")
    means.set_ylabel("groups")

    for name in ("failed", "passed"):
        intervals = [getattr(one, name) for one in found.sizes]
        shares.plot(sizes, [one.value for one in intervals], color=COLORS[name], marker="o", ms=3, label=name)
        shares.fill_between(
            sizes, [one.low for one in intervals], [one.high for one in intervals], color=COLORS[name], alpha=0.15, lw=0
        )
    shares.set_ylim(0, 1)
    shares.set_title("Expected dead groups", loc="left", fontsize=11, fontweight="bold")

    intervals = [one.signal for one in found.sizes]
    signal.plot(sizes, [one.value for one in intervals], color=COLORS["signal"], marker="o", ms=3)
    ends = [one.low for one in intervals], [one.high for one in intervals]
    signal.fill_between(sizes, *ends, color=COLORS["signal"], alpha=0.15, lw=0)
    signal.axvline(found.best_size, color="0.6", lw=1, ls="--")
    signal.set_ylim(bottom=0)
    signal.set_title(f"Signal per rollout, best at G = {found.best_size}", loc="left", fontsize=11, fontweight="bold")

    measured = [one.size for one in found.sizes if one.measured]
    for axes in (shares, signal):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("group size G")
        if measured and measured[-1] < sizes[-1]:
            axes.axvspan(measured[-1] * 1.2, sizes[-1] * 1.1, color="0.5", alpha=0.08, lw=0, label="fitted")
    for axes in (means, shares, signal):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path
