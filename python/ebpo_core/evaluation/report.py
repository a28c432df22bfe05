"""The table and the picture of an evaluation; rich and matplotlib are imported when one is drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ebpo_core.evaluation.estimators import Interval
from ebpo_core.evaluation.summary import Part, Summary

if TYPE_CHECKING:
    from rich.table import Table

COLORS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#64748b")


def shown_metrics(part: Part) -> list[str]:
    """The columns of the table: avg@n, and pass@k and maj@k for the largest k."""
    names = list(part.metrics)
    largest = [[name for name in names if name.startswith(kind)][-1] for kind in ("pass@", "maj@")]
    return [names[0], *largest]


def _cell(interval: Interval, *, wide: bool) -> str:
    if interval.low is None or not wide:
        return f"{interval.value:.3f}"
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def build_table(summary: Summary) -> Table:
    """A row a (topic, level), then topics and levels where there are several, and everything; intervals in brackets."""
    from rich.table import Table
    from rich.text import Text

    names = shown_metrics(summary.overall)
    table = Table("topic", "level")
    for heading in ("problems", *names):
        table.add_column(heading, justify="right")

    def add(topic: str, level: str, part: Part, style: str | None = None) -> None:
        cells = [str(part.problems), *(_cell(part.metrics[name], wide=True) for name in names)]
        table.add_row(*map(Text, (topic or "-", level or "-", *cells)), style=style)

    if len(summary.clusters) > 1:
        for (topic, level), part in summary.clusters.items():
            add(topic, level, part)
        table.add_section()
    if 1 < len(summary.topics) < len(summary.clusters):
        for topic, part in summary.topics.items():
            add(topic, "all", part)
        table.add_section()
    if 1 < len(summary.levels) < len(summary.clusters):
        for level, part in summary.levels.items():
            add("all", level, part)
        table.add_section()
    add("all", "all", summary.overall, "bold")
    return table


def build_difference_table(differences: Mapping[str, Interval]) -> Table:
    """A row a metric: the paired difference with its interval."""
    from rich.table import Table

    table = Table("metric")
    for heading in ("difference", "low", "high"):
        table.add_column(heading, justify="right")
    for name, interval in differences.items():
        ends = ["-" if end is None else f"{end:+.3f}" for end in (interval.low, interval.high)]
        table.add_row(name, f"{interval.value:+.3f}", *ends)
    return table


def plot_summaries(summaries: Mapping[str, Summary], output: str | os.PathLike[str]) -> Path:
    """Draw pass@k and maj@k over k, and avg@n per cluster, of one or several evaluations; returns the picture's path.

    Args:
        summaries: By label.
        output: PNG, PDF or SVG by its suffix.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use("default")
    figure, (curves, bars) = plt.subplots(1, 2, figsize=(11, 4.2), dpi=130, layout="constrained")
    clusters = list(dict.fromkeys(name for summary in summaries.values() for name in summary.clusters))
    width = 0.8 / len(summaries)
    for index, (label, summary) in enumerate(summaries.items()):
        color = COLORS[index % len(COLORS)]
        for kind, style in (("pass@", "-"), ("maj@", "--")):
            found = {int(name[len(kind) :]): value for name, value in summary.overall.metrics.items() if kind in name}
            ks = list(found)
            curves.plot(
                ks, [found[k].value for k in ks], style, color=color, marker="o", ms=3, label=f"{label} {kind}k"
            )
            if all(found[k].low is not None for k in ks):
                low, high = ([getattr(found[k], end) for k in ks] for end in ("low", "high"))
                curves.fill_between(ks, low, high, color=color, alpha=0.12, linewidth=0)
        name = shown_metrics(summary.overall)[0]
        parts = {place: summary.clusters[key] for place, key in enumerate(clusters) if key in summary.clusters}
        metrics = [part.metrics[name] for part in parts.values()]
        errors = [
            [metric.value - (metric.value if metric.low is None else metric.low) for metric in metrics],
            [(metric.value if metric.high is None else metric.high) - metric.value for metric in metrics],
        ]
        places = [place + (index - (len(summaries) - 1) / 2) * width for place in parts]
        values = [metric.value for metric in metrics]
        # The mean can lie a rounding error outside of its interval.
        clipped = [[max(0.0, error) for error in side] for side in errors]
        bars.bar(places, values, width, color=color, yerr=clipped, ecolor="0.35", capsize=2, label=f"{label} {name}")
    curves.set_xscale("log", base=2)
    ticks = sorted({int(n[5:]) for s in summaries.values() for n in s.overall.metrics if n.startswith("pass@")})
    curves.set_xticks(ticks, [str(k) for k in ticks])
    curves.set_xlabel("k")
    curves.set_title("pass@k and maj@k, all problems", loc="left", fontsize=11, fontweight="bold")
    bars.set_title("Share of right samples by topic and level", loc="left", fontsize=11, fontweight="bold")
    texts = ["\n".join(part or "-" for part in key) for key in clusters]
    bars.set_xticks(range(len(clusters)), texts, fontsize=8, rotation=90 if len(clusters) > 8 else 0)
    for axes in (curves, bars):
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path
