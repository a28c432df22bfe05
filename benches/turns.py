"""Bias of the policy gradient under rules of advantages by turn, where the policy chooses the number of turns.

    python benches/turns.py [--json PATH] [--smoke]

An agent may look something up, at a cost, at most twice, and then answers; an answer is right with a probability that
grows with what it has looked up. The policy has one logit for each look. Everything is small enough to be enumerated:
the exact gradient of the expected reward, and for 2 prompts with 2 trajectories each the expectation of a rule's
gradient over every batch there is, hence its bias, exactly. For 4 prompts with 4 trajectories each the same is
estimated from sampled batches, with 95 % intervals. Gradients are sums over turns divided by the number of
trajectories, which is fixed: a loss that divides by the number of turns or tokens is another biased estimate.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import ebpo_core

Array = NDArray[np.float64]

RIGHT = ((0.5, 0.6, 0.65), (0.2, 0.35, 0.45), (0.1, 0.6, 0.7), (0.7, 0.75, 0.8))
"""Probability that an answer at turn 1, 2, 3 is right, for each prompt."""
COST = 0.05
LOGITS = (0.5, -0.3)
"""The policy: logit of looking, rather than answering, at turns 1 and 2. At turn 3 it must answer."""


@dataclass(frozen=True)
class Trajectory:
    """One way that a trajectory can go: its rewards, and the derivative of log pi at each turn, shape (K, 2)."""

    probability: float
    rewards: tuple[float, ...]
    scores: Array


@dataclass(frozen=True)
class Batch:
    """The rows of a batch, in order of prompt, trajectory and turn; scores are ``(N, 2)``."""

    rewards: Array
    prompts: NDArray[np.int64]
    trajectories: NDArray[np.int64]
    turns: NDArray[np.int64]
    scores: Array


def trajectories(right: tuple[float, ...], logits: tuple[float, ...] = LOGITS) -> list[Trajectory]:
    """Every trajectory of a prompt: its number of looks, and whether the answer is right."""
    listed, reached, passed = [], 1.0, []
    for k, p in enumerate(right):
        look = 1 / (1 + np.exp(-logits[k])) if k < len(logits) else 0.0
        answer = np.zeros((k + 1, len(logits)))
        for turn, chance in enumerate(passed):
            answer[turn, turn] = 1 - chance
        if k < len(logits):
            answer[k, k] = -look
        for outcome, chance in ((1.0, p), (0.0, 1 - p)):
            listed.append(Trajectory(reached * (1 - look) * chance, (-COST,) * k + (outcome,), answer))
        reached *= look
        passed.append(look)
    return listed


def objective(logits: tuple[float, ...], prompts: int) -> float:
    """The expected sum of a trajectory's rewards, over the first ``prompts`` prompts."""
    ways = [way for right in RIGHT[:prompts] for way in trajectories(right, logits)]
    return sum(way.probability * sum(way.rewards) for way in ways) / prompts


def exact_gradient(prompts: int) -> Array:
    """The derivative of :func:`objective`, as the expectation of score times return-to-go."""
    total = np.zeros(len(LOGITS))
    for right in RIGHT[:prompts]:
        for way in trajectories(right):
            total += way.probability * np.cumsum(way.rewards[::-1])[::-1] @ way.scores
    return total / prompts


def batch_of(chosen: list[list[Trajectory]]) -> Batch:
    """The batch of these trajectories, those of a prompt in one list."""
    rows = [
        (reward, prompt, index, turn, score)
        for prompt, ways in enumerate(chosen)
        for index, way in enumerate(ways)
        for turn, (reward, score) in enumerate(zip(way.rewards, way.scores, strict=True), 1)
    ]
    rewards, prompts, names, turns, scores = zip(*rows, strict=True)
    return Batch(np.array(rewards), np.array(prompts), np.array(names), np.array(turns), np.array(scores))


# ---- rules: a batch to the advantage of each row ---------------------------------------------------------------------


def ebpo(**options: object) -> Callable[[Batch], Array]:
    """Ours, with the batch as its own prior."""

    def rule(batch: Batch) -> Array:
        rows = {"trajectories": batch.trajectories, "turns": batch.turns}
        return ebpo_core.advantages(batch.rewards, batch.prompts, **rows, normalize="none", **options)

    return rule


def ebpo_with_history(batch: Batch) -> Array:
    """Ours, with a prior that has seen two prompts of an earlier batch."""
    estimator = ebpo_core.EBPO(leave_one_out="row", normalize="none", kappa=1.0)
    past = [0.4, -COST, 1.0, 0.0, -COST, -COST, 1.0]
    estimator(past, [0, 0, 0, 1, 1, 1, 1], trajectories=[0, 1, 1, 2, 3, 3, 3], turns=[1, 1, 2, 1, 1, 2, 3])
    return estimator(batch.rewards, batch.prompts, trajectories=batch.trajectories, turns=batch.turns)


def other(method: str) -> Callable[[Batch], Array]:
    """A stateless method on the returns-to-go of each cell (prompt, turn)."""

    def rule(batch: Batch) -> Array:
        rows = {"trajectories": batch.trajectories, "turns": batch.turns}
        return ebpo_core.advantages(batch.rewards, batch.prompts, **rows, method=method)

    return rule


def returns(batch: Batch, values: Array) -> Array:
    """The sum of ``values`` from each row to the end of its trajectory."""
    total = values.copy()
    for row in range(len(total) - 2, -1, -1):
        if batch.turns[row + 1] > batch.turns[row]:  # a trajectory starts again at turn 1
            total[row] += total[row + 1]
    return total


