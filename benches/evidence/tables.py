"""Tables of the evidence page, in Markdown, each from the records alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

import numpy as np
from contrasts import (
    COMMON,
    MIDDLE,
    ONE_RATE,
    PRETRAINED,
    SORTING,
    Contrast,
    main_family,
    one_rate_first,
    outcome,
    over_tasks,
    paired,
    saturated_at_start,
)
from training import TUNING_SEEDS, WARM_UPS

OUTCOMES = ("pass@1", "pass@16", "maj@16", "distinct", "entropy", "kl", "grad_norm")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = list(rows)
    if not body:
        return "*No records yet.*\n"
    lines = [" | ".join(row) for row in (head, ["---"] * len(head), *body)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def difference(c: Contrast | None, digits: int = 1) -> str:
    return "" if c is None else f"{c.mean:+.{digits}f} ({c.low:+.{digits}f} to {c.high:+.{digits}f})"


def _unit(name: str) -> tuple[float, int]:
    """What an outcome is multiplied by, and its digits: rates are shown in points, others as they are."""
    return (100.0, 1) if "@" in name else (1.0, 3)


def _differences(arms: Any, arm: str, other: str, names: Iterable[str]) -> list[str]:
    units = [(name, *_unit(name)) for name in names]
    return [difference(paired(arms, arm, other, name, unit), digits) for name, unit, digits in units]


def over_warm_ups(c: Contrast) -> str:
    return "" if c.clustered is None else "{:+.1f} to {:+.1f}".format(*c.clustered)


def answer(_: Any, cells: Any, __: Any) -> str:
    """The page's first table: pass@1 at one learning rate, by task and group size."""
    shown = (COMMON[2], SORTING, COMMON[4], COMMON[8])
    rows = []
    for arm, other in (
        ("ebpo", "grpo"),
        ("mix_50", "grpo"),
        ("ebpo_options", "grpo"),
        ("batch_mean", "grpo"),
        ("constant", "grpo"),
        ("ebpo", "mix_50"),
        ("ebpo", "batch_mean"),
    ):
        found = [paired(cells.get(cell, {}), arm, other) for cell in shown]
        rows.append([f"{arm} - {other}", *("" if c is None else f"{difference(c)}, {c.seeds} pairs" for c in found)])
    return table(["pass@1, points (95 %)", *(f"{task}, G = {G}" for task, _, G, _ in shown)], rows)


def checks(_: Any, cells: Any, __: Any) -> str:
    """EBPO less GRPO at G = 2 over parts of the seeds."""
    parts: tuple[tuple[str, Callable[[int], bool]], ...] = (
        ("all", lambda _: True),
        ("from seed 10 on: run after the cell with one rate was added", lambda seed: seed >= 10),
        ("warm-ups that tuned no rate", lambda seed: seed % WARM_UPS not in {s % WARM_UPS for s in TUNING_SEEDS}),
    )
    rows = []
    for name, wanted in parts:
        shown = []
        for cell in (COMMON[2], MIDDLE):
            arms = {
                arm: {seed: run for seed, run in runs.items() if wanted(seed)}
                for arm, runs in cells.get(cell, {}).items()
            }
            c = paired(arms, "ebpo", "grpo")
            shown += ["", ""] if c is None else [difference(c), f"{c.wins}/{c.seeds}"]
        rows.append([name, *shown])
    return table(["seeds", "one rate, points (95 %)", "ahead", "tuned rates, points (95 %)", "ahead"], rows)


def progress(training: Any, _: Any, __: Any) -> str:
    seconds = sum(record["cpu_seconds"] for record in training)
    commits = list(dict.fromkeys(record["commit"] for record in training))
    tuning = sum(record["config"]["seed"] >= 1000 for record in training)
    return (
        f"{len(training)} runs ({tuning} of them to tune learning rates), "
        f"{seconds / 3600:.1f} CPU hours, at {', '.join(commits) or 'no commit'}.\n"
    )


