"""``fusionroute merge``: fine-tuned models of one base merged by their weights into a model folder, a baseline."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_OWN = {"dare": ("drop", "seed"), "ties": ("density",)}  # settings by method


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusionroute merge", description=__doc__, allow_abbrev=False)
    parser.add_argument("output", metavar="OUTPUT", help="a folder that does not exist, or is empty")
    parser.add_argument("--base", required=True, metavar="DIR", help="the model that all were fine-tuned from")
    parser.add_argument("--tuned", required=True, nargs="+", metavar="DIR", help="folders of the fine-tuned models")
    parser.add_argument(
        "--method",
        choices=("task-arithmetic", "dare", "ties"),
        default="task-arithmetic",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="one for all, or one for each (default: 1 / models)"
    )
    parser.add_argument("--drop", type=float, help="dare: probability of dropping a change")
    parser.add_argument("--seed", type=int, help="dare: seed of what is dropped (default: 0)")
    parser.add_argument("--density", type=float, help="ties: share of the changes that is kept (default: 0.2)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Merge, and print the output's path."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    for owner, names in _OWN.items():
        for name in names:
            if getattr(arguments, name) is not None and arguments.method != owner:
                parser.error(f"--{name} goes with --method {owner}")
    if arguments.method == "dare" and arguments.drop is None:
        parser.error("--method dare needs --drop")

    from ebpo_core.fusionroute.baselines import dare, merge_folders, task_arithmetic, ties

    weights: Any = arguments.weights or 1 / len(arguments.tuned)
    if isinstance(weights, list) and len(weights) == 1:
        weights = weights[0]
    given = {name: getattr(arguments, name) for name in _OWN.get(arguments.method, ())}
    methods: dict[str, Any] = {"task-arithmetic": task_arithmetic, "dare": dare, "ties": ties}
    method = partial(
        methods[arguments.method],
        weights=weights,
        **{name: value for name, value in given.items() if value is not None},
    )
    print(merge_folders(arguments.base, arguments.tuned, arguments.output, method))
    return 0