def per_turn(*, divide: bool) -> Callable[[Batch], Array]:
    """The usual: normalise the rewards of a turn over the prompt's trajectories that have it, then sum to the end."""

    def rule(batch: Batch) -> Array:
        cells = batch.prompts * 4 + batch.turns
        index = np.unique(cells, return_inverse=True)[1].reshape(-1)
        count = np.bincount(index)
        values = batch.rewards - (np.bincount(index, batch.rewards) / count)[index]
        if divide:
            spread = np.sqrt(np.bincount(index, values**2) / np.maximum(count - 1, 1))[index]
            values = np.where(spread > 0, values / (spread + 1e-6), 0.0)
        return returns(batch, values)

    return rule


def centred_over_the_batch(batch: Batch) -> Array:
    """Returns-to-go less their mean over all turns of the batch."""
    total = returns(batch, batch.rewards)
    return total - total.mean()


RULES: dict[str, Callable[[Batch], Array]] = {
    "EBPO, leave_one_out='row'": ebpo(leave_one_out="row"),
    "EBPO, leave_one_out='row', with history": ebpo_with_history,
    "EBPO, leave_one_out=True": ebpo(leave_one_out=True),
    "EBPO": ebpo(),
    "method='rloo', by turn": other("rloo"),
    "method='grpo', by turn": other("grpo"),
    "rewards less the turn's mean, summed": per_turn(divide=False),
    "rewards normalised by turn, summed": per_turn(divide=True),
    "returns less the batch's mean": centred_over_the_batch,
}


# ---- expectations ----------------------------------------------------------------------------------------------------


def gradient(batch: Batch, advantages: Array, count: int) -> Array:
    """The policy gradient of a batch of ``count`` trajectories."""
    return advantages @ batch.scores / count


def expected_gradients(
    rules: dict[str, Callable[[Batch], Array]], prompts: int = 2, group: int = 2
) -> dict[str, Array]:
    """The expectation of each rule's gradient, over every batch that there is."""
    ways = [trajectories(right) for right in RIGHT[:prompts]]
    total = {name: np.zeros(len(LOGITS)) for name in rules}
    for chosen in itertools.product(*(itertools.product(own, repeat=group) for own in ways)):
        batch = batch_of([list(own) for own in chosen])
        weight = np.prod([way.probability for own in chosen for way in own])
        for name, rule in rules.items():
            total[name] += weight * gradient(batch, rule(batch), prompts * group)
    return total


def sampled_gradients(
    rules: dict[str, Callable[[Batch], Array]], batches: int, seed: int, prompts: int = 4, group: int = 4
) -> dict[str, Array]:
    """Each rule's gradients of the same sampled batches, ``(batches, 2)``."""
    rng = np.random.default_rng(seed)
    ways = [trajectories(right) for right in RIGHT[:prompts]]
    draws = [rng.choice(len(own), (batches, group), p=[way.probability for way in own]) for own in ways]
    sampled: dict[str, list[Array]] = {name: [] for name in rules}
    for index in range(batches):
        batch = batch_of([[own[i] for i in drawn[index]] for own, drawn in zip(ways, draws, strict=True)])
        for name, rule in rules.items():
            sampled[name].append(gradient(batch, rule(batch), prompts * group))
    return {name: np.array(values) for name, values in sampled.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all numbers there")
    parser.add_argument("--smoke", action="store_true", help="few batches, to see that it runs")
    chosen = parser.parse_args()
    truth, expected = exact_gradient(2), expected_gradients(RULES)
    size = float(np.linalg.norm(truth))
    print(f"2 prompts x 2 trajectories, every batch; exact gradient {np.round(truth, 4)}, length {size:.4f}")
    print("| rule | expected gradient | bias / length |")
    print("|---|---|---|")
    for name, value in expected.items():
        print(f"| {name} | {value[0]:+.4f}, {value[1]:+.4f} | {np.linalg.norm(value - truth) / size:.1%} |")
    batches = 200 if chosen.smoke else 20000
    truth4, sampled = exact_gradient(4), sampled_gradients(RULES, batches, seed=0)
    size4 = float(np.linalg.norm(truth4))
    print(f"\n4 prompts x 4 trajectories, {batches} sampled batches; exact gradient {np.round(truth4, 4)}")
    print("| rule | bias of look 1 | bias of look 2 | |mean - exact| / length | standard deviation of a gradient |")
    print("|---|---|---|---|---|")
    for name, values in sampled.items():
        bias, half = values.mean(0) - truth4, 1.96 * values.std(0, ddof=1) / np.sqrt(batches)
        cells = " | ".join(f"{b:+.4f} ± {h:.4f}" for b, h in zip(bias, half, strict=True))
        spread = np.sqrt(values.var(0).sum())
        print(f"| {name} | {cells} | {np.linalg.norm(bias) / size4:.1%} | {spread:.3f} |")
    if chosen.json:
        numbers = {
            "exact": {"2x2": truth.tolist(), "4x4": truth4.tolist()},
            "expected_2x2": {name: value.tolist() for name, value in expected.items()},
            "sampled_4x4": {
                name: {"mean": v.mean(0).tolist(), "std": v.std(0, ddof=1).tolist(), "batches": batches}
                for name, v in sampled.items()
            },
        }
        chosen.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
