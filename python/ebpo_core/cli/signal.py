"""``ebpo signal FILE...``: does this run have a signal? Dead groups now and expected, what buys signal, what is wrong.

Reads rewards with their groups from JSON Lines or Parquet: TRL's completions (log_completions), verl's rollout dump
(trainer.rollout_data_dir), SkyRL's evaluation dump, samples.jsonl of `ebpo eval` and `ebpo curriculum`, or columns that
you name. Exit status: 0 nothing to warn of, 3 warnings, 1 unreadable, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WARNED = 3
PICTURES = (".png", ".pdf", ".svg")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ebpo signal", description=__doc__, allow_abbrev=False)
    parser.add_argument("files", nargs="+", metavar="FILE", help="file, or folder that a trainer wrote them to")
    parser.add_argument(
        "--group", metavar="COLUMN", help="whose equal values are a group; found by itself if it can be"
    )
    parser.add_argument(
        "--reward",
        metavar="COLUMN",
        action="append",
        default=[],
        help="of rewards; repeat it, and they are added up",
    )
    parser.add_argument(
        "--weight", metavar="W", type=float, action="append", default=[], help="of each --reward, in their order (1)"
    )
    parser.add_argument("--prompt", metavar="COLUMN", help="of the prompt's text, to find duplicates and mixed groups")
    parser.add_argument("--step", metavar="COLUMN", help="of the training step")
    parser.add_argument("--source", metavar="COLUMN", help="of the data set or environment, to compare their scales")
    parser.add_argument("--last", metavar="STEPS", type=int, help="look at the last steps alone")
    parser.add_argument(
        "--groups-per-step", metavar="M", type=int, help="groups a step will have, for a file without steps (all)"
    )
    parser.add_argument(
        "--max-dead", metavar="SHARE", type=float, default=0.5, help="of dead groups to warn above (0.5)"
    )
    parser.add_argument("--resamples", type=int, default=200, help="weightings of the bootstrap (200)")
    parser.add_argument("--confidence", type=float, default=0.95, help="coverage of the intervals (0.95)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--picture", metavar="FILE", help="draw it too: .png, .pdf or .svg")
    return parser


def main(argv: Sequence[str]) -> int:
    """Read, diagnose, print."""
    from ebpo_core.signal import diagnose, read_rollouts

    given = build_parser().parse_args(argv)
    if given.picture is not None and Path(given.picture).suffix not in PICTURES:
        raise ValueError(f"--picture {given.picture}: must end in one of {', '.join(PICTURES)}")
    for module, wanted in (("matplotlib", given.picture is not None), ("rich", not given.json)):
        if wanted and importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(name=module)
    rollouts = read_rollouts(
        given.files,
        group=given.group,
        reward=given.reward,
        weights=given.weight,
        prompt=given.prompt,
        step=given.step,
        source=given.source,
    )
    if given.last is not None:
        rollouts = rollouts.last_steps(given.last)
    if given.groups_per_step is not None:
        rollouts = rollouts.in_steps_of(given.groups_per_step)
    report = diagnose(
        rollouts, max_dead=given.max_dead, resamples=given.resamples, confidence=given.confidence, seed=given.seed
    )
    if given.json:
        print(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        from rich.console import Console

        from ebpo_core.signal.tables import print_report

        print_report(report, Console())
    if given.picture is not None:
        from ebpo_core.signal.picture import draw_report

        written = draw_report(report, given.picture)
        if not given.json:
            print(f"Picture: {written}")
    return WARNED if report.warnings else 0