def rates(training: Any, _: Any, __: Any) -> str:
    found: dict[str, dict[float, list[float]]] = {}
    for record in training:
        config = record["config"]
        if config["seed"] >= 1000:
            by_rate = found.setdefault(config["arm"], {})
            by_rate.setdefault(config["rate"], []).append(100 * outcome(record, "pass@1"))
    grid = sorted({rate for by_rate in found.values() for rate in by_rate})
    rows = [
        [arm, *(f"{np.mean(by_rate[r]):.1f}" if r in by_rate else "" for r in grid)] for arm, by_rate in found.items()
    ]
    return table(["arm", *(f"{rate:g}" for rate in grid)], rows)


def main(_: Any, cells: Any, __: Any) -> str:
    rows = []
    for G, c, p in main_family(cells):
        ahead, corrected, visible = f"{c.wins}/{c.seeds}", f"{p:.3f}", f"{c.visible:.1f}"
        rows.append([str(G), c.arm, c.other, str(c.seeds), difference(c), over_warm_ups(c), ahead, corrected, visible])
    head = ["G", "arm", "against", "pairs", "pass@1, points (95 %)", "over warm-ups", "ahead", "p (Holm)", "visible"]
    return table(head, rows)


def levels(_: Any, cells: Any, __: Any) -> str:
    rows = []
    for G in (2, 4, 8):
        arms = cells.get(("countdown", "middle", G, ""), {})
        for arm, seeds in arms.items():
            values = [[outcome(record, name) for record in seeds.values()] for name in OUTCOMES]
            means = [np.mean(v) for v in values]
            spread = f" ± {100 * np.std(values[0], ddof=1):.1f}" if len(seeds) > 1 else ""
            shown = [f"{100 * means[0]:.1f}{spread}", *(f"{100 * m:.1f}" for m in means[1:3])]
            shown += [f"{means[3]:.2f}", f"{means[4]:.2f}", f"{means[5]:.4f}", f"{means[6]:.2f}"]
            rows.append(
                [str(G), arm, str(len(seeds)), *shown, difference(paired(arms, arm, "grpo") if arm != "grpo" else None)]
            )
    head = ["G", "arm", "runs", "pass@1 ± sd", "pass@16", "maj@16", "distinct", "entropy", "KL", "gradient norm"]
    return table([*head, "over GRPO, points (95 %)"], rows)


def outcomes(_: Any, cells: Any, __: Any) -> str:
    """EBPO less GRPO in every outcome, on the middle rung."""
    rows = []
    for G in (2, 4, 8):
        arms = cells.get(("countdown", "middle", G, ""), {})
        for name in OUTCOMES:
            unit, digits = _unit(name)
            c = paired(arms, "ebpo", "grpo", name, unit)
            if c is not None:
                rows.append([str(G), name, str(c.seeds), difference(c, digits), f"{c.wins}/{c.seeds}"])
    return table(["G", "outcome", "pairs", "EBPO - GRPO (95 %)", "above"], rows)


def ladder(_: Any, cells: Any, __: Any) -> str:
    """Gains over GRPO by cell: at one rate, then at the rates that were tuned on the middle rung of countdown."""
    rows = []
    arms_shown = ("ebpo", "mix_50", "batch_mean", "constant")
    for cell, arms in one_rate_first(cells):
        contrasts = [paired(arms, arm, "grpo") for arm in arms_shown]
        known = [c for c in contrasts if c is not None]
        # Where EBPO has no run at its tuned rate, all arms have the one rate.
        if cell[3] not in ("", ONE_RATE) or not known or (cell[3] == "" and contrasts[0] is None):
            continue
        before = np.mean([record["before"]["pass@1"] for seeds in arms.values() for record in seeds.values()])
        row = [*cell[:2], str(cell[2]), cell[3] or "tuned", f"{100 * before:.1f}"]
        row += [f"{100 * saturated_at_start(arms):.0f}", str(max(c.seeds for c in known))]
        rows.append([*row, *map(difference, contrasts), f"{known[0].visible:.1f}"])
    head = ["task", "rung", "G", "rates", "pass@1 before", "saturated, %", "pairs"]
    return table([*head, *(f"{arm} - grpo" for arm in arms_shown), "visible"], rows)


