"""``ebpo prior show PATH``: the memory of the estimator in a checkpoint of any framework, or in a run's newest one."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

import ebpo_core
from ebpo_core.checkpoint import find_prior, read_prior

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console


def summarize(path: str) -> dict[str, Any]:
    """The prior at ``path`` as plain numbers: mean, sigma2 and tau2 as its options compute them, counts, options, keys.

    ``file`` is where it was found (see :func:`ebpo_core.checkpoint.find_prior`). ``shrinkage`` maps a
    group size to S = (sigma2 / G) / (sigma2 / G + tau2), paper section 3.2, or to the option's fixed one. Each entry of
    ``keys`` has the key's own numbers, those it is blended to, and the weight of its parent in them. What an empty
    prior cannot say is None. With one prior per reward function there is a list of such summaries under ``per_reward``.
    """
    file = find_prior(path)
    content = read_prior(file)
    about = {"path": str(path), "file": str(file), "global_step": content.get("global_step")}
    if "ebpo_per_reward" in content:
        entries = content["ebpo_per_reward"]
        each = [{"reward": one.get("reward")} | _summary(str(file), one["ebpo"]) for one in entries]
        return about | {"per_reward": each}
    return about | _summary(str(file), content["ebpo"])


def _summary(path: str, state: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(state.get("options"), dict):
        raise ValueError(f"{str(path)!r} holds no options: it is damaged, use another checkpoint")
    ebpo = ebpo_core.EBPO(**state["options"])
    ebpo.load_state_dict(state)
    options = ebpo.options
    priors = ebpo.priors
    root = _numbers(priors.pop(()), options)
    shrinkage: dict[str, float] = {}
    if root["mean"] is not None:
        sigma2, tau2, fixed = root["sigma2"], root["tau2"], options["shrinkage"]
        for size in (2, 4, 8, 16):
            estimated = (sigma2 / size) / (sigma2 / size + tau2) if sigma2 + tau2 > 0 else 0.0
            shrinkage[str(size)] = fixed if fixed is not None and sigma2 + tau2 > 0 else estimated
    keys = []
    for key, prior in priors.items():
        groups = prior.group_count
        keys.append(
            {
                "key": list(key) if isinstance(key, tuple) else [key],
                **_numbers(prior, options),
                "blended": ebpo.shrunken_prior(key)._asdict(),
                "weight_of_parent": options["kappa"] / (options["kappa"] + groups) if groups > 0 else 1.0,
            }
        )
    return {"prior_step": ebpo.step, **root, "shrinkage": shrinkage, "options": options, "keys": keys}


def _numbers(prior: ebpo_core.Prior, options: Any) -> dict[str, Any]:
    empty = prior.count == 0
    return {
        "rewards_seen": prior.count,
        "groups_seen": prior.group_count,
        "mean": None if empty else prior.mean,
        "sigma2": None if empty else prior.sigma2(options["sigma2"], ddof=options["ddof"]),
        "tau2": None if empty else prior.tau2(options["tau2"], ddof=options["ddof"]),
    }


def main(argv: Sequence[str]) -> int:
    """Parse ``show PATH [--json]`` and print."""
    parser = argparse.ArgumentParser(prog="ebpo prior", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print a checkpoint's prior, and that of each key")
    show.add_argument("path", help="a checkpoint folder of an EBPO run, a folder of several, or an ebpo_prior.json")
    show.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args(argv)
    summary = summarize(arguments.path)
    if arguments.json:
        print(json.dumps(summary, indent=2))
        return 0

    from rich.console import Console
    from rich.text import Text

    console = Console()
    for one in summary.get("per_reward", [summary]):
        of_reward = f", reward function {one['reward']}" if "reward" in one else ""
        console.print(Text(f"EBPO prior, {summary['file']}{of_reward}", style="bold"))
        _show_root(console, summary["global_step"], one)
        if one["keys"]:
            _show_keys(console, one)
    return 0


def _show_root(console: Console, step: int | None, summary: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("quantity", "value")
    table.add_row("trainer step", _format(step))
    table.add_row("rewards seen", _format(summary["rewards_seen"]))
    table.add_row("groups seen", _format(summary["groups_seen"]))
    table.add_row("mean reward", _format(summary["mean"]))
    table.add_row(f"sigma2 ({summary['options']['sigma2']})", _format(summary["sigma2"]))
    table.add_row(f"tau2 ({summary['options']['tau2']})", _format(summary["tau2"]))
    for size, value in summary["shrinkage"].items():
        table.add_row(f"shrinkage S at G = {size}", _format(value))
    for name, value in summary["options"].items():
        table.add_row(f"option {name}", _format(value), style="dim")
    console.print(table)


def _show_keys(console: Console, summary: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("key", "groups", "mean", "sigma2", "tau2", "weight of parent", "blended mean")
    for entry in summary["keys"]:
        numbers = [entry[name] for name in ("groups_seen", "mean", "sigma2", "tau2", "weight_of_parent")]
        key = Text(" / ".join(str(part) for part in entry["key"]))  # as text: a key may look like markup
        table.add_row(key, *(_format(value) for value in numbers), _format(entry["blended"]["mean"]))
    console.print(table)


def _format(value: Any) -> str:
    """Numbers with six significant digits, whole ones in full, a missing one as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float) and not isinstance(value, bool):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1 else f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
