"""Figures and tables of the evidence page, drawn anew from the committed records in seconds.

python benches/evidence/figures.py            # writes docs/evidence/*.svg and the marked blocks of docs/evidence.md
python benches/evidence/figures.py --check    # exits with 1 if the page's blocks are not what the records give
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from contrasts import COMMON, ONE_RATE, Contrast, by_cell, main_family, one_rate_first, paired, read, saturated_at_start
from tables import TABLES

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "evidence.md"
FIGURES = ROOT / "docs" / "evidence"

COLORS = {
    "ebpo": "#2563eb",
    "ebpo_options": "#7c3aed",
    "grpo": "#64748b",
    "rloo": "#0891b2",
    "constant": "#dc2626",
    "batch_mean": "#d97706",
    "mix_50": "#059669",
}


def _axes(width: float, height: float, **grid: Any) -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    # The ids in the file and its date would differ from one drawing to the next.
    mpl.rcParams.update({"svg.hashsalt": "ebpo-core", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 9})
    return plt.subplots(figsize=(width, height), layout="constrained", **grid)


def _save(figure: Any, name: str) -> None:
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})
    import matplotlib.pyplot as plt

    plt.close(figure)


def draw_main(cells: Any) -> None:
    """Every main contrast with its 95 % interval, a panel for each G."""
    family = main_family(cells)
    figure, panels = _axes(9, 3.6, ncols=2, sharex=True)
    for panel, G in zip(panels, (2, 4), strict=True):
        rows = [contrast for size, contrast, _ in family if size == G]
        for y, c in enumerate(reversed(rows)):
            panel.plot([c.low, c.high], [y, y], color=COLORS[c.arm], lw=2)
            panel.plot(c.mean, y, "o", color=COLORS[c.arm])
        panel.set_yticks(range(len(rows)), [f"{c.arm} - {c.other} ({c.seeds})" for c in reversed(rows)])
        panel.axvline(0, color="black", lw=0.8)
        panel.set_title(f"G = {G}: difference of pass@1, points", loc="left")
    _save(figure, "main")


def draw_ladder(cells: Any) -> None:
    """Gain over GRPO against the share of groups without a difference in the first batch: a group of points a cell."""
    figure, panel = _axes(7, 4.2)
    named: set[tuple[str, str, int]] = set()
    for shift, arm in enumerate(("ebpo", "ebpo_options", "constant", "batch_mean", "mix_50")):
        drawn: set[Contrast] = set()
        for (task, rung, G, variant), arms in one_rate_first(cells):
            contrast = paired(arms, arm, "grpo") if variant in ("", ONE_RATE) else None
            if contrast is None or contrast in drawn:  # an arm that was tuned to the common rate has one run for both
                continue
            drawn.add(contrast)
            start = 100 * saturated_at_start(arms)
            x = start + shift + 0.5 * (variant == "")
            panel.plot([x, x], [contrast.low, contrast.high], color=COLORS[arm], lw=1.5, ls="-" if variant else ":")
            shape, fill = "o" if task == "countdown" else "s", COLORS[arm] if variant else "white"
            panel.plot(x, contrast.mean, shape, color=COLORS[arm], mfc=fill, label=arm if len(drawn) == 1 else None)
            if (task, rung, G) not in named:
                named.add((task, rung, G))
                place = {"y": 0.02, "va": "bottom"} if task == "countdown" else {"y": 0.98, "va": "top"}
                name = f"{task}\n{rung}\nG = {G}"
                panel.text(start, s=name, transform=panel.get_xaxis_transform(), fontsize=7, **place)
    panel.axhline(0, color="black", lw=0.8)
    panel.set_xlabel("groups without a difference in the first batch, %")
    panel.set_ylabel("pass@1 over GRPO, points")
    panel.margins(y=0.2)
    panel.legend(frameon=False, title="full: one rate; open: tuned rates", title_fontsize=8)
    _save(figure, "ladder")


def draw_curves(cells: Any) -> None:
    """Reward and entropy over the steps on the middle rung at G = 2 and one rate for all, mean over seeds."""
    arms = cells.get(COMMON[2], {})
    figure, panels = _axes(9, 3.2, ncols=3)
    for panel, (name, title) in zip(
        panels,
        (
            ("reward", "mean reward"),
            ("entropy", "entropy a token, nats"),
            ("equal", "share of groups without a difference"),
        ),
        strict=True,
    ):
        for arm, color in COLORS.items():
            runs = [record["curves"][name] for record in arms.get(arm, {}).values()]
            if runs:
                mean = np.mean(runs, axis=0)
                panel.plot(1 + 3 * np.arange(len(mean)), mean, color=color, label=arm, lw=1.3)
        panel.set_title(title, loc="left")
        panel.set_xlabel("step")
    panels[0].legend(frameon=False, fontsize=7)
    _save(figure, "curves")


def draw_estimators(records: list[dict[str, Any]]) -> None:
    """Claims of the paper on simulated rewards, a panel each, and the gradient that rules give."""

    def series(key: str, metric: str, **wanted: Any) -> tuple[list[Any], list[float], list[float]]:
        rows = [r for r in records if metric in r and all(r.get(k) == v for k, v in wanted.items())]
        return [np.ravel(r[key])[0] for r in rows], [r[metric][0] for r in rows], [r[metric][1] for r in rows]

    def lines(panel: Any, key: str, metric: str, rules: Any, **wanted: Any) -> None:
        for rule in rules:
            x, y, half = series(key, metric, rule=rule, **wanted)
            panel.errorbar(x, y, half, label=rule, marker="o", ms=3, lw=1.2)
        panel.legend(frameon=False, fontsize=6)

    binary = {"study": "errors", "reward": "binary", "ragged": False}
    figure, panels = _axes(11, 6.4, nrows=2, ncols=3)
    a, b, c, e, f, gradient = panels.flat
    shown = ("grpo", "ebpo", "ebpo_options", "constant", "batch_mean")
    lines(a, "G", "failed_sign", shown, population="beta(1.2, 2.2)", **binary)
    a.set_title("a. failed groups: share pushed down", loc="left")
    errors = [f"{rule} (unscaled)" for rule in ("dr_grpo", "ebpo", "ebpo_within", "batch_mean")]
    lines(b, "G", "baseline_mse", errors, population="beta(1.2, 2.2)", **binary)
    b.set_title("b. squared error of the baseline", loc="left")
    b.set_yscale("log")
    means = {f"mean {mean}": mean for mean in (0.1, 0.3, 0.5, 0.7, 0.9)}
    for rule in shown:
        rows = [r for r in records if r["rule"] == rule and r.get("population") in means and r["G"] == 2]
        rows = [r for r in rows if "failed_advantage" in r]
        c.plot([means[r["population"]] for r in rows], [r["failed_advantage"][0] for r in rows], "o-", ms=3, label=rule)
    c.set_title("c. advantage of failed groups, by mean success", loc="left")
    c.legend(frameon=False, fontsize=6)
    lines(e, "G", "baseline_mse", ("ebpo (unscaled)", "ebpo_topic (unscaled)"), population="topics", **binary)
    e.set_title("e. topics: error with and without keys", loc="left")
    for record in records:
        if record["study"] == "own batch":
            after = {int(k.split("_")[1]): v[0] for k, v in record.items() if k.startswith("after_")}
            f.loglog(list(after), list(after.values()), "o-", ms=3, label=f"G = {record['G']}")
    f.set_title("f. what its own batch moves a baseline", loc="left")
    f.set_xlabel("updates")
    f.legend(frameon=False, fontsize=6)
    lines(gradient, "saturated", "cosine", shown, study="gradient", G=2)
    gradient.set_title("gradient: cosine with the exact one, G = 2", loc="left")
    _save(figure, "estimators")


def blocks(text: str, tables: dict[str, str]) -> str:
    """The page with every marked block replaced by its table."""
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name}: drawn by figures.py -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise SystemExit(f"{PAGE.name}: wants one block '<!-- {name}: drawn by figures.py -->'")
        text = pattern.sub(lambda match, table=table: f"{match[1]}\n{table}\n{match[2]}", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="draw nothing; fail if the page is not what the records give"
    )
    arguments = parser.parse_args()
    training, estimators = read("training"), read("estimators")
    cells = by_cell(training)
    tables = {name: table(training, cells, estimators) for name, table in TABLES.items()}
    text = PAGE.read_text(encoding="utf-8")
    drawn = blocks(text, tables)
    if arguments.check:
        if drawn != text:
            sys.exit(f"{PAGE.name} differs from the records: run make evidence-figures")
        return
    PAGE.write_text(drawn, encoding="utf-8")
    draw_main(cells)
    draw_ladder(cells)
    draw_curves(cells)
    draw_estimators(estimators)
    print(f"wrote {PAGE.relative_to(ROOT)} and {len(list(FIGURES.glob('*.svg')))} figures")


if __name__ == "__main__":
    main()