def _compared(cells: Iterable[tuple[int, Any]], *names: str) -> str:
    """Every arm against GRPO, and EBPO against the others: rates in points, others in their own units."""
    rows = []
    for G, arms in cells:
        others = sorted(set(arms) - {"ebpo", "grpo"})
        for arm, other in [("ebpo", "grpo"), *(("ebpo", one) for one in others), *((one, "grpo") for one in others)]:
            first = paired(arms, arm, other, names[0])
            if first is not None:
                shown = _differences(arms, arm, other, names)
                shown.insert(1, over_warm_ups(first))
                rows.append([str(G), arm, other, str(first.seeds), *shown, f"{first.wins}/{first.seeds}"])
    head = [f"{name} (95 %)" for name in names]
    head.insert(1, f"{names[0]} over warm-ups")
    return table(["G", "arm", "against", "pairs", *head, f"ahead in {names[0]}"], rows)


def common(_: Any, cells: Any, __: Any) -> str:
    found = [(G, cells.get(cell, {})) for G, cell in COMMON.items()]
    return _compared(found, "pass@1", "pass@16", "maj@16", "entropy", "kl", "grad_norm")


def sorting(_: Any, cells: Any, __: Any) -> str:
    return _compared([(2, cells.get(SORTING, {}))], "pass@1", "pass@16", "maj@16", "entropy", "kl", "reward")


def higher_rate(_: Any, cells: Any, __: Any) -> str:
    """Arms that were tuned to another rate than the common one: there, less at the common one."""
    rows, names = [], ("pass@1", "pass@16", "entropy")
    for G, common_cell in COMMON.items():
        for arm in ("ebpo", "ebpo_options"):
            both = {"tuned": cells.get((*common_cell[:2], G, ""), {}), "common": cells.get(common_cell, {})}
            runs = {rate: arms.get(arm, {}) for rate, arms in both.items()}
            first = paired(runs, "tuned", "common")
            if first is not None:
                shown = _differences(runs, "tuned", "common", names)
                rows.append([str(G), arm, str(first.seeds), *shown, f"{first.wins}/{first.seeds}"])
    return table(["G", "arm", "pairs", *(f"{name} (95 %)" for name in names), "ahead in pass@1"], rows)


def scale(_: Any, cells: Any, __: Any) -> str:
    return _compared([(2, cells.get(("countdown", "middle", 2, "equal scale"), {}))], "pass@1", "pass@16", "maj@16")


def pretrained(_: Any, cells: Any, __: Any) -> str:
    found = [(cell[2], arms) for cell, arms in cells.items() if cell[3] == PRETRAINED]
    return _compared(found, "pass@1", "pass@4", "maj@4", "entropy")


def variants(_: Any, cells: Any, __: Any) -> str:
    """Cells off the ladder: one prompt in each call of the rule, and few prompts that come back."""
    rows = []
    for (_, _, G, variant), arms in cells.items():
        if variant.endswith(("prompt a call", "prompts")):
            other = "grpo" if "grpo" in arms else "batch_mean"
            found = [c for arm in arms if arm != other and (c := paired(arms, arm, other)) is not None]
            rows += [
                [variant, str(G), c.arm, c.other, str(c.seeds), difference(c), f"{c.wins}/{c.seeds}"] for c in found
            ]
    return table(["cell", "G", "arm", "against", "pairs", "pass@1, points (95 %)", "ahead"], rows)


def tasks(_: Any, cells: Any, __: Any) -> str:
    rows = []
    for variant, other in product((ONE_RATE, ""), ("grpo", "constant", "batch_mean", "mix_50", "ebpo_options")):
        found = over_tasks(cells, "ebpo", other, variant)
        if found is not None:
            shown = ("{:+.1f} ({:+.1f} to {:+.1f})".format(*found["iqm"]),)
            shown += ("{:.2f} ({:.2f} to {:.2f})".format(*found["improvement"]),)
            rows.append([f"ebpo - {other}", variant or "tuned", str(found["cells"]), str(found["runs"]), *shown])
    return table(["contrast", "rates", "cells", "pairs", "interquartile mean, points", "share of pairs ahead"], rows)


def _value(estimators: Any, metric: str, **wanted: Any) -> str:
    rows = [r for r in estimators if metric in r and all(r.get(key) == value for key, value in wanted.items())]
    return f"{rows[0][metric][0]:.4f} ± {rows[0][metric][1]:.4f}" if len(rows) == 1 else ""


