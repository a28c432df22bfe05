"""The report in a terminal, by rich."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ebpo_core.evaluation.estimators import Interval
from ebpo_core.signal.expectation import Expectation
from ebpo_core.signal.report import Report
from ebpo_core.signal.rules import Push

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FORMS = {
    "trl": "TRL's completions",
    "verl": "verl's rollout dump",
    "skyrl": "SkyRL's evaluation dump",
    "samples": "samples of ebpo eval or curriculum",
    "plain": "rewards and groups",
}


def print_report(report: Report, console: Console) -> None:
    """Print what was read, the three tables, and the warnings."""
    from rich.text import Text

    console.print(Text(_headline(report), style="bold"))
    for note in report.rollouts.notes:
        console.print(Text(f"Note: {note}.", style="dim"))
    found = report.expectation
    if found is None:
        console.print("No group has two scored completions, so nothing can be said about dead groups.")
    else:
        console.print(Text(_now(report, found)))
        console.print(_expected_table(found))
        console.print(Text(_best(found)))
    if found is not None and report.bands:
        console.print(_bands_table(report, found))
    console.print(_rules_table(report))
    for fault in report.warnings:
        console.print(Text(f"Warning, {fault.kind}: {fault.message}.", style="yellow"))
    if not report.warnings:
        console.print(Text("No warnings.", style="green"))


def _headline(report: Report) -> str:
    groups, rollouts = report.groups, report.rollouts
    low, high = int(groups.sizes.min()), int(groups.sizes.max())
    size = str(low) if low == high else f"{low} to {high} (median {np.median(groups.sizes):g})"
    steps = f" in {rollouts.steps.max() + 1} steps" if rollouts.has_steps else ""
    columns = " + ".join(rollouts.columns)
    return (
        f"{FORMS[rollouts.form]}: {groups.sizes.sum()} rewards ({columns}) of mean {groups.mean:.3f}, "
        f"{len(groups.sizes)} groups of {size}{steps}"
    )


def _now(report: Report, found: Expectation) -> str:
    failed, passed, dead = (_percent(one) for one in found.dead_now)
    step = report.step
    return (
        f"Dead groups now, in %: {dead}; failed {failed}, passed {passed}.\n"
        f"A step holds {step.groups:.1f} groups, {step.informative:.1f} of them informative, "
        f"{step.effective:.1f} effective."
    )


def _percent(interval: Interval) -> str:
    value, low, high = (0.0 if end is None else 100 * end for end in interval)
    return f"{value:.0f} [{low:.0f}, {high:.0f}]"


def _expected_table(found: Expectation) -> Table:
    from rich.table import Table

    table = Table("G", title="Expected share of dead groups in %, and signal", title_justify="left")
    for heading in ("failed", "passed", "dead", "signal/rollout"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for one in found.sizes:
        cells = [_percent(one.failed), _percent(one.passed), _percent(one.dead), f"{one.signal.value:.3f}"]
        style = "bold" if one.size == found.best_size else None
        table.add_row(str(one.size), *cells, "measured" if one.measured else "fitted", style=style)
    return table


def _best(found: Expectation) -> str:
    return f"Most signal per rollout: G = {found.best_size} (in {found.best_share:.0%} of the resamples)."


def _bands_table(report: Report, found: Expectation) -> Table:
    from rich.table import Table

    table = Table("mean reward", title=f"Prompts, at G = {found.best_size}", title_justify="left")
    for heading in ("prompts", "informative", "signal/rollout", "relative", "best G"):
        table.add_column(heading, justify="right")
    for band in report.bands:
        table.add_row(
            band.name,
            f"{band.prompts} ({band.share:.0%})",
            f"{band.informative:.0%}",
            f"{band.signal:.3f}",
            f"{band.relative:.2f}",
            str(band.best_size),
        )
    return table


def _rules_table(report: Report) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("rule", title="Advantages of the dead groups, and their |A| relative to others", title_justify="left")
    for heading in ("failed", "passed", "relative"):
        table.add_column(heading, justify="right")
    for rule in report.rules:
        relative = "-" if rule.relative is None else f"{rule.relative:.2f}"
        table.add_row(Text(rule.name), _push(rule.failed), _push(rule.passed), relative)
    return table


def _push(push: Push | None) -> str:
    if push is None:
        return "-"
    if push.lowest == push.highest == 0:
        return "0"
    low, high = f"{push.lowest:+.2f}", f"{push.highest:+.2f}"
    return low if low == high else f"{low} to {high}"
