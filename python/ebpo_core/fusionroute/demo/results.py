"""Exact-match results of the demo's systems on the same problems: shares, standard errors, differences, a table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ebpo_core.evaluation.estimators import Mean, mean_and_error

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.table import Table

    from ebpo_core.data import Problem

Outcomes = dict[str, list[float]]
"""For each kind of problem, 1.0 where the answer was right and 0.0 where not, in the order of the problems."""


def percent(mean: Mean) -> str:
    """A share and its standard error, in percent."""
    return f"{100 * mean.value:.1f}±{100 * mean.standard_error:.1f}"


def outcomes(problems: Sequence[Problem], answers: Sequence[str]) -> Outcomes:
    """Compare answers with the only right ones."""
    found: Outcomes = {}
    for problem, answer in zip(problems, answers, strict=True):
        found.setdefault(problem.topic or "", []).append(float(answer == problem.answer))
    return found


def mean_share(found: Mapping[str, Sequence[float]]) -> Mean:
    """The mean over kinds, each counting the same; the standard error is that of problems drawn within kinds."""
    shares = [mean_and_error(values) for values in found.values()]
    error = math.sqrt(sum(part.standard_error**2 for part in shares))
    return Mean(sum(part.value for part in shares) / len(shares), error / len(shares))


def difference(left: Outcomes, right: Outcomes) -> Mean:
    """The mean over kinds of ``left - right``; both answered the same problems, so differences are taken by problem."""
    return mean_share(
        {kind: [a - b for a, b in zip(values, right[kind], strict=True)] for kind, values in left.items()}
    )


def as_json(found: Outcomes) -> dict[str, Any]:
    """Accuracies and standard errors, by kind and in the mean, as JSON-safe values."""
    shares = {kind: mean_and_error(values) for kind, values in found.items()} | {"mean": mean_share(found)}
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
        cells = [percent(mean_and_error(values)) for values in found.values()]
        table.add_row(name, *cells, percent(mean_share(found)), style="bold" if name == bold else None)
    return table