def errors(_: Any, __: Any, estimators: Any) -> str:
    rules = (
        "dr_grpo",
        "rloo",
        "batch_mean",
        "constant",
        "james_stein",
        "ebpo",
        "ebpo_within",
        "ebpo_options",
        "ebpo_topic",
    )
    rows = []
    cells = {(r["population"], r["G"]) for r in estimators if r["study"] == "errors" and r["G"] in (2, 8)}
    for population, G in sorted(cells):
        if population.startswith("mean "):
            continue
        wanted = {"population": population, "G": G, "reward": "binary", "ragged": False}
        found = [
            _value(estimators, "baseline_mse", rule=f"{rule} (unscaled)", **wanted).split(" ")[0] for rule in rules
        ]
        rows.append([population, str(G), *found])
    return table(["success rates", "G", *rules], rows)


def gradients(_: Any, __: Any, estimators: Any) -> str:
    """Variance of the gradient over its squared signal: how many batches have to be averaged for a signal of 1."""
    rules = ("grpo", "rloo", "constant", "batch_mean", "mix_50", "ebpo", "ebpo_options", "ebpo_row", "tracker")
    cells: dict[tuple[int, float], dict[str, Any]] = {}
    for record in estimators:
        if record["study"] == "gradient":
            cells.setdefault((record["G"], record["saturated"][0]), {})[record["rule"]] = record
    rows = [
        [str(G), f"{100 * saturated:.0f}", *(f"{by_rule[rule]['variance'][0]:.2f}" for rule in rules)]
        for (G, saturated), by_rule in sorted(cells.items())
    ]
    return table(["G", "saturated, %", *rules], rows)


def claims(_: Any, __: Any, estimators: Any) -> str:
    """What the paper claims of the estimator, and what came out."""
    if not estimators:
        return table([], [])

    def values(metric: str, **wanted: Any) -> list[float]:
        rows = (r for r in estimators if metric in r and all(r.get(key) == value for key, value in wanted.items()))
        return [r[metric][0] for r in rows]

    binary = {"reward": "binary", "ragged": False}
    signs = [min(values(f"{kind}_sign", rule="ebpo")) for kind in ("failed", "passed")]
    ratio = {}
    for G in (2, 8, 32):
        cell = {"population": "beta(1.2, 2.2)", "G": G, **binary}
        ours, own = (values("baseline_mse", rule=f"{name} (unscaled)", **cell)[0] for name in ("ebpo", "dr_grpo"))
        ratio[G] = ours / own
    failed = [values("failed_advantage", rule="ebpo", population=f"mean {m}", G=2)[0] for m in (0.1, 0.5, 0.9)]
    topics = [
        values("baseline_mse", rule=f"{rule} (unscaled)", population="topics", G=2, **binary)[0]
        for rule in ("ebpo_topic", "ebpo")
    ]
    first, last = (values(f"after_{T}", G=2)[0] for T in (1, 256))
    rows = [
        [
            "a. failed groups are pushed down, passed ones up",
            f"lowest share of such rows: {signs[0]:.3f}, {signs[1]:.3f}",
        ],
        [
            "b. the baseline's squared error is below the group mean's",
            ", ".join(f"{value:.2f} times it at G = {G}" for G, value in ratio.items()),
        ],
        [
            "c. failing weighs more where the policy usually succeeds",
            "advantage of a failed group at mean success 0.1, 0.5, 0.9: " + ", ".join(f"{v:.2f}" for v in failed),
        ],
        [
            "e. a prior for each topic has a lower error",
            f"{topics[0] / topics[1]:.2f} times that of one prior, at G = 2",
        ],
        ["f. what a batch moves its own baseline falls as 1/T", f"by a factor of {first / last:.0f} in 256 updates"],
    ]
    return table(["claim", "what came out"], rows)


TABLES: dict[str, Callable[[Any, Any, Any], str]] = {
    "answer": answer,
    "checks": checks,
    "progress": progress,
    "rates": rates,
    "main": main,
    "levels": levels,
    "outcomes": outcomes,
    "ladder": ladder,
    "common": common,
    "sorting": sorting,
    "higher_rate": higher_rate,
    "scale": scale,
    "pretrained": pretrained,
    "variants": variants,
    "tasks": tasks,
    "claims": claims,
    "errors": errors,
    "gradients": gradients,
}
"""Every table of the page by the name of its block; each takes the records of both studies."""
