"""From samples to numbers: avg@n, pass@k and maj@k with bootstrap intervals over problems, per topic and level."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ebpo_core.evaluation.estimators import Array, Interval, bootstrap, majority_at_k, pass_at_k
from ebpo_core.evaluation.problems import Problem
from ebpo_core.evaluation.scoring import PASSING
from ebpo_core.files import write_text

FORMAT = "ebpo-core/evaluation"
VERSION = 1


class Part(NamedTuple):
    """Numbers of a set of problems; the metrics by name, such as ``avg@16``, ``pass@4`` and ``maj@16``."""

    problems: int
    metrics: dict[str, Interval]


class Summary(NamedTuple):
    """Numbers of an evaluation: of all problems, of each topic, of each level, and of each (topic, level)."""

    samples: int
    overall: Part
    topics: dict[str, Part]
    levels: dict[str, Part]
    clusters: dict[tuple[str, str], Part]
    finish: dict[str, int]
    without_answer: int


def default_ks(samples: int) -> list[int]:
    """The powers of two up to ``samples``, and ``samples``."""
    return sorted({1 << power for power in range(samples.bit_length())} | {samples})


def _answers(records: Sequence[Mapping[str, Any]], right: Sequence[bool], merge: bool) -> list[Any]:
    """Who votes for what; with ``merge`` all right samples of a problem vote together."""
    return [
        ("right",) if merge and is_right else record["answer"] for record, is_right in zip(records, right, strict=True)
    ]


def problem_metrics(
    records: Sequence[Mapping[str, Any]], ks: Iterable[int], *, merge_correct: bool
) -> dict[str, float]:
    """The metrics of one problem from its samples' records (``score``, ``answer``)."""
    right = [record["score"] >= PASSING for record in records]
    count, n = sum(right), len(records)
    votes = _answers(records, right, merge_correct)
    metrics = {f"avg@{n}": count / n, "score": sum(record["score"] for record in records) / n}
    for k in ks:
        metrics[f"pass@{k}"] = pass_at_k(n, count, k)
    for k in ks:
        metrics[f"maj@{k}"] = majority_at_k(votes, right, k)
    return metrics


def _grouped(
    problems: Sequence[Problem], records: Iterable[Mapping[str, Any]], samples: int
) -> dict[str, list[Mapping[str, Any]]]:
    """The records that count of each problem, all of them there."""
    by_problem: dict[str, list[Mapping[str, Any]]] = {problem.id: [] for problem in problems}
    for record in records:
        if record["problem"] in by_problem and record["sample"] < samples:
            by_problem[record["problem"]].append(record)
    short = [name for name, found in by_problem.items() if len(found) != samples]
    if short:
        raise ValueError(
            f"{len(short)} of {len(problems)} problems have fewer than {samples} samples, {short[0]!r} among them: "
            "run the command that draws them again"
        )
    return by_problem


def _matrix(
    problems: Sequence[Problem], found: Mapping[str, Sequence[Mapping[str, Any]]], ks: Sequence[int], merge: bool
) -> tuple[list[str], Array]:
    """The metrics' names and their values, (problems, metrics)."""
    rows = [problem_metrics(found[problem.id], ks, merge_correct=merge) for problem in problems]
    names = list(rows[0])
    return names, np.array([[row[name] for name in names] for row in rows], dtype=np.float64)


def summarize(
    problems: Sequence[Problem],
    records: Iterable[Mapping[str, Any]],
    *,
    samples: int,
    ks: Sequence[int] | None = None,
    merge_correct: bool = False,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Summary:
    """Numbers of an evaluation of ``problems``.

    Args:
        problems: The problems evaluated.
        records: Records of the samples, in any order; those numbered ``samples`` and above are left out.
        samples: Samples of each problem that count.
        ks: For pass@k and maj@k, each in 1..samples; by default :func:`default_ks`.
        merge_correct: Whether right samples of a problem vote together, see :class:`~ebpo_core.evaluation.Scorer`.
        resamples: Of the bootstrap.
        level: Coverage of the intervals.
        seed: Of the bootstrap.

    Raises:
        ValueError: A problem lacks samples, or a k is out of range.
    """
    ks = default_ks(samples) if ks is None else sorted(set(ks))
    if not problems:
        raise ValueError("problems is empty: there is nothing to summarize")
    if not ks or not 1 <= ks[0] <= ks[-1] <= samples:
        raise ValueError(f"ks={list(ks)}: give numbers between 1 and samples={samples}, or draw more samples")
    by_problem = _grouped(problems, records, samples)
    names, values = _matrix(problems, by_problem, ks, merge_correct)

    def part(chosen: Sequence[int]) -> Part:
        found = bootstrap(values[list(chosen)], resamples=resamples, level=level, seed=seed)
        return Part(len(chosen), dict(zip(names, found, strict=True)))

    def split(keys: Sequence[Any]) -> dict[Any, Part]:
        return {key: part([place for place, other in enumerate(keys) if other == key]) for key in sorted(set(keys))}

    kept = [record for found in by_problem.values() for record in found]
    return Summary(
        samples=samples,
        overall=part(range(len(problems))),
        topics=split([problem.topic for problem in problems]),
        levels=split([problem.level for problem in problems]),
        clusters=split([(problem.topic, problem.level) for problem in problems]),
        finish=dict(sorted(Counter(str(record["finish_reason"]) for record in kept).items())),
        without_answer=sum(record["answer"] is None for record in kept),
    )


def paired_differences(
    problems: Sequence[Problem],
    records: Iterable[Mapping[str, Any]],
    baseline: Iterable[Mapping[str, Any]],
    *,
    samples: int,
    ks: Sequence[int] | None = None,
    merge_correct: bool = False,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Each metric of ``records`` less that of ``baseline``, with intervals of the difference within a problem.

    Arguments are those of :func:`summarize`. Pairing takes out how hard the problems are, which is most of the spread.
    """
    ks = default_ks(samples) if ks is None else sorted(set(ks))
    (names, ours), (_, theirs) = (
        _matrix(problems, _grouped(problems, found, samples), ks, merge_correct) for found in (records, baseline)
    )
    return dict(zip(names, bootstrap(ours - theirs, resamples=resamples, level=level, seed=seed), strict=True))


def _part_json(part: Part) -> dict[str, Any]:
    metrics = {name: interval._asdict() for name, interval in part.metrics.items()}
    return {"problems": part.problems, "metrics": metrics}


def write_results(
    path: str | os.PathLike[str], summary: Summary, settings: Mapping[str, Any], **extra: Any
) -> dict[str, Any]:
    """Write ``results.json`` and return what it holds: the numbers, and the settings of the samples they came from."""
    results = {
        "format": FORMAT,
        "version": VERSION,
        **extra,
        "settings": dict(settings),
        "samples": summary.samples,
        "overall": _part_json(summary.overall),
        "topics": {name: _part_json(part) for name, part in summary.topics.items()},
        "levels": {name: _part_json(part) for name, part in summary.levels.items()},
        "clusters": {"/".join(name): _part_json(part) for name, part in summary.clusters.items()},
        "finish": summary.finish,
        "without_answer": summary.without_answer,
    }
    write_text(path, json.dumps(results, indent=2, allow_nan=False) + "\n")
    return results
