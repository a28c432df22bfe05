"""``ebpo prior show PATH``: what the estimator remembers, from a checkpoint directory or the prior's own file."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

import ebpo_core
from ebpo_core.trainer.checkpoint import read_prior

if TYPE_CHECKING:
    from collections.abc import Sequence


def summarize(path: str) -> dict[str, Any]:
    """The prior at ``path`` as plain numbers: mean, sigma2 and tau2 as its options compute them, counts, options.

    ``shrinkage`` maps a group size to S = (sigma2 / G) / (sigma2 / G + tau2), paper section 3.2. What an empty prior
    cannot say is None.
    """
    content = read_prior(path)
    state = content["ebpo"]
    if not isinstance(state.get("options"), dict):
        raise ValueError(f"{str(path)!r} holds no options: it is damaged, use another checkpoint")
    ebpo = ebpo_core.EBPO(**state["options"])
    ebpo.load_state_dict(state)
    prior, options = ebpo.prior, ebpo.options
    if prior.count == 0:
        mean = sigma2 = tau2 = None
        shrinkage: dict[str, float] = {}
    else:
        mean = prior.mean
        sigma2 = prior.sigma2(options["sigma2"], ddof=options["ddof"])
        tau2 = prior.tau2(options["tau2"], ddof=options["ddof"])
        shrinkage = {
            str(size): (sigma2 / size) / (sigma2 / size + tau2) if sigma2 + tau2 > 0 else 0.0 for size in (2, 4, 8, 16)
        }
    return {
        "path": str(path),
        "global_step": content.get("global_step"),
        "prior_step": ebpo.step,
        "rewards_seen": prior.count,
        "groups_seen": prior.group_count,
        "mean": mean,
        "sigma2": sigma2,
        "tau2": tau2,
        "shrinkage": shrinkage,
        "options": options,
    }


def main(argv: Sequence[str]) -> int:
    """Parse ``show PATH [--json]`` and print."""
    parser = argparse.ArgumentParser(prog="ebpo prior", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print a checkpoint's prior")
    show.add_argument("path", help="a checkpoint directory of an EBPO run, or its ebpo_prior.json")
    show.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args(argv)
    summary = summarize(arguments.path)
    if arguments.json:
        print(json.dumps(summary, indent=2))
        return 0

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("quantity", "value")
    table.add_row("trainer step", _format(summary["global_step"]))
    table.add_row("rewards seen", _format(summary["rewards_seen"]))
    table.add_row("groups seen", _format(summary["groups_seen"]))
    table.add_row("mean reward", _format(summary["mean"]))
    table.add_row(f"sigma2 ({summary['options']['sigma2']})", _format(summary["sigma2"]))
    table.add_row(f"tau2 ({summary['options']['tau2']})", _format(summary["tau2"]))
    for size, value in summary["shrinkage"].items():
        table.add_row(f"shrinkage S at G = {size}", _format(value))
    for name, value in summary["options"].items():
        table.add_row(f"option {name}", _format(value), style="dim")
    console = Console()
    console.print(Text(f"EBPO prior, {summary['path']}", style="bold"))
    console.print(table)
    return 0


def _format(value: Any) -> str:
    """Numbers with six significant digits, whole ones in full, a missing one as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float) and not isinstance(value, bool):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1 else f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
