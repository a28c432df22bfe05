"""Answers per second of the mathematical reward, beside plain Math-Verify in the same run, on easy and hard answers.

    python benches/rewards.py [--json PATH] [--smoke] [--seconds 20]

Easy answers are numbers and words, as most of a training set's; hard ones are formulas, sets and matrices, which
Math-Verify compares. Every answer is another one, so that no cache is measured. Plain Math-Verify is
``verify(parse(gold), parse(answer))``, as its documentation shows it, in one process with its own time limits. Our
reward runs in worker processes with hard limits: with one, and with one per core. Graders take turns in rounds, and the
best round of each counts: on a shared machine it is what the code costs. The last column is the share of answers that
each grader finds right, over all its rounds.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count, cycle
from pathlib import Path
from typing import TYPE_CHECKING

from advantages import processor
from math_verify import parse, verify

from ebpo_core.rewards import MathVerifier

if TYPE_CHECKING:
    from collections.abc import Iterator

Pair = tuple[str, str]
Score = Callable[[list[Pair]], int]
ROUNDS = 5

EASY: list[Callable[[int], Pair]] = [
    lambda n: (f"{n}", f"{n}"),
    lambda n: (f"{n}", f"{n + 1}"),
    lambda n: (f"{n}", f"{n:,}"),
    lambda n: (rf"\frac{{{n}}}{{7}}", rf"\dfrac{{{n}}}{{7}}"),
    lambda n: (f"{n}.5", rf"\frac{{{2 * n + 1}}}{{2}}"),
    lambda n: (f"{n}", rf"{n}\text{{ cm}}"),
    lambda n: (rf"{n}\%", rf"{n}\%"),
    lambda n: (f"{n}", rf"x = {n}"),
]
HARD: list[Callable[[int], Pair]] = [
    lambda n: (rf"{n}\sqrt{{3}}", rf"\sqrt{{{3 * n * n}}}"),
    lambda n: (rf"x^2+{n}x", rf"x(x+{n})"),
    lambda n: (rf"\frac{{\pi}}{{{n}}}", rf"\frac{{2\pi}}{{{2 * n}}}"),
    lambda n: (rf"(-\infty,{n})\cup({n + 3},\infty)", rf"(-\infty,{n})\cup({n + 4},\infty)"),
    lambda n: (f"{n},{n + 2},{n + 5}", f"{n + 5}, {n}, {n + 2}"),
    lambda n: (rf"\begin{{pmatrix}}{n}&1\\2&3\end{{pmatrix}}", rf"\begin{{pmatrix}}{n}&1\\2&4\end{{pmatrix}}"),
    lambda n: (rf"2^{{{n}}}-1", rf"2\cdot 2^{{{n - 1}}}-1"),
    lambda n: (rf"\log_2 {2 * n + 1}", rf"\log_2 {2 * n + 3}"),
]


def pairs(makers: list[Callable[[int], Pair]]) -> Iterator[Pair]:
    """References and answers without end, no two alike."""
    for number, maker in zip(count(11), cycle(makers), strict=False):
        yield maker(number)


def timed(seconds: float, batch: int, source: Iterator[Pair], score: Score) -> tuple[float, int, int]:
    """Answers per second over batches for so long, how many they were, and how many were right."""
    done = right = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        chosen = [next(source) for _ in range(batch)]
        right += score(chosen)
        done += batch
    return done / (time.perf_counter() - start), done, right


def compared(name: str, makers: list[Callable[[int], Pair]], seconds: float, batch: int) -> list[dict[str, object]]:
    """A row for each grader on one set."""
    cores = os.cpu_count() or 1
    with ExitStack() as stack:
        graders: dict[str, Score] = {"Math-Verify, plain": plain}
        for workers in sorted({1, cores}):
            verifier = stack.enter_context(MathVerifier(workers=workers))
            graders[f"ebpo_core, {workers} worker{'s' * (workers > 1)}"] = ours(verifier)
        sources = {label: pairs(makers) for label in graders}
        for label, score in graders.items():
            score([next(sources[label]) for _ in range(len(makers))])  # libraries are loaded, processes started
        found: dict[str, list[tuple[float, int, int]]] = {label: [] for label in graders}
        for _ in range(ROUNDS):
            for label, score in graders.items():
                found[label].append(timed(seconds / ROUNDS, batch, sources[label], score))
    return [
        {
            "set": name,
            "grader": label,
            "per_second": max(speed for speed, _, _ in rounds),
            "right": sum(right for *_, right in rounds) / sum(done for _, done, _ in rounds),
        }
        for label, rounds in found.items()
    ]


def plain(chosen: list[Pair]) -> int:
    """How many Math-Verify finds right."""
    return sum(verify(parse(f"${gold}$"), parse(f"\\boxed{{{answer}}}")) for gold, answer in chosen)


def ours(verifier: MathVerifier) -> Score:
    """How many our reward finds right."""

    def score(chosen: list[Pair]) -> int:
        return int(sum(verifier.score([f"\\boxed{{{answer}}}" for _, answer in chosen], [gold for gold, _ in chosen])))

    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--smoke", action="store_true", help="a fraction of a second per row: only shows that it runs")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each row (20)")
    given = parser.parse_args()
    seconds, batch = (0.2, 8) if given.smoke else (given.seconds, 64)
    cores = os.cpu_count() or 1
    logging.disable(logging.WARNING)
    rows = [row for name, makers in (("easy", EASY), ("hard", HARD)) for row in compared(name, makers, seconds, batch)]
    print(f"{processor()}, {cores} cores, Python {platform.python_version()}, {seconds:g} s a row\n")
    print("| answers | grader | answers a second | right |\n|---|---|---:|---:|")
    for row in rows:
        print(f"| {row['set']} | {row['grader']} | {row['per_second']:,.0f} | {row['right']:.0%} |")
    if given.json is not None:
        given.json.write_text(json.dumps({"processor": processor(), "cores": cores, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
