"""Study of the estimators without training: error of baselines and advantages, and the policy gradient they give.

Success rates are drawn from known populations, rewards from them, and every rule scores the same batches; the truth is
known, so errors are exact up to Monte Carlo, whose 95 % intervals over seeds are in the records.

    python benches/evidence/estimators.py            # all cells; writes records/estimators.jsonl
    python benches/evidence/estimators.py --smoke
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rules import RULES, UNSCALED

import ebpo_core

Array = NDArray[np.float64]

RECORDS = Path(__file__).parent / "records" / "estimators.jsonl"
PROMPTS = 64
TOPIC_MEANS = (0.1, 0.3, 0.6, 0.9)


def beta(a: float, b: float) -> Callable[[np.random.Generator, float], Array]:
    return lambda rng, _: rng.beta(a, b, PROMPTS)


def two_points(rng: np.random.Generator, _: float) -> Array:
    return rng.choice([0.05, 0.95], PROMPTS)


def mostly_zero(rng: np.random.Generator, _: float) -> Array:
    return np.where(rng.random(PROMPTS) < 0.6, 0.0, rng.beta(2.0, 2.0, PROMPTS))


def topics(rng: np.random.Generator, _: float) -> Array:
    """Four topics of 16 prompts in turn, each a Beta of its own mean."""
    means = np.array(TOPIC_MEANS)[np.arange(PROMPTS) % 4]
    return rng.beta(20.0 * means, 20.0 * (1.0 - means))


def around(mean: float) -> Callable[[np.random.Generator, float], Array]:
    """Success rates of a Beta of this mean, as wide as a uniform one is around a half."""
    return beta(2.0 * mean, 2.0 * (1.0 - mean))


def drifting(rng: np.random.Generator, progress: float) -> Array:
    """Mean success rate from 0.1 to 0.7 over the run, as a policy that learns."""
    mean = 0.1 + 0.6 * progress
    return rng.beta(3.0 * mean, 3.0 * (1.0 - mean), PROMPTS)


POPULATIONS: dict[str, Callable[[np.random.Generator, float], Array]] = {
    "beta(1.2, 2.2)": beta(1.2, 2.2),
    "beta(0.3, 0.9)": beta(0.3, 0.9),
    "beta(8, 8)": beta(8.0, 8.0),
    "two points": two_points,
    "mostly zero": mostly_zero,
    "topics": topics,
    "drifting": drifting,
}
LEVELS = {f"mean {mean}": around(mean) for mean in (0.1, 0.3, 0.5, 0.7, 0.9)}
"""Populations that differ in their mean alone: what a failure weighs where the policy usually fails, or succeeds."""


def sizes(rng: np.random.Generator, G: int, ragged: bool) -> NDArray[np.int64]:
    """Completions per prompt, ``(PROMPTS,)``: all G, or 1 to 2 G - 1, G on average."""
    return rng.integers(1, 2 * G, PROMPTS) if ragged else np.full(PROMPTS, G)


def draw(rng: np.random.Generator, rates: Array, reward: str) -> Array:
    """Rewards of rows with these success rates, whose mean is the truth: binary, graded (of 4), or 0/1 with noise."""
    if reward == "graded":
        return rng.binomial(4, rates) / 4.0
    outcome = (rng.random(rates.size) < rates).astype(float)
    return outcome + rng.normal(0.0, 0.3, rates.size) if reward == "noisy" else outcome


def one_run(
    rule: Any, seed: int, population: str, G: int, reward: str, ragged: bool, steps: int, scaled: bool
) -> dict[str, float]:
    """Errors of one rule over ``steps`` batches, the first fifth left out while a prior fills."""
    rng = np.random.default_rng(seed)
    sums: dict[str, list[float]] = {}
    binary = reward == "binary"
    for step in range(steps):
        rates = {**POPULATIONS, **LEVELS}[population](rng, step / max(1, steps - 1))
        n = sizes(rng, G, ragged)
        groups = np.repeat(np.arange(PROMPTS), n)
        truth = rates[groups]
        rewards = draw(rng, truth, reward)
        advantages = rule(rewards, groups, np.array(["a", "b", "c", "d"])[groups % 4])
        if step < steps // 5:
            continue
        exact = rewards - truth
        values = {
            "sign_errors": float(np.mean(advantages * exact < 0)),
            "zero": float(np.mean(np.abs(advantages) < 1e-9)),
            "groups_with_signal": float(np.mean(np.bincount(groups, np.abs(advantages) > 1e-9, PROMPTS) > 0)),
        }
        if binary:
            # What groups without a difference teach: mean advantage, and the share of their rows with the right sign.
            successes, counts = np.bincount(groups, rewards, PROMPTS), np.bincount(groups, minlength=PROMPTS)
            for kind, dead, sign in (("failed", successes == 0, -1), ("passed", successes == counts, 1)):
                if dead.any():
                    values[f"{kind}_advantage"] = float(advantages[dead[groups]].mean())
                    values[f"{kind}_sign"] = float(np.mean(sign * advantages[dead[groups]] > 1e-9))
        rms = np.sqrt(np.mean(advantages**2)), np.sqrt(np.mean(exact**2))
        if rms[0] > 0 and rms[1] > 0:
            values["advantage_error"] = float(np.mean((advantages / rms[0] - exact / rms[1]) ** 2))
        if not scaled:
            values["baseline_mse"] = float(np.mean((rewards - advantages - truth) ** 2))
        for name, value in values.items():
            sums.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in sums.items()}


def own_batch_run(seed: int, G: int, updates: int) -> dict[str, float]:
    """Root mean square of what a group's own rewards move its baseline through the prior, after 1, 2, 4, ... updates.

    The same batches by EBPO as published and without the group in its prior; the difference is claimed to fall as 1/T.
    """
    rng = np.random.default_rng(seed)
    rules = [ebpo_core.EBPO(normalize="none", leave_one_out=own) for own in (False, True)]
    groups, found = np.repeat(np.arange(PROMPTS), G), {}
    for update in range(1, updates + 1):
        rewards = draw(rng, rng.beta(1.2, 2.2, PROMPTS)[groups], "binary")
        with_own, without = (rule(rewards, groups) for rule in rules)
        if update & (update - 1) == 0:
            found[f"after_{update}"] = float(np.sqrt(np.mean((with_own - without) ** 2)))
    return found


ARMS = 8
DIMENSIONS = 24


def gradient_run(rule: Any, seed: int, G: int, ease: float, spread: float, batches: int) -> dict[str, float]:
    """The policy gradient that a rule gives on a softmax bandit with shared parameters, against the exact one.

    Prompt q has 8 arms with features x (8, 24); the policy is softmax(x w) with one w for all prompts, so that groups
    interact as they do in a network. Two arms of each prompt are right. ``ease`` and ``spread`` move and widen the
    distribution of success rates. Scale is free (an optimiser's learning rate): the estimate is compared after
    projection on the exact one.
    """
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(PROMPTS, ARMS, DIMENSIONS)) / np.sqrt(DIMENSIONS)
    weights = rng.normal(size=DIMENSIONS)
    right = np.zeros((PROMPTS, ARMS))
    right[:, :2] = 1.0
    # A prompt's own offset of its right arms makes it easy or hard; it is no parameter.
    logits = features @ weights + right * rng.normal(ease, spread, (PROMPTS, 1))
    policy = np.exp(logits - logits.max(1, keepdims=True))
    policy /= policy.sum(1, keepdims=True)
    rates = (policy * right).sum(1)
    mean_features = np.einsum("qa,qad->qd", policy, features)
    score = features - mean_features[:, None, :]  # (PROMPTS, ARMS, DIMENSIONS): gradient of log pi
    exact = np.einsum("qa,qad->d", policy * right, score) / PROMPTS
    groups = np.repeat(np.arange(PROMPTS), G)
    cumulative = policy.cumsum(1)
    estimates = np.empty((batches, DIMENSIONS))
    for b in range(batches):
        arms = (rng.random((groups.size, 1)) > cumulative[groups]).sum(1).clip(max=ARMS - 1)
        rewards = right[groups, arms]
        advantages = rule(rewards, groups, np.array(["a", "b", "c", "d"])[groups % 4])
        estimates[b] = (advantages[:, None] * score[groups, arms]).mean(0)
    estimates = estimates[batches // 10 :]
    mean = estimates.mean(0)
    along = float(mean @ exact / (exact @ exact))  # the scale that the rule gives to the exact gradient
    noise = float(estimates.var(0, ddof=1).sum())
    # The squared norm of the mean's error holds Monte Carlo noise of known size, which is taken out.
    off = float(((mean - along * exact) ** 2).sum()) - noise / len(estimates) * (DIMENSIONS - 1) / DIMENSIONS
    signal = along**2 * float(exact @ exact)
    cosine = estimates @ exact / (np.linalg.norm(estimates, axis=1) * np.linalg.norm(exact) + 1e-300)
    return {
        "bias": off / signal,
        "variance": noise / signal,
        "cosine": float(cosine.mean()),
        "saturated": float(np.mean(rates**G + (1 - rates) ** G)),
    }


def cells(smoke: bool) -> Iterator[dict[str, Any]]:
    """Every cell of the study, one record each."""
    groups = (2, 8) if smoke else (2, 4, 8, 16, 32)
    for population, G in product(POPULATIONS, groups):
        yield {"study": "errors", "population": population, "G": G, "reward": "binary", "ragged": False}
    for reward, G in product(("graded", "noisy"), groups[:3]):
        yield {"study": "errors", "population": "beta(1.2, 2.2)", "G": G, "reward": reward, "ragged": False}
    for population, G in product(("beta(1.2, 2.2)", "topics"), groups[:3]):
        yield {"study": "errors", "population": population, "G": G, "reward": "binary", "ragged": True}
    for population, G in product(LEVELS, groups[:2]):
        yield {"study": "errors", "population": population, "G": G, "reward": "binary", "ragged": False}
    for G in groups[:3]:
        yield {"study": "own batch", "G": G}
    for (ease, spread), G in product(((0.7, 0.5), (-1.0, 1.0), (0.0, 3.0), (-2.0, 2.0), (-1.0, 4.0)), groups[:4]):
        yield {"study": "gradient", "ease": ease, "spread": spread, "G": G}


def rules_of(cell: dict[str, Any]) -> dict[str, Any]:
    """Rules that a cell compares, by name."""
    if cell["study"] == "own batch":
        return {"ebpo": None}
    left_out = {"grpo_again", "dapo"}  # they differ from GRPO in training alone
    if cell.get("reward") == "noisy":
        left_out.add("maxrl")  # it needs rewards of at least 0
    rules = {name: make for name, make in RULES.items() if name not in left_out}
    if cell["study"] == "gradient":
        return rules
    del rules["tracker"]  # here a prompt is another one in each batch
    return {**rules, **{f"{name} (unscaled)": make for name, make in UNSCALED.items()}}


def interval(values: list[float]) -> list[float]:
    """Mean and half-width of its 95 % interval over seeds."""
    x = np.array(values)
    return [round(float(x.mean()), 6), round(1.96 * float(x.std(ddof=1)) / np.sqrt(x.size) if x.size > 1 else 0.0, 6)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two seeds, few batches, nothing written")
    parser.add_argument("--seeds", type=int, default=20)
    arguments = parser.parse_args()
    seeds, steps, batches = (2, 10, 20) if arguments.smoke else (arguments.seeds, 100, 400)
    records = []
    for cell in cells(arguments.smoke):
        kind = {key: value for key, value in cell.items() if key != "study"}
        for name, make in rules_of(cell).items():
            match cell["study"]:
                case "own batch":
                    runs = [
                        own_batch_run(seed, kind["G"], updates=8 if arguments.smoke else 256) for seed in range(seeds)
                    ]
                case "gradient":
                    runs = [gradient_run(make(), seed, batches=batches, **kind) for seed in range(seeds)]
                case _:
                    scaled = not name.endswith("(unscaled)")
                    runs = [one_run(make(), seed, steps=steps, scaled=scaled, **kind) for seed in range(seeds)]
            metrics = {
                metric: interval([run[metric] for run in runs if metric in run])
                for metric in {name: None for run in runs for name in run}
            }
            records.append({**cell, "rule": name, "seeds": seeds, **metrics})
        print(cell, flush=True)
    if not arguments.smoke:
        RECORDS.parent.mkdir(exist_ok=True)
        RECORDS.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        print(f"wrote {len(records)} records to {RECORDS}")


if __name__ == "__main__":
    main()
