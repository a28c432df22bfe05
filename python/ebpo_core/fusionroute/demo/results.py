"""Exact-match results of the demo's systems on the same problems: shares, standard errors, differences, a table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.table import Table

    from .domains import Problem

Outcomes = dict[str, list[float]]
"""For each kind of problem, 1.0 where the answer was right and 0.0 where not, in the order of the problems."""


class Share(NamedTuple):
    """A mean of outcomes, or of differences between two systems' outcomes, and its standard error."""

    value: float
    standard_error: float

    def percent(self) -> str:
        return f"{100 * self.value:.1f}±{100 * self.standard_error:.1f}"


def outcomes(problems: Sequence[Problem], answers: Sequence[str]) -> Outcomes:
    """Compare answers with the only right ones."""
    found: Outcomes = {}
    for problem, answer in zip(problems, answers, strict=True):
        found.setdefault(problem.kind, []).append(float(answer == problem.answer))
    return found


def share(values: Sequence[float]) -> Share:
    """Mean and standard error of independent values; the error of a single value is NaN."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Share(mean, math.nan)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Share(mean, math.sqrt(variance / len(values)))


def mean_share(found: Mapping[str, Sequence[float]]) -> Share:
    """The mean over kinds, each counting the same; the standard error is that of problems drawn within kinds."""
    shares = [share(values) for values in found.values()]
    error = math.sqrt(sum(part.standard_error**2 for part in shares))
    return Share(sum(part.value for part in shares) / len(shares), error / len(shares))


def difference(left: Outcomes, right: Outcomes) -> Share:
    """The mean over kinds of ``left - right``; both answered the same problems, so differences are taken by problem."""
    return mean_share(
        {kind: [a - b for a, b in zip(values, right[kind], strict=True)] for kind, values in left.items()}
    )


def as_json(found: Outcomes) -> dict[str, Any]:
    """Accuracies and standard errors, by kind and in the mean, as JSON-safe values."""
    shares = {kind: share(values) for kind, values in found.items()} | {"mean": mean_share(found)}
    return {
        kind: {"accuracy": part.value, "standard_error": part.standard_error if math.isfinite(part[1]) else None}
        for kind, part in shares.items()
    }


def results_table(systems: Mapping[str, Outcomes], *, bold: str) -> Table:
    """A row for each system, a column for each kind and one for their mean, in percent with standard errors."""
    from rich import box
    from rich.table import Table

    table = Table("", box=box.SIMPLE_HEAD, pad_edge=False)
    for kind in next(iter(systems.values())):
        table.add_column(kind, justify="right", no_wrap=True)
    table.add_column("mean", justify="right", no_wrap=True)
    for name, found in systems.items():
        cells = [share(values).percent() for values in found.values()]
        table.add_row(name, *cells, mean_share(found).percent(), style="bold" if name == bold else None)
    return table
