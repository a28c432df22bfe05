"""Difficulty of each problem for a base model: pass rates over k rollouts, buckets, and the order of a data set.

The paper's setting (arXiv 2602.05165, §3.4) is 16 rollouts at temperature 1.0 and a data set from easy to hard.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ebpo_core.curriculum.posterior import UNIFORM, BetaPrior, Posterior, fit_prior, posterior
from ebpo_core.curriculum.samplers import CurriculumSampler, Order
from ebpo_core.data import Problem
from ebpo_core.evaluation.scoring import PASSING

EDGES = (0.2, 0.4, 0.6, 0.8)
"""Pass rates between the buckets: five equal ones."""

FileOrder = Order | Literal["none"]


class Difficulty(NamedTuple):
    """Passes of one problem among its rollouts, and what follows from them."""

    passes: int
    rollouts: int
    posterior: Posterior
    bucket: int

    @property
    def pass_rate(self) -> float:
        return self.passes / self.rollouts


def bucket_of(rate: float, edges: Sequence[float] = EDGES) -> int:
    """The bucket of a pass rate: 0 is the easiest, ``len(edges)`` the hardest; an edge belongs to the easier side."""
    return sum(rate < edge for edge in edges)


def check_edges(edges: Sequence[float]) -> tuple[float, ...]:
    """Rising pass rates strictly between 0 and 1, or a ValueError."""
    if any(not 0 < edge < 1 for edge in edges) or sorted(set(edges)) != list(edges):
        raise ValueError(f"edges={list(edges)}: expected rising pass rates between 0 and 1")
    return tuple(edges)


def difficulties(
    problems: Sequence[Problem],
    records: Iterable[Mapping[str, Any]],
    rollouts: int,
    *,
    prior: BetaPrior | Literal["empirical"] = UNIFORM,
    edges: Sequence[float] = EDGES,
    level: float = 0.95,
) -> list[Difficulty]:
    """Difficulty of each problem, in their order, from the records of its samples 0..rollouts - 1.

    Args:
        problems: The problems.
        records: Records as ``ebpo_core.evaluation`` writes them; a score of at least 1 is a pass.
        rollouts: Rollouts that count.
        prior: Of the pass rates; "empirical" fits one to these very problems.
        edges: Between the buckets, on the plain rate.
        level: Coverage of the intervals.

    Raises:
        ValueError: A problem lacks rollouts.
    """
    edges = check_edges(edges)
    passes: defaultdict[str, int] = defaultdict(int)
    seen: Counter[str] = Counter()
    for record in records:
        if record["sample"] < rollouts:
            seen[record["problem"]] += 1
            passes[record["problem"]] += record["score"] >= PASSING
    short = [problem.id for problem in problems if seen[problem.id] != rollouts]
    if short or rollouts < 1:
        raise ValueError(f"{len(short)} problems have not had {rollouts} rollouts, {short[:1]} among them: draw them")
    counts = [passes[problem.id] for problem in problems]
    if prior == "empirical":
        prior = fit_prior(counts, [rollouts] * len(counts))
    return [
        Difficulty(count, rollouts, posterior(count, rollouts, prior, level), bucket_of(count / rollouts, edges))
        for count in counts
    ]


def curriculum_rows(
    problems: Sequence[Problem], found: Sequence[Difficulty], topics: Sequence[str | None] | None = None
) -> list[dict[str, Any]]:
    """The problems' rows with what is known about their difficulty, in their order.

    Added or replaced columns: ``id``, ``pass_rate`` (c / k), ``passes``, ``rollouts``, ``pass_rate_mean``,
    ``pass_rate_low``, ``pass_rate_high`` (of the posterior), ``difficulty`` (the bucket, 0 the easiest), and ``topic``
    where ``topics`` is given.
    """
    rows = []
    for place, (problem, difficulty) in enumerate(zip(problems, found, strict=True)):
        row = {
            **problem.row,
            "id": problem.id,
            "pass_rate": difficulty.pass_rate,
            "passes": difficulty.passes,
            "rollouts": difficulty.rollouts,
            "pass_rate_mean": difficulty.posterior.mean,
            "pass_rate_low": difficulty.posterior.low,
            "pass_rate_high": difficulty.posterior.high,
            "difficulty": difficulty.bucket,
        }
        if topics is not None:
            row["topic"] = topics[place]
        rows.append(row)
    return rows


def arrange(
    rows: Sequence[Mapping[str, Any]], order: FileOrder, *, batch_size: int = 1, seed: int = 0
) -> list[dict[str, Any]]:
    """The rows in an order of :class:`~ebpo_core.curriculum.samplers.CurriculumSampler`, by their own columns.

    "none" leaves them as they are. The topic orders take ``topic``, "easy_to_hard" takes ``pass_rate``.
    """
    if order == "none":
        return [dict(row) for row in rows]
    sampler = CurriculumSampler(
        len(rows),
        order,
        pass_rates=[row["pass_rate"] for row in rows] if order == "easy_to_hard" else None,
        topics=[row.get("topic") for row in rows] if order.startswith("topic") else None,
        batch_size=batch_size,
        seed=seed,
    )
    return [dict(rows[index]) for index in sampler.plan()]
