"""``fusionroute compile``: a copy of a checkpoint whose experts are adapters of its router, two forwards a token."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ebpo_core.cli.quiet import hide_loading_bars
from ebpo_core.fusionroute.cli.held_out import add_label_flags, chat_template
from ebpo_core.fusionroute.cli.options import add_code_flag, add_expert_path_flag, named_paths, number_or_named

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_DESCRIPTION = """\
Distil every expert into a LoRA of the router that reads the router's own keys and values. The compiled checkpoint
decodes with two forwards of the router a token, for any number of experts, and one key/value cache. Start a run that
was killed again as it was: it goes on. Held-out rows say what was lost.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusionroute compile", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="directory or hub id of a FusionRoute checkpoint")
    parser.add_argument("output", metavar="OUTPUT", help="a folder that does not exist, is empty, or of a killed run")
    parser.add_argument("--data", required=True, help="rows of SFT data: a file, folder or hub id")
    parser.add_argument("--eval-data", help="held-out rows; by default every 20th row of --data")
    parser.add_argument("--dataset-split", help="of a folder or hub id")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: %(default)s)")
    parser.add_argument("--alpha", type=float, help="PEFT's lora_alpha (default: twice the rank)")
    parser.add_argument(
        "--steps",
        nargs="+",
        default=["1000"],
        metavar="N or NAME=N",
        help="of every expert, or a number for each by name (default: 1000)",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="rows of a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of AdamW (default: %(default)s)")
    parser.add_argument(
        "--other-weight",
        type=float,
        default=0.1,
        help="weight of positions at which another expert is selected (default: %(default)s)",
    )
    parser.add_argument("--max-length", type=int, help="cut longer rows at their end")
    add_label_flags(parser)
    parser.add_argument("--save-steps", type=int, default=200, help="steps between saved states (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--device", help="e.g. cpu or cuda:1; by default the first GPU, else the CPU")
    add_expert_path_flag(parser)
    add_code_flag(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Compile, and print the report and the output's path."""
    arguments = _parser().parse_args(argv)
    paths = named_paths("expert-path", arguments.expert_path)
    template = chat_template(arguments)
    steps = number_or_named("steps", arguments.steps)

    import torch

    from ebpo_core.data.rows import load_rows
    from ebpo_core.fusionroute.compiled.compilation import compile as compiled

    hide_loading_bars()
    split = arguments.dataset_split
    rows = load_rows("data", arguments.data, split, None)
    held_out = None if arguments.eval_data is None else load_rows("eval_data", arguments.eval_data, split, None)
    names = ("rank", "alpha", "batch_size", "learning_rate", "other_weight", "max_length", "train_on")
    console = Console(highlight=False)
    report = compiled(
        arguments.checkpoint,
        arguments.output,
        rows,
        eval_data=held_out,
        steps=steps,
        **{name: getattr(arguments, name) for name in (*names, "save_steps", "seed", "trust_remote_code")},
        chat_template_kwargs=template,
        expert_paths=paths or None,
        device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        console=console,
    )
    print_report(console, report)
    print(arguments.output)
    return 0


def print_report(console: Console, report: Mapping[str, Any]) -> None:
    """Print a row per expert, and how the fused policy came through."""
    table = Table("expert", title=f"rank {report['rank']}, {report['rows']} held-out rows", title_justify="left")
    for name in ("selected", "KL", "agreement"):
        table.add_column(name, justify="right")
    for name, numbers in report["experts"].items():
        kl, agreement = numbers["kl"], numbers["agreement"]
        cells = ["-" if kl is None else f"{kl:.4f}", "-" if agreement is None else f"{agreement:.1%}"]
        table.add_row(Text(name), f"{numbers['share']:.1%}", *cells)
    fused = report["fused"]
    table.add_row("fused", "", f"{fused['kl']:.4f}", f"{fused['agreement']:.1%}")
    console.print(table)
    for name, what in (("accuracy", "tokens right"), ("exact", "rows right")):
        before, after = fused[name]["uncompiled"], fused[name]["compiled"]
        console.print(f"{what}: {before:.1%} uncompiled, {after:.1%} compiled")
